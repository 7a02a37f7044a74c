"""An engine without a model: it serves clients over ZeroMQ as a real one does, and a test says what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from phalanx.engine.protocol.messages import (
    Abort,
    Accepted,
    Command,
    Completion,
    Delta,
    Detokenize,
    Detokenized,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Status,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Tokenized,
    Usage,
)
from phalanx.engine.protocol.transport import ZmqTransport

Answer = Callable[[Submit], list[Event]]


def status(**changes: object) -> Status:
    """A Status of an idle engine, but for `changes`."""
    values: dict[str, object] = {
        "ready": True, "ranks": 2, "max_model_len": 128, "max_num_seqs": 8, "block_size": 16, "total_blocks": 100,
        "free_blocks": 75, "running": 0, "waiting": 0, "steps": 0, "preemptions": 0, "prefix_hits": 0,
        "peak_memory": [1000, 2000], "report": ["a fake"], **changes,
    }  # fmt: skip
    return Status(**values)  # type: ignore[arg-type]


def model_info(**changes: object) -> ModelInfo:
    """The ModelInfo of a fake engine, but for `changes`."""
    values: dict[str, object] = {
        "version": "0", "model": "organisation/fake", "dtype": "float32", "ranks": 2, "max_model_len": 128,
        "max_num_seqs": 8, "block_size": 16, "total_blocks": 100, "vocab_size": 1000, "eos_token_ids": [0],
        "tokenizer_class": None, "chat_template": None, "prefix_cache": True, "report": [], **changes,
    }  # fmt: skip
    return ModelInfo(**values)  # type: ignore[arg-type]


def finished(request_id: str, reason: str = "stop", tokens: int = 2) -> Finished:
    """The end of an answer."""
    return Finished(
        request_id,
        [Completion(0, reason)],
        Usage(3, tokens),
        Timings(queued_s=0.1, ttft_s=0.2, tpot_ms=5.0, total_s=0.5),
    )


def two_tokens(submit: Submit) -> list[Event]:
    """A whole answer."""
    return [
        Accepted(id=submit.id, prompt_tokens=3, seed=1, max_tokens=2),
        Delta(submit.id, 0, "one", [1]),
        Delta(submit.id, 0, " two", [2], position=1),
        finished(submit.id),
    ]


class FakeEngine:
    """Serves at an address until it is closed. What it answers may be changed at any time."""

    def __init__(self, address: str, answer: Answer = two_tokens) -> None:
        self.address = address
        self.answer = answer
        self.status: Status | None = status()
        """None: it says nothing of itself, though its process lives."""
        self.info = model_info()
        self.requests: list[Submit] = []
        self.aborted: list[str] = []
        self._clients: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._transport = ZmqTransport(address, None)
        self._transport.start(self._on_command)

    def send(self, *events: Event) -> None:
        """Send events of a request to the client that it came from."""
        with self._lock:
            for event in events:
                assert not isinstance(event, Status | ModelInfo)
                self._transport.send(self._clients[event.id], event)

    def close(self) -> None:
        """End it, as a killed engine does: without a word to its clients."""
        self._transport.close()

    def _on_command(self, client: bytes, command: Command) -> None:
        with self._lock:
            if isinstance(command, StatusRequest):
                if self.status is not None:
                    self._transport.send(client, self.status)
            elif isinstance(command, ModelInfoRequest):
                self._transport.send(client, self.info)
            elif isinstance(command, Submit):
                self._clients[command.id] = client
                self.requests.append(command)
                self._transport.send(client, *self.answer(command))
            elif isinstance(command, Abort):
                self.aborted.append(command.id)
                self._transport.send(client, finished(command.id, "abort", 0))
            elif isinstance(command, Tokenize):
                self._transport.send(client, Tokenized(id=command.id, token_ids=[1], text="a", token_bytes=[b"a"]))
            elif isinstance(command, Detokenize):
                if command.token_ids:
                    self._transport.send(client, Detokenized(id=command.id, text="a"))
                else:
                    self._transport.send(client, Failed(command.id, "InvalidRequest", "token_ids is empty"))


def address(folder: Path, number: int = 0) -> str:
    """An address for an engine in a folder."""
    return f"ipc://{folder}/engine{number}"
