"""launch.serve: HTTP with ranks of its own, from loading to the last answer; and clients of a bare group."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path

import httpx
import psutil
import pytest
from phalanx import LLM, ConfigError, SamplingParams, Timeout
from phalanx.engine.client.async_llm import AsyncLLM
from phalanx.engine.protocol.messages import Delta, Finished
from phalanx.tests.launch.programs import family, rank_processes, run
from phalanx.tests.left_behind import nothing_left_behind
from phalanx.tests.serving.servers import running

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
SETTINGS = ("max_model_len=512", "port=0", "poll_interval_s=0.1")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_with_its_own_ranks_answers_as_the_engine_does(tiny: Path, ranks: int) -> None:
    with LLM(str(tiny), max_model_len=512) as llm:
        expected = llm.generate("Once upon a time", GREEDY)[0].outputs[0].text

    with (
        nothing_left_behind() as traces,
        running("serve", f"model={tiny}", f"ranks={ranks}", *SETTINGS) as server,
    ):
        url = server.url
        port = int(url.rpartition(":")[2])
        assert port in traces.listening()
        assert not server.has_torch
        assert len(rank_processes(server.process.pid)) == ranks
        asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=60) as client:
            answered = client.post("/v1/completions", json=asked).json()
            assert answered["choices"][0]["text"] == expected
            streamed = client.post("/v1/completions", json={**asked, "stream": True}).text
            events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
            assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == expected
            assert "vllm:generation_tokens_total" in client.get("/metrics").text

        everyone = family(server.process.pid)
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert psutil.wait_procs(everyone, timeout=5)[1] == []
        assert port not in traces.listening()
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_the_gateway_outlives_its_ranks_and_says_which_failed(tiny: Path) -> None:
    with running("serve", f"model={tiny}", "ranks=2", "max_restarts=0", *SETTINGS) as server:
        url = server.url
        os.kill(rank_processes(server.process.pid)[1].pid, signal.SIGKILL)
        for _ in range(400):
            health = httpx.get(f"{url}/health")
            if health.status_code == 503 and "failed" in health.text:
                break
            threading.Event().wait(0.05)
        assert "rank" in health.json()["reason"]
        refused = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert refused.status_code == 503
        assert httpx.get(f"{url}/health/live").status_code == 200


@pytest.mark.slow
def test_a_signal_while_the_model_is_loading_ends_everything(tiny: Path) -> None:
    with nothing_left_behind(), running("serve", f"model={tiny}", "ranks=2", *SETTINGS) as server:
        for _ in range(1200):
            everyone = family(server.process.pid)
            if len(everyone) == 4:  # the server, the supervisor, two ranks
                break
            threading.Event().wait(0.05)
        server.signal(signal.SIGINT)
        assert server.wait() == 128 + signal.SIGINT
        assert psutil.wait_procs(everyone, timeout=5)[1] == []
    assert "Traceback" not in server.text


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    with nothing_left_behind():
        ended = run("serve", f"model={tmp_path}", *SETTINGS)
    assert ended.returncode == 2
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ready" not in ended.stdout


def test_a_client_of_a_bare_group_gets_what_it_asks_for_and_leaves_the_group_running(
    tiny: Path, tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/engine"
    with running("worker", f"model={tiny}", "max_model_len=512", f"endpoint={address}"):
        with LLM.connect(address) as llm:
            expected = llm.generate("Once upon a time", GREEDY)[0].outputs[0].text
            left = llm.stream("and then", sampling=SamplingParams(max_tokens=400, ignore_eos=True))
            next(left)

        async def main() -> str:
            llm = AsyncLLM.connect(address)
            text = ""
            async for event in llm.stream("Once upon a time", sampling=GREEDY):
                if isinstance(event, Delta):
                    text += event.text
                else:
                    assert isinstance(event, Finished)
            assert (await llm.status()).running == 0  # what the first client left was aborted
            await llm.close()
            return text

        assert asyncio.run(main()) == expected


def test_connecting_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(Timeout, match="no engine answered at ipc://"):
        LLM.connect(f"ipc://{tmp_path}/nobody", timeout_s=0.2)
    with pytest.raises(ConfigError, match="secret_file"):
        AsyncLLM.connect("tcp://127.0.0.1:5555")
    with pytest.raises(ConfigError, match="ipc://PATH or tcp://HOST:PORT"):
        LLM.connect("http://127.0.0.1:5555")


def test_two_different_addresses_of_a_group_are_refused(tiny: Path) -> None:
    ended = run("worker", f"model={tiny}", "address=ipc:///a", "endpoint=ipc:///b")
    assert ended.returncode == 2
    assert "give one" in ended.stderr
