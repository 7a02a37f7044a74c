"""A connection that loses nothing: when another engine answers at its address, it goes on where the one before ended.

Each request is kept with what was delivered of it (delivered.py), and sent to the next engine under an id of its own.
So an event that belongs to an earlier sending is known by its id, and dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from ...errors import CapacityExceeded, EngineFault, EngineStopped, InvalidRequest
from ...protocol.messages import (
    Abort,
    Command,
    Completion,
    Delta,
    Detokenize,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Shutdown,
    Status,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Usage,
)
from ...protocol.transport import Connection, NeverHeard, OnBroken, OnEvent, OnLost
from .delivered import Delivered
from .suspects import Suspects
from .timers import Timer, Timers

RETRY_S = 0.2
"""Seconds until a request that the next engine had no room for is sent again."""

Sent = Submit | Tokenize | Detokenize


def _ignore(_: object) -> None:
    return


@dataclass
class _Kept:
    """A request that has not ended."""

    command: Sent
    delivered: Delivered | None
    """None of a question."""
    wire_id: str = ""
    """The id under which it was sent last; empty while it is held back."""
    sendings: int = 0
    aborted: bool = False
    words: list[str] = field(default_factory=list)
    """What engines said when they failed it."""


class ResumingConnection(Connection):
    """Sends what an engine had not finished to the engine that follows it at the same address.

    While there is none, requests wait. With `wait_s` they fail, with EngineStopped, once the engine has been silent for
    so many seconds more than it takes to notice; otherwise whoever owns the engine says when it is gone for good.

    A request of which engines die again and again fails with EngineFault (suspects.py); the others go on.
    """

    def __init__(
        self, inner: Connection, wait_s: float | None = None, killed_from_outside: Callable[[], bool] = lambda: False
    ) -> None:
        """`killed_from_outside` tells, of the engine that died last, whether no request can be to blame."""
        self._inner = inner
        self._wait_s = wait_s
        self._killed_from_outside = killed_from_outside
        self._lock = threading.RLock()
        self._kept: dict[str, _Kept] = {}
        """By the client's id, in the order in which they came."""
        self._by_wire_id: dict[str, str] = {}
        self._suspects = Suspects()
        self._asked: dict[type[Event], StatusRequest | ModelInfoRequest] = {}
        self._epoch = ""
        self._leaving = False
        self._timers = Timers("phalanx-resume")
        self._deadline: Timer | None = None
        self._on_event: OnEvent = lambda event: None
        self._on_lost: OnLost = lambda error: None

    @property
    def epoch(self) -> str:
        """The engine's that answered last."""
        return self._inner.epoch

    @property
    def silent(self) -> bool:
        """False: what is sent while the engine does not answer waits for another."""
        return False

    def start(
        self, on_event: OnEvent, on_lost: OnLost, on_broken: OnBroken = _ignore, on_silent: OnLost | None = None
    ) -> None:
        """Begin to deliver events. `on_lost` hears of requests for which no engine came in time."""
        self._on_event = on_event
        self._on_lost = on_lost
        self._timers.start()
        self._inner.start(self._arrived, self._replaced, on_broken, self._silent)

    def send(self, command: Command) -> None:
        """Send a command, or keep it until there is an engine to send it to. Raises InvalidRequest."""
        if isinstance(command, Submit | Tokenize | Detokenize):
            self._keep(command)
            return
        with self._lock:
            if isinstance(command, Abort):
                self._abort(command)
                return
            if isinstance(command, Shutdown):
                self._leaving = True
            elif isinstance(command, StatusRequest | ModelInfoRequest):
                self._asked[Status if isinstance(command, StatusRequest) else ModelInfo] = command
        self._inner.send(command)

    def close(self) -> None:
        """Stop; nothing arrives afterwards."""
        with self._lock:
            self._leaving = True
            self._kept.clear()
            self._by_wire_id.clear()
        self._timers.close()
        self._inner.close()

    # ---- what the client sends

    def _keep(self, command: Sent) -> None:
        kept = _Kept(command, Delivered(command) if isinstance(command, Submit) else None)
        with self._lock:
            self._kept[command.id] = kept
            if self._inner.silent:  # which was told before: nobody will tell of it again
                self._wait_for_another(EngineStopped("the engine does not answer any more"))
            if self._suspects.isolating and kept.delivered is not None:
                return
            first = self._prepare(command.id, kept)
        try:
            # Without the lock: to encode megabytes takes a while, and events of others arrive meanwhile.
            self._inner.send(first)
        except BaseException:
            with self._lock:
                self._forget(command.id)
            raise
        with self._lock:
            if kept.wire_id != first.id:  # the engine was replaced meanwhile, and the next one may have it twice
                self._inner.send(Abort(first.id))

    def _send(self, request_id: str, kept: _Kept) -> None:
        """Send a request again, or for the first time if it was held back. The lock is held."""
        try:
            self._inner.send(self._prepare(request_id, kept))
        except InvalidRequest as error:  # with what was delivered it is longer than a message may be
            failed = Failed(request_id, InvalidRequest.__name__, str(error))
            self._timers.after(0.0, lambda: self._end(request_id, kept, failed))

    def _prepare(self, request_id: str, kept: _Kept) -> Sent:
        """Return what is to be sent of a request to the engine that answers now. The lock is held."""
        command = kept.command
        # The first sending, as almost all are, needs no other id.
        kept.wire_id = f"{request_id}~{kept.sendings}" if kept.sendings else request_id
        if isinstance(command, Submit) and kept.delivered is not None and kept.sendings:
            command = kept.delivered.resubmit(kept.wire_id)
        elif kept.sendings:
            command = msgspec.structs.replace(command, id=kept.wire_id)
        kept.sendings += 1
        self._by_wire_id[kept.wire_id] = request_id
        return command

    def _abort(self, command: Abort) -> None:
        """Pass an abort on, or end a request that is at no engine. The lock is held."""
        kept = self._kept.get(command.id)
        if kept is None:
            return
        kept.aborted = True
        if kept.wire_id:
            self._inner.send(Abort(kept.wire_id))
        else:
            self._timers.after(0.0, lambda: self._end(command.id, kept, _aborted(command.id, kept)))

    def _forget(self, request_id: str) -> None:
        """A request has ended. The lock is held."""
        kept = self._kept.pop(request_id, None)
        if kept is not None:
            self._by_wire_id.pop(kept.wire_id, None)
            if self._suspects.forget(request_id):
                self._send_held()

    # ---- the inner connection's thread

    def _arrived(self, event: Event) -> None:
        with self._lock:
            self._epoch = self._epoch or self._inner.epoch
            self._heard()
            if isinstance(event, Status | ModelInfo):
                self._asked.pop(type(event), None)
            else:
                request_id = self._by_wire_id.get(event.id)
                kept = self._kept.get(request_id) if request_id is not None else None
                if request_id is None or kept is None or not self._take_in(request_id, kept, event):
                    return
                if event.id != request_id:
                    event = msgspec.structs.replace(event, id=request_id)
        self._on_event(event)

    def _take_in(self, request_id: str, kept: _Kept, event: Event) -> bool:
        """Whether the client gets to see a request's event. The lock is held."""
        if isinstance(event, Failed):
            if event.error == EngineStopped.__name__ and not self._leaving:
                kept.words.append(event.message)  # another engine will have it
                return False
            if event.error == CapacityExceeded.__name__ and kept.sendings > 1:
                self._by_wire_id.pop(kept.wire_id)
                kept.wire_id = ""
                self._timers.after(RETRY_S, lambda: self._send_again(request_id, kept))
                return False

        if isinstance(event, Delta) and kept.delivered is not None:
            if not kept.delivered.add(event):
                return False
            if event.token_ids and self._suspects.got_on(request_id):
                self._send_held()
            return True
        if kept.delivered is None or not kept.delivered.add(event) or isinstance(event, Finished | Failed):
            ends = kept.delivered is None or isinstance(event, Finished | Failed)
            if ends:
                self._forget(request_id)
            return ends
        return True

    def _replaced(self, error: EngineStopped) -> None:
        """What was under way is lost: another engine answers, or the same one under which it was aborted."""
        failed: list[Event] = []
        if self._leaving:
            self._on_lost(error)
            return
        with self._lock:
            self._heard()
            died = self._inner.epoch != self._epoch and not isinstance(error, NeverHeard)
            self._epoch = self._inner.epoch
            sent = {request_id: kept for request_id, kept in self._kept.items() if kept.wire_id}
            for kept in sent.values():
                # It may have reached the new engine already, from where it waited for one.
                self._inner.send(Abort(kept.wire_id))
                self._by_wire_id.pop(kept.wire_id)
                kept.wire_id = ""

            blamed = None
            if died and not self._killed_from_outside():
                blamed = self._suspects.died([each for each, kept in sent.items() if kept.delivered is not None])
            for request_id, kept in list(self._kept.items()):
                if request_id == blamed or (kept.aborted and not kept.wire_id):
                    failed.append(_blamed(request_id, kept) if request_id == blamed else _aborted(request_id, kept))
                    self._suspects.forget(request_id)
                    del self._kept[request_id]
            for question in self._asked.values():
                self._inner.send(question)
            self._send_held()
        for event in failed:
            self._on_event(event)

    def _send_held(self) -> None:
        """Send what waits for an engine: one suspect alone, or everything. The lock is held."""
        first = self._suspects.first()
        for request_id, kept in list(self._kept.items()):
            if not kept.wire_id and (first in (None, request_id) or kept.delivered is None):
                self._send(request_id, kept)

    def _silent(self, error: EngineStopped) -> None:
        """The engine has not answered for a while: another may come."""
        with self._lock:
            self._wait_for_another(error)

    def _wait_for_another(self, error: EngineStopped) -> None:
        """Give up what waits once no engine has come in time. The lock is held."""
        if self._wait_s is None or self._deadline is not None or self._leaving:
            return
        self._deadline = self._timers.after(self._wait_s, lambda: self._give_up(error))

    def _heard(self) -> None:
        if self._deadline is not None:
            self._timers.cancel(self._deadline)
            self._deadline = None

    # ---- the timers' thread

    def _give_up(self, error: EngineStopped) -> None:
        with self._lock:
            self._deadline = None
            if not self._inner.silent:  # it went on meanwhile
                return
            self._kept.clear()
            self._by_wire_id.clear()
            self._suspects = Suspects()
        self._on_lost(error)

    def _send_again(self, request_id: str, kept: _Kept) -> None:
        with self._lock:
            if self._kept.get(request_id) is kept and not self._leaving:
                self._send_held()

    def _end(self, request_id: str, kept: _Kept, event: Event) -> None:
        """End a request that no engine has."""
        with self._lock:
            if self._kept.get(request_id) is not kept or (kept.aborted and kept.wire_id):
                return
            self._forget(request_id)
        self._on_event(event)


def _blamed(request_id: str, kept: _Kept) -> Failed:
    words = f"; the last one said: {kept.words[-1]}" if kept.words else ""
    why = (
        "the engine died again and again while it computed this request, and is not given it any more; other requests "
        f"go on{words}"
    )
    return Failed(request_id, EngineFault.__name__, why)


def _aborted(request_id: str, kept: _Kept) -> Event:
    """Return the end of a request that was aborted while it was at no engine."""
    delivered = kept.delivered
    if delivered is None or not isinstance(kept.command, Submit):
        return Failed(request_id, EngineStopped.__name__, "the question was taken back")
    prompt_tokens = 0 if delivered.accepted is None else delivered.accepted.prompt_tokens
    completions = [Completion(index, "abort") for index in range(kept.command.sampling.n)]
    age_s = delivered.age_s
    timings = Timings(age_s, age_s, 0.0, age_s)
    return Finished(
        request_id, completions, Usage(prompt_tokens, delivered.tokens, delivered.cached_tokens or 0), timings
    )
