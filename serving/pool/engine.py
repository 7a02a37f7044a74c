"""One engine behind the gateway: its client, what it says of itself, and whether it takes requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Literal

from ...engine.client.client import Client, Question, to_error
from ...engine.errors import EngineStopped, PhalanxError, Timeout
from ...engine.protocol.messages import Event, Failed, ModelInfo, ModelInfoRequest, Status, StatusRequest
from .config import PoolConfig

Phase = Literal["loading", "ready", "draining", "stopped"]

LOOK_S = 0.5
"""Seconds between two looks at whether an engine that owes an answer is started again."""
FRESH_S = 0.1
"""Seconds for which what an engine has said is as good as new."""
REFRESH_S = 0.5
"""Longest time in seconds that somebody waits for what an engine says now; what it said last serves then."""

_log = logging.getLogger(__name__)


class PooledEngine:
    """One engine. Everything here runs on the event loop; the client's own threads only bring its events there."""

    def __init__(self, label: str, name: str, config: PoolConfig) -> None:
        """`label` is its number, from 0; `name` is what people call it: its address."""
        self.label = label
        self.name = name
        self.status: Status | None = None
        self.info: ModelInfo | None = None
        self.failure: PhalanxError | None = None
        """Why its client is closed for good."""
        self.open_requests = 0
        self.sent = 0
        """Requests sent since the start."""
        self.draining = False

        self._config = config
        self._client: Client | None = None
        self._outlook: Callable[[], str] = str
        self._supervised = False
        self._why_stopped: str | None = None
        self._unfit: str | None = None
        self._answered_at = 0.0
        self._others = 0  # requests of other clients, when it answered last
        self._wake = asyncio.Event()
        self._polled = asyncio.Event()
        """Set, and replaced, when it has answered or failed to."""
        self._polling: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def client(self) -> Client:
        """Its client. Raises EngineStopped while there is none."""
        if self._client is None:
            raise EngineStopped(f"engine {self.name} is loading")
        return self._client

    @property
    def phase(self) -> Phase:
        """What it does now."""
        if self._why_stopped is not None or self._unfit is not None:
            return "stopped"
        if self.info is None:
            return "loading"
        return "draining" if self.draining else "ready"

    @property
    def trouble(self) -> str:
        """A sentence: why it is stopped, or why nothing sent to it would be computed now. Empty while all is well."""
        why = self._unfit or self._why_stopped
        if why is not None:
            return why
        if self.status is None or self.info is None:
            return f"engine {self.name} is loading"
        if outlook := self._outlook():
            return f"engine {self.name}: {outlook}"
        if self._client is not None and self._client.silent:
            return f"engine {self.name} has ended, was cut off, or does not answer"
        silent = time.monotonic() - self._answered_at
        if silent > self._config.answer_timeout_s + self._config.poll_interval_s:
            return f"engine {self.name} has not answered for {silent:.0f} s"
        # A supervisor knows better: its limit follows the steps that the engine takes, and what it finds is restarted.
        if not self._supervised and self.status.stalled_s > self._config.stall_timeout_s:
            return f"engine {self.name} has work, but has finished no step for {self.status.stalled_s:.0f} s"
        return ""

    @property
    def load(self) -> float:
        """Requests that it has, as a share of those that it computes at once; above 1 some wait."""
        rows = self.status.max_num_seqs if self.status is not None else 1
        return (self.open_requests + self._others) / max(1, rows)

    def start(
        self, client: Client, on_change: Callable[[PooledEngine], None], outlook: Callable[[], str] | None = None
    ) -> None:
        """Begin to watch the engine at the other end of `client`; `on_change` hears of it when its phase changes.

        `outlook` says what its supervisor, if it has one, knows of its trouble; nothing while all is well.
        """
        self._client = client
        self._supervised = outlook is not None
        self._outlook = outlook or str
        self._polling = asyncio.get_running_loop().create_task(self._poll(on_change), name=f"poll {self.name}")

    def fail(self, error: PhalanxError) -> None:
        """Count it out for good: it could not be started."""
        self.failure = error
        self._why_stopped = str(error)

    def refuse(self, why: str) -> None:
        """Count it out, whatever it answers: it is not the engine that the gateway needs."""
        self._unfit = why

    def lost(self, why: str) -> None:
        """Count it out until it answers again: a request of it ended with EngineStopped."""
        if self._why_stopped is None:
            self._why_stopped = why
        self._wake.set()

    async def ask(self, question: Question, timeout_s: float) -> Event:
        """Return the answer. Raises Timeout, or the error of a Failed, or EngineStopped.

        A question about text waits for an engine that is started again, as requests do; one about the engine does not.
        """
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Event] = loop.create_future()

        def settle(event: Event) -> None:
            if not answered.done():
                answered.set_result(event)

        def on_answer(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, event)

        client = self.client
        client.ask(question, on_answer)
        try:
            event = await self._answer(question, answered, timeout_s)
        finally:
            client.forget(question, on_answer)
        if isinstance(event, Failed):
            raise to_error(event)
        return event

    async def refresh(self) -> None:
        """Have it say how it is, in time before the next look; returns when it has, or soon. Never raises."""
        if self._polling is None or self._polling.done() or time.monotonic() - self._answered_at < FRESH_S:
            return
        polled = self._polled
        self._wake.set()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(polled.wait(), REFRESH_S)

    async def _answer(self, question: Question, answered: asyncio.Future[Event], timeout_s: float) -> Event:
        about_itself = isinstance(question, StatusRequest | ModelInfoRequest)
        left, silence_left = timeout_s, self._config.restart_wait_s
        while left > 0:
            waits_s = min(left, LOOK_S)
            if (await asyncio.wait([answered], timeout=waits_s))[0]:
                return answered.result()
            if not about_itself and self._outlook():
                left = timeout_s
            elif not about_itself and self.trouble and silence_left > 0:
                left, silence_left = timeout_s, silence_left - waits_s
            else:
                left -= waits_s
        raise Timeout(f"engine {self.name} has not answered within {timeout_s:g} s")

    async def stop(self) -> None:
        """End the polling and the client."""
        # wait_for() may miss a cancellation that comes with its result (github.com/python/cpython/issues/86296).
        self._stopping = True
        self._wake.set()
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait([self._polling])
        if self._client is not None:
            error = EngineStopped("the server was stopped before the request had finished")
            await asyncio.to_thread(self._client.leave, error)

    async def _poll(self, on_change: Callable[[PooledEngine], None]) -> None:
        """Ask for its Status again and again, until its client is closed for good."""
        while self.failure is None and not self._stopping:
            phase = self.phase
            self._wake.clear()
            try:
                await self._ask_how_it_is()
            except Timeout:
                # What is started again takes requests meanwhile: they wait for it with those that it had.
                if self.info is not None and self._why_stopped is None and not self._outlook():
                    self._why_stopped = self.trouble or f"engine {self.name} does not answer"
            except PhalanxError as error:
                self._why_stopped = str(error)
                self.failure = _closed_for_good(self.client)
            if self.phase != phase:
                _log.info("engine %s is %s%s", self.name, self.phase, f": {self.trouble}" if self.trouble else "")
            on_change(self)
            self._polled.set()
            self._polled = asyncio.Event()

            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._config.poll_interval_s)

    async def _ask_how_it_is(self) -> None:
        status = await self.ask(StatusRequest(), self._config.answer_timeout_s)
        assert isinstance(status, Status)
        # Whoever answers after a stop may be another engine at the same address, with another model.
        if self.info is None or self._why_stopped is not None:
            info = await self.ask(ModelInfoRequest(), self._config.answer_timeout_s)
            assert isinstance(info, ModelInfo)
            self.info = info
            self._unfit = None
        self.status = status
        self._why_stopped = None
        self._answered_at = time.monotonic()
        self._others = max(0, status.running + status.waiting - self.open_requests)


def _closed_for_good(client: Client) -> PhalanxError | None:
    """Return the error with which a client refuses everything, as one of our own group does once that has ended."""
    try:
        client.check_open()
    except PhalanxError as error:
        return error
    return None
