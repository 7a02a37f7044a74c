"""Ranks that are killed or stopped behind HTTP, and a bare group that is started again: streams go on to their end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.protocol.messages import Delta
from phalanx.tests.launch.programs import family, rank_processes, start
from phalanx.tests.left_behind import nothing_left_behind
from phalanx.tests.serving.servers import RunningServer, running

pytestmark = pytest.mark.slow

PATIENCE_S = 120.0
PROMPT = "Once upon a time, in a village by the sea,"
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5, "n": 2},
    {"temperature": 0, "stop": [" the"], "min_tokens": 30},
    {"temperature": 0.7, "seed": 6, "logprobs": 1},
)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.02)


class _Clients:
    """Streaming and whole answers to the same requests."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.begun = threading.Event()
        self.threads = ThreadPoolExecutor(2 * len(ASKED))

    def ask(self) -> list[Future[Any]]:
        """Send every request twice; the answers come later."""
        self.begun.clear()
        bodies = [{"model": "demo", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, **each} for each in ASKED]
        return [self.threads.submit(read, body) for body in bodies for read in (self._stream, self._whole)]

    def _whole(self, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        return [(choice["text"], choice["finish_reason"]) for choice in choices], answer.json()["usage"]

    def _stream(self, body: dict[str, Any]) -> Any:
        texts, reasons = [""] * body.get("n", 1), [None] * body.get("n", 1)
        usage = None
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
                    reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
                self.begun.set()
        return list(zip(texts, reasons, strict=True)), usage


@pytest.fixture
def server(smollm2: Path) -> Iterator[RunningServer]:
    settings = ("max_model_len=512", "port=0", "poll_interval_s=0.1", "dtype=float32", "step_timeout_s=2")
    options = (f"model={smollm2}", "ranks=2", "served_model_names=[demo]", *settings)
    with nothing_left_behind(), running("serve", *options) as server:
        yield server
        everyone = family(server.process.pid)
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert psutil.wait_procs(everyone, timeout=5)[1] == []
    assert "Traceback" not in server.text


def test_killed_and_stopped_ranks_cost_no_answer(server: RunningServer) -> None:
    clients = _Clients(server.url)
    expected = [answer.result() for answer in clients.ask()]
    for rank, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)):
        answers = clients.ask()
        assert clients.begun.wait(PATIENCE_S)
        os.kill(rank_processes(server.process.pid)[rank].pid, number)
        _until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        reason = httpx.get(f"{server.url}/health/ready").json()["reason"]
        assert f"rank {rank} " in reason, reason
        assert [answer.result() for answer in answers] == expected
        _until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 200)
    assert "rank 1 is stopped: nothing has moved for 2" in server.text


def test_a_server_that_is_told_to_end_finishes_what_it_has_though_a_rank_dies(smollm2: Path) -> None:
    settings = ("ranks=2", "max_model_len=512", "port=0", "dtype=float32", "served_model_names=[demo]")
    with nothing_left_behind(), running("serve", f"model={smollm2}", "drain_timeout_s=120", *settings) as server:
        clients = _Clients(server.url)
        expected = [answer.result() for answer in clients.ask()]
        answers = clients.ask()
        # All are accepted: what comes after the signal is refused.
        _until(lambda: httpx.get(f"{server.url}/load").json()["server_load"] == len(answers))
        everyone = family(server.process.pid)
        server.signal(signal.SIGTERM)
        _until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        os.kill(rank_processes(server.process.pid)[0].pid, signal.SIGKILL)
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": "demo", "prompt": "a"})
        assert (refused.status_code, "shutting down" in refused.text) == (503, True)
        assert [answer.result() for answer in answers] == expected
        assert server.wait() == 128 + signal.SIGTERM
        assert psutil.wait_procs(everyone, timeout=5)[1] == []


def test_a_deadline_holds_while_there_is_no_engine(server: RunningServer) -> None:
    url = f"{server.url}/v1/completions"
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
    os.kill(rank_processes(server.process.pid)[0].pid, signal.SIGKILL)
    late = httpx.post(url, json={**body, "timeout": 0.2}, timeout=PATIENCE_S)
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
    assert httpx.post(url, json={**body, "max_tokens": 4}, timeout=PATIENCE_S).is_success


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_bare_group_that_is_started_again_gets_what_it_had(
    smollm2: Path, tmp_path: Path, number: signal.Signals
) -> None:
    address = f"ipc://{tmp_path}/engine"
    options = (f"model={smollm2}", "max_model_len=512", "dtype=float32", f"address={address}")
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
    with running("worker", *options) as worker, LLM.connect(address) as llm:
        expected = llm.generate(PROMPT, sampling)[0].outputs[0].text
        stream = llm.stream(PROMPT, sampling=sampling)
        first = next(stream)
        assert isinstance(first, Delta)
        worker.signal(number)
        worker.process.wait()
        with running("worker", *options):
            assert first.text + "".join(event.text for event in stream if isinstance(event, Delta)) == expected


def test_torchrun_starts_a_group_again_and_its_clients_go_on(smollm2: Path, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    options = (f"model={smollm2}", "ranks=2", "max_model_len=512", "dtype=float32", f"address={address}")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    sampling = SamplingParams(max_tokens=60, temperature=1.0, seed=4, ignore_eos=True)
    torchrun = start("worker", *options, launcher=launcher)
    try:
        with LLM.connect(address, timeout_s=PATIENCE_S) as llm:
            expected = llm.generate(PROMPT, sampling)[0].outputs[0].text
            stream = llm.stream(PROMPT, sampling=sampling)
            first = next(stream)
            assert isinstance(first, Delta)
            rank_1 = next(each for each in family(torchrun.pid) if each.environ().get("RANK") == "1")
            rank_1.kill()
            assert first.text + "".join(event.text for event in stream if isinstance(event, Delta)) == expected
    finally:
        everyone = family(torchrun.pid)
        torchrun.terminate()
        assert psutil.wait_procs(everyone, timeout=30)[1] == []
