"""A gateway with a journal in front of an engine that answers when a test says so."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from phalanx.engine.protocol.messages import Accepted, Completion, Delta, Event, Finished, Submit, Timings, Usage
from phalanx.tests.serving.fake_engine import FakeEngine, address
from phalanx.tests.serving.servers import RunningServer, running

PATIENCE_S = 180.0
KEYS = {"ann": "sk-ann-0123456789", "bob": "sk-bob-0123456789"}
COMPLETION = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 4}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": COMPLETION,
    "/v1/chat/completions": {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]},
    "/v1/responses": {"model": "fake", "input": "Hi"},
    "/v1/messages": {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]},
    "/inference/v1/generate": {"model": "fake", "token_ids": [1, 2], "sampling_params": {"max_tokens": 4}},
}


class Gate:
    """An engine that answers when it is told to, and each time with the request's seed."""

    def __init__(self, folder: Path) -> None:
        self.engine = FakeEngine(address(folder), self._answer)
        self.open = True
        self.finished: list[Submit] = []

    def _answer(self, submit: Submit) -> list[Event]:
        if not self.open:
            return [Accepted(id=submit.id, prompt_tokens=3, seed=submit.sampling.seed or 0, max_tokens=4)]
        self.finished.append(submit)
        return whole(submit)


def whole(submit: Submit) -> list[Event]:
    seed = submit.sampling.seed
    return [
        Accepted(id=submit.id, prompt_tokens=3, seed=seed or 0, max_tokens=4),
        Delta(submit.id, 0, f"seed {seed}", [1, 2]),
        Finished(submit.id, [Completion(0, "stop")], Usage(3, 2), Timings(0.1, 0.2, 5.0, 0.5)),
    ]


@contextlib.contextmanager
def gateway(folder: Path, *more: str, keys: bool = False) -> Iterator[RunningServer]:
    options = [f"engines=[{address(folder)}]", "port=0", "poll_interval_s=0.05", f"journal={folder}/journal", *more]
    with running("gateway", *options, *([f"api_keys_file={folder}/keys"] if keys else [])) as server:
        assert server.url
        yield server


def client(server: RunningServer, who: str | None = None) -> httpx.Client:
    headers = {"x-api-key": KEYS[who]} if who is not None else {}
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.02)


def kill(server: RunningServer) -> None:
    server.signal(signal.SIGKILL)
    server.process.wait()
