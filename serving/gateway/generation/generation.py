"""The engine's requests of one HTTP request: submitted together, followed together, ended together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ....engine.client.client import to_error
from ....engine.errors import PhalanxError
from ....engine.protocol.logprobs import TokenLogprobs
from ....engine.protocol.messages import Accepted, Delta, Event, Failed, Finished, Submit
from ..engine_pool import Submits, Ticket
from ..http.errors import ApiError
from ..http.exchange import ClientGone
from .admission import Admission
from .bridge import EventBridge

_log = logging.getLogger(__name__)

_EVENT_BYTES = 256  # about what a Delta takes beside its text


@dataclass(frozen=True)
class Limits:
    """What one HTTP request may take."""

    pending_bytes: int
    """Bytes of its answer, about, that wait to be taken."""
    too_much: str
    """What to tell who would have more of them."""
    timeout_s: float
    """Seconds until its end; 0 sets no limit."""


class Generation:
    """Submits the requests and collects their events until they are taken. Used on the event loop alone.

    `take` returns events as (index of the request, event): deltas of one completion that nobody has taken yet are one.
    """

    def __init__(
        self,
        pool: Submits,
        bridge: EventBridge,
        admission: Admission,
        limits: Limits,
        name: str,
        accept: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`accept` makes sure, before anything is sent, that what was let in is not lost."""
        self._pool, self._bridge, self._admission, self._limits = pool, bridge, admission, limits
        self._name, self._accept = name, accept
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + limits.timeout_s if limits.timeout_s else None

        self._tickets: list[Ticket | None] = []
        self._open = 0
        self._admitted = (0, 0)
        self._pending: list[tuple[int, Event]] = []
        self._pending_bytes = 0
        self._waiter: asyncio.Future[bool] | None = None
        self._error: Exception | None = None
        self._closed = False

    def admit(self, requests: int, tokens: int) -> None:
        """Let in so many requests, of about so many prompt tokens together. Raises ApiError where there is no room."""
        self._admission.enter(requests, tokens)
        self._admitted = (requests, tokens)

    async def start(self, submits: Sequence[Submit], affinity: bytes = b"") -> None:
        """Send the requests that were let in. Raises ApiError, PhalanxError or ClientGone; none is open then."""
        try:
            if self._accept is not None:
                await self._accept()
                self._check()  # the client may have gone meanwhile
            for number, submit in enumerate(submits):
                self._tickets.append(None)
                self._open += 1
                try:
                    self._tickets[number] = self._pool.submit(submit, self._receiver(number), affinity=affinity)
                except BaseException:
                    self._open -= 1
                    raise
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> bool:
        """Whether every request has ended and every event was taken."""
        return not self._open and not self._pending and self._error is None

    async def take(self, timeout_s: float | None = None) -> list[tuple[int, Event]]:
        """The events since the last call, at least one; an empty list after `timeout_s` seconds without any.

        Raises ApiError or PhalanxError if a request failed or the deadline passed, ClientGone after `abandon`.
        """
        while not self._pending:
            self._check()
            now = self._loop.time()
            wait = timeout_s
            if self._deadline is not None:
                left = self._deadline - now
                wait = left if wait is None else min(wait, left)
            if not await self._wait(wait) and not self._deadline_passed():
                return []
        if isinstance(self._error, ClientGone):
            raise self._error
        pending, self._pending = self._pending, []
        self._pending_bytes = 0
        return _merged(pending) if len(pending) > 1 else pending

    async def take_all(self) -> list[tuple[int, Event]]:
        """Every event, when all requests have ended. Raises as `take` does."""
        while self._open or self._error is not None:
            self._check()
            await self._wait(None if self._deadline is None else self._deadline - self._loop.time())
        return await self.take()

    def abandon(self) -> None:
        """The client has gone: end everything, and let the taker know."""
        self._fail(ClientGone())

    def close(self) -> None:
        """Abort what has not ended, and make room for others. May be called again."""
        # The last events still come: nobody takes them.
        self._closed = True
        for ticket in self._tickets:
            if ticket is not None:
                ticket.abort()
        self._tickets = []
        self._pending, self._pending_bytes = [], 0
        requests, tokens = self._admitted
        self._admitted = (0, 0)
        if requests:
            self._admission.leave(requests, tokens)

    def _receiver(self, number: int) -> Callable[[Event], None]:
        def push(event: Event) -> None:
            try:
                self._push(number, event)
            except Exception as error:
                # What cannot be taken in ends the request: its taker would wait for an end that was lost.
                self._fail(error)

        deliver = self._bridge.deliver
        return lambda event: deliver(push, event)

    def _push(self, number: int, event: Event) -> None:
        if self._closed:
            return
        if isinstance(event, Failed):
            self._open -= 1
            self._end(number)
            # What was computed before is delivered; with nothing of it the failure is the whole answer.
            computed = [item for item in self._pending if not isinstance(item[1], Accepted)]
            self._fail(to_error(event))
            self._pending = computed
            return
        if isinstance(event, Finished):
            self._open -= 1
            self._end(number)

        self._pending.append((number, event))
        self._pending_bytes += _size(event)
        if self._pending_bytes > self._limits.pending_bytes and not self._compact():
            self._refuse_slow_reader()
        else:
            self._wake()

    def _compact(self) -> bool:
        """Make few events of many. Whether that has freed half of the room: else it would soon be done again."""
        self._pending = _merged(self._pending)
        self._pending_bytes = sum(_size(event) for _, event in self._pending)
        return self._pending_bytes <= self._limits.pending_bytes // 2

    def _end(self, number: int) -> None:
        if number < len(self._tickets):
            self._tickets[number] = None

    def _refuse_slow_reader(self) -> None:
        _log.warning("request %s was aborted: %s", self._name, self._limits.too_much)
        self._fail(ApiError(400, self._limits.too_much, code="answer_too_large"))

    def _fail(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
            self.close()
        self._wake()

    def _check(self) -> None:
        if self._deadline_passed() and self._error is None and not self.finished:
            limit = f"{self._limits.timeout_s:g} s"
            self._error = ApiError(
                504, f"the request was not finished within {limit}", type="timeout_error", code="request_timeout"
            )
            self.close()
        if isinstance(self._error, PhalanxError):
            # A new one each time: one that is raised again and again would grow its traceback.
            raise type(self._error)(*self._error.args)
        if self._error is not None:
            raise self._error

    def _deadline_passed(self) -> bool:
        return self._deadline is not None and self._loop.time() >= self._deadline

    async def _wait(self, timeout_s: float | None) -> bool:
        """Whether something happened within the time."""
        self._waiter = waiter = self._loop.create_future()
        timer = None if timeout_s is None else self._loop.call_later(max(timeout_s, 0.0), _resolve, waiter, False)
        try:
            return bool(await waiter)
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None:
            _resolve(self._waiter, True)


def _resolve(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)


def _size(event: Event) -> int:
    """About the bytes of memory that an event takes."""
    if not isinstance(event, Delta):
        return _EVENT_BYTES
    size = _EVENT_BYTES + len(event.text) + len(event.reasoning) + 8 * len(event.token_ids)
    if event.logprobs:
        size += sum(160 + 96 * len(entry.top_token_ids) for entry in event.logprobs)
    return size


def _merged(events: list[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """The same events with all deltas of a completion as one, where the first of them was."""
    merged: list[tuple[int, Event]] = []
    deltas: dict[tuple[int, int], list[Delta]] = {}
    for number, event in events:
        if not isinstance(event, Delta):
            merged.append((number, event))
            continue
        same = deltas.setdefault((number, event.index), [])
        if not same:
            merged.append((number, event))
        same.append(event)

    for position, (number, event) in enumerate(merged):
        if isinstance(event, Delta) and len(same := deltas[number, event.index]) > 1:
            merged[position] = (number, _join(same))
    return merged


def _join(deltas: list[Delta]) -> Delta:
    first = deltas[0]
    token_ids = [token for delta in deltas for token in delta.token_ids]
    logprobs: list[TokenLogprobs] | None = None
    if any(delta.logprobs is not None for delta in deltas):
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    text = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return Delta(first.id, first.index, text, token_ids, logprobs, first.position, reasoning)
