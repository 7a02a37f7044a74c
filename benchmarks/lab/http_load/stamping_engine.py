"""An engine without a model, whose tokens say when they were sent: what a gateway adds is seen at the client.

    python benchmarks/lab/http_load/stamping_engine.py ADDRESS STEP_S

Every STEP_S seconds each open request gets a token; with 0, one at once and then none, so that its stream stays open.
A token's text is the moment (seconds on the monotonic clock, which all processes of a machine share) and a space.
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass

from phalanx.engine.protocol.messages import (
    Abort,
    Accepted,
    Command,
    Completion,
    Delta,
    Event,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Status,
    StatusRequest,
    Submit,
    Timings,
    Usage,
)
from phalanx.engine.protocol.transport import ZmqTransport

MODEL = "stamping"
_STATUS = Status(
    ready=True, ranks=1, max_model_len=4096, max_num_seqs=4096, block_size=16, total_blocks=1, free_blocks=1, running=0,
    waiting=0, steps=0, preemptions=0, prefix_hits=0, peak_memory=[0], report=[],
)  # fmt: skip
_INFO = ModelInfo(
    version="0", model=MODEL, dtype="float32", ranks=1, max_model_len=4096, max_num_seqs=4096, block_size=16,
    total_blocks=1, vocab_size=1000, eos_token_ids=[0], tokenizer_class=None, chat_template=None, prefix_cache=False,
    report=[],
)  # fmt: skip


@dataclass
class _Open:
    """One request under way."""

    client: bytes
    id: str
    tokens: int
    made: int = 0


class StampingEngine:
    """Serves clients until its process ends."""

    def __init__(self, address: str, step_s: float) -> None:
        self._step_s = step_s
        self._lock = threading.Lock()
        self._open: dict[str, _Open] = {}
        self._transport = ZmqTransport(address, None)
        self._transport.start(self._on_command)

    def run(self) -> None:
        """Make tokens until the process is ended."""
        while True:
            time.sleep(self._step_s or 60.0)
            if self._step_s:
                self._step()

    def _step(self) -> None:
        # As an engine does: what a step brought a client goes as one message.
        with self._lock:
            events: dict[bytes, list[Event]] = {}
            for request in list(self._open.values()):
                events.setdefault(request.client, []).extend(self._token(request))
        for client, some in events.items():
            self._transport.send(client, *some)

    def _token(self, request: _Open) -> list[Event]:
        made: list[Event] = [Delta(request.id, 0, f"{time.monotonic():.6f} ", [1], None, request.made)]
        request.made += 1
        if request.made == request.tokens:
            del self._open[request.id]
            made.append(_finished(request, "length"))
        return made

    def _on_command(self, client: bytes, command: Command) -> None:
        if isinstance(command, StatusRequest):
            self._transport.send(client, _STATUS)
        elif isinstance(command, ModelInfoRequest):
            self._transport.send(client, _INFO)
        elif isinstance(command, Submit):
            tokens = command.sampling.max_tokens or 16
            request = _Open(client, command.id, tokens)
            events: list[Event] = [Accepted(id=command.id, prompt_tokens=1, seed=1, max_tokens=tokens)]
            with self._lock:
                self._open[command.id] = request
                if not self._step_s:
                    events += self._token(request)
            self._transport.send(client, *events)
        elif isinstance(command, Abort):
            with self._lock:
                ended = self._open.pop(command.id, None)
            if ended is not None:
                self._transport.send(client, _finished(ended, "abort"))


def _finished(request: _Open, reason: str) -> Finished:
    timings = Timings(queued_s=0.0, ttft_s=0.0, tpot_ms=0.0, total_s=0.0)
    return Finished(request.id, [Completion(0, reason)], Usage(1, request.made), timings)


if __name__ == "__main__":
    StampingEngine(sys.argv[1], float(sys.argv[2])).run()
