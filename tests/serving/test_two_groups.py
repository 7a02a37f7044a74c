"""Two real groups behind one gateway: who gets which requests, and what is left of them when a group goes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from phalanx.engine.client.client import Client
from phalanx.engine.protocol.messages import Status, Submit
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.tests.launch.programs import family
from phalanx.tests.serving.servers import RunningServer, running

ADMIN = {"authorization": "Bearer sk-admin-key"}
ROWS = 4
TOKENS = 48
OPTIONS = ("max_model_len=512", f"max_num_seqs={ROWS}", "dtype=float32")
FIELDS = {"temperature": 0, "ignore_eos": True, "max_tokens": TOKENS}
PREFIX = "The quick brown fox jumps over the lazy dog while the old man reads his book by the river. " * 6


class Streamed:
    """A stream that is read on a thread of its own."""

    def __init__(self, url: str, prompt: str) -> None:
        self._url, self._prompt = url, prompt
        self.begun = threading.Event()
        self.text = ""
        self.errors: list[str] = []
        self.last = ""

    def read(self) -> Streamed:
        """Read it to its end."""
        body = {**FIELDS, "prompt": self._prompt, "stream": True}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    self.errors += [event["error"]["message"]] if "error" in event else []
                    self.text += "".join(choice["text"] for choice in event.get("choices", ()))
                    self.begun.set()
                self.last = line or self.last
        assert self.last == "data: [DONE]"
        return self


class Groups:
    """Two groups, each with a client of the test's own, and the gateway."""

    def __init__(self, gateway: RunningServer, workers: list[RunningServer], addresses: list[str]) -> None:
        self.gateway, self.workers, self.addresses = gateway, workers, addresses
        self.url = gateway.url
        self.clients = [Client(ZmqConnection(address)) for address in addresses]
        self.threads = ThreadPoolExecutor(32)
        self.until(lambda: len(re.findall(r'phase="ready"} 1.0', self.metrics)) == 2)

    @property
    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics").text

    def status(self, number: int) -> Status:
        return self.clients[number].status(30)

    def held(self, number: int) -> int:
        status = self.status(number)
        return status.running + status.waiting

    def stream(self, *prompts: str) -> list[tuple[Streamed, Future[Streamed]]]:
        """Begin streams, one after the other, as far as that their requests are sent."""
        begun = []
        for prompt in prompts:
            streamed = Streamed(self.url, prompt)
            begun.append((streamed, self.threads.submit(streamed.read)))
        return begun

    def complete(self, prompt: str, new_tokens: int = 4) -> str:
        body = {**FIELDS, "prompt": prompt, "max_tokens": new_tokens}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def administer(self, action: str, number: int) -> None:
        answer = httpx.post(f"{self.url}/admin/{action}", json={"engine": str(number)}, headers=ADMIN)
        assert answer.status_code == 200, answer.text

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            threading.Event().wait(0.05)

    def kill(self, number: int) -> None:
        for process in family(self.workers[number].process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.threads.shutdown()


@pytest.fixture
def groups(smollm2: Path, tmp_path: Path) -> Iterator[Groups]:
    addresses = [f"ipc://{tmp_path}/engine{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(running("worker", f"model={smollm2}", f"endpoint={address}", *OPTIONS))
            for address in addresses
        ]
        settings = ("port=0", "poll_interval_s=0.2", "admin_key=sk-admin-key", "served_model_names=[demo]")
        gateway = stack.enter_context(running("gateway", f"engines=[{','.join(addresses)}]", *settings))
        groups = Groups(gateway, workers, addresses)
        stack.callback(groups.close)
        yield groups
        assert "Traceback" not in gateway.text


def prompts(name: str, count: int) -> list[str]:
    return [f"{name} {number}: once upon a time" for number in range(count)]


@pytest.mark.slow
def test_requests_go_to_the_emptier_group_and_those_with_a_shared_prefix_to_the_same(groups: Groups) -> None:
    # A client of the first group's own fills it: the gateway sends its requests to the second.
    client = groups.clients[0]
    sampling = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    own = [Submit(id=client.new_id(), prompt="A long story", sampling=sampling) for _ in range(ROWS)]
    for submit in own:
        client.submit(submit, lambda event: None)
    groups.until(lambda: groups.held(0) == ROWS)
    # Seen by the gateway with its next look.
    labels = 'model_name="demo"'
    groups.until(lambda: f'vllm:num_requests_running{{engine="0",{labels}}} {ROWS}.0' in groups.metrics)
    streams = groups.stream(*prompts("emptier", ROWS))
    groups.until(lambda: all(streamed.begun.is_set() for streamed, _ in streams))
    assert f'phalanx:open_requests{{engine="0",{labels}}} 0.0' in groups.metrics
    assert f'phalanx:open_requests{{engine="1",{labels}}} {ROWS}.0' in groups.metrics
    for _, reading in streams:
        assert not reading.result().errors
    for submit in own:
        client.abort(submit.id)
    groups.until(lambda: groups.held(0) + groups.held(1) == 0)

    before = [groups.status(number).prefix_hits for number in range(2)]
    for number in range(6):
        groups.complete(PREFIX + str(number))
    rises = [groups.status(number).prefix_hits - before[number] for number in range(2)]
    assert sorted(rise > 0 for rise in rises) == [False, True], rises


@pytest.mark.slow
def test_a_group_is_drained_while_streams_run_and_nothing_is_lost(groups: Groups) -> None:
    asked = prompts("drained", 6)
    streams = groups.stream(*asked)
    groups.until(lambda: all(streamed.begun.is_set() for streamed, _ in streams))
    groups.until(lambda: groups.held(0) > 0 and groups.held(1) > 0)
    groups.administer("drain", 0)
    before = groups.status(0).prompt_tokens + groups.status(0).prefix_hits
    for prompt in prompts("while drained", 3):
        groups.complete(prompt)
    assert httpx.get(f"{groups.url}/health/ready").status_code == 200

    texts = [reading.result() for _, reading in streams]
    assert [streamed.errors for streamed in texts] == [[]] * 6
    status = groups.status(0)
    assert status.prompt_tokens + status.prefix_hits == before  # nothing new came
    groups.administer("resume", 0)
    assert [streamed.text for streamed in texts] == [groups.complete(prompt, TOKENS) for prompt in asked]


@pytest.mark.slow
def test_a_group_is_killed_and_all_it_had_goes_on_at_the_other(groups: Groups) -> None:
    asked = prompts("running", 2 * ROWS)
    streams = groups.stream(*asked)
    groups.until(lambda: all(streamed.begun.is_set() for streamed, _ in streams))
    waiting = groups.stream(*prompts("waiting", 6))
    groups.until(lambda: groups.status(1).waiting > 0)
    assert groups.held(1) > 0
    groups.kill(1)

    ended = [reading.result() for _, reading in [*streams, *waiting]]
    assert [streamed.errors for streamed in ended] == [[]] * (2 * ROWS + 6)
    assert [streamed.text for streamed in ended[:2]] == [groups.complete(prompt, TOKENS) for prompt in asked[:2]]
    assert httpx.get(f"{groups.url}/health/ready").status_code == 200
    assert groups.complete("goes on")

    groups.kill(0)
    groups.until(lambda: httpx.get(f"{groups.url}/health/ready").status_code == 503)
    groups.until(lambda: len(re.findall(r'phase="stopped"} 1.0', groups.metrics)) == 2)
    refused = httpx.post(f"{groups.url}/v1/completions", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopped")
    assert httpx.get(f"{groups.url}/health/live").status_code == 200


@pytest.mark.slow
def test_both_groups_are_killed_and_all_they_had_goes_on_at_one_that_is_started_again(
    groups: Groups, smollm2: Path
) -> None:
    asked = prompts("running", 2 * ROWS)
    streams = groups.stream(*asked)
    groups.until(lambda: all(streamed.begun.is_set() for streamed, _ in streams))
    waiting = groups.stream(*prompts("waiting", 6))
    groups.until(lambda: groups.status(1).waiting > 0)
    groups.kill(0)
    groups.kill(1)
    with running("worker", f"model={smollm2}", f"endpoint={groups.addresses[1]}", *OPTIONS):
        ended = [reading.result() for _, reading in [*streams, *waiting]]
        assert [streamed.errors for streamed in ended] == [[]] * (2 * ROWS + 6)
        assert [streamed.text for streamed in ended[:2]] == [groups.complete(prompt, TOKENS) for prompt in asked[:2]]
