"""What a process that died has left: computed again, a bounded number at a time, each once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ...journal.entries import Entry
from ...journal.writer import JournalError
from ..config import GatewayConfig
from ..engine_pool import EnginePool
from ..http import error_shapes
from ..http.errors import ApiError
from ..logs import log_fields
from .requests import RETRY_S, DurableRequests

MOST_ATTEMPTS = 10
"""Processes that may die over a request, without any progress of it, before it is given up."""
SHARE = 4
"""What is recovered takes at most one part in so many of max_open_requests: those who wait now have the rest."""
LOOK_S = 0.2
"""Seconds between two looks at whether an engine takes requests."""
PRUNE_S = 60.0
"""Seconds between two looks at what may be forgotten."""

_log = logging.getLogger(__name__)


class Recovery:
    """Two tasks of the gateway's event loop: one computes what was left over, the other forgets old answers."""

    def __init__(self, requests: DurableRequests, pool: EnginePool, config: GatewayConfig) -> None:
        self._requests, self._pool = requests, pool
        self._most = max(1, config.max_open_requests // SHARE)
        self._under_way: dict[asyncio.Task[None], str | None] = {}
        """What is being computed, and the batch that each is of."""
        self._counted: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self.recovered = 0
        """Requests of an earlier process that were answered."""

    def start(self, prune: Callable[[], Awaitable[None]]) -> None:
        """Begin, on the event loop. `prune` forgets files and batches that are old; it may raise ApiError."""
        if self._requests.journal.size.unfinished:
            self._requests.left_over.set()
            _log.info(
                "requests were accepted and not answered by an earlier process: they are computed now",
                extra=log_fields(requests=self._requests.journal.size.unfinished),
            )
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._prune(prune))]

    def stop(self) -> None:
        """Begin nothing more. What is under way ends with its engine, and stays for the next process."""
        self._requests.closing = True
        for task in self._tasks:
            task.cancel()

    async def abort(self, batch: str) -> None:
        """End what is being computed of a batch, in its engine too; returns once it has ended."""
        tasks = [task for task, of in self._under_way.items() if of == batch]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self) -> None:
        while True:
            await self._requests.left_over.wait()
            self._requests.left_over.clear()
            try:
                await self._pass()
            except JournalError as error:
                _log.error("what was left over cannot be read: %s", error)
                self._requests.left_over.set()
            if self._requests.left_over.is_set():
                await asyncio.sleep(RETRY_S)

    async def _pass(self) -> None:
        """Begin everything that has not ended and that nobody computes, in the order in which it was accepted."""
        journal, after = self._requests.journal, 0
        while True:
            while not self._pool.ready() or len(self._under_way) >= self._most:
                await self._one_ends()
            room = self._most - len(self._under_way)
            entries = await asyncio.wrap_future(journal.unfinished(after, room))
            if not entries:
                return
            after = entries[-1].number
            for entry in entries:
                if entry.request.id not in self._requests.open:
                    task = asyncio.create_task(self._compute(entry))
                    self._under_way[task] = entry.request.batch
                    task.add_done_callback(self._under_way.pop)

    async def _one_ends(self) -> None:
        """Wait until a request has ended, or a little."""
        if self._under_way and self._pool.ready():
            await asyncio.wait(self._under_way, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(LOOK_S)

    async def _compute(self, entry: Entry) -> None:
        requests = self._requests
        try:
            if entry.number not in self._counted:
                self._counted.add(entry.number)
                attempts = await asyncio.wrap_future(requests.journal.attempt(entry.number))
                if attempts > MOST_ATTEMPTS:
                    why = f"{MOST_ATTEMPTS} processes have ended while they computed this request, which never got on"
                    await self._give_up(entry, why)
                    return
            opened = await requests.opened(entry)
            if opened is None:  # its caller came back meanwhile, or gave it up
                return
            answer = await requests.compute(opened, [], waiting=lambda: False)
            if opened.background:
                await opened.ended.wait()
            if not requests.closing and not answer.is_refusal:
                self._counted.discard(entry.number)
                self.recovered += 1
        except JournalError as error:
            if not requests.closing:
                _log.error("request %s cannot be recovered: %s", entry.request.name, error)
                requests.left_over.set()
        except asyncio.CancelledError:
            self._counted.discard(entry.number)
            raise
        except Exception:
            # A defect of ours, which a second try would meet again: whoever waits for the answer hears of it now.
            _log.exception("request %s cannot be recovered", entry.request.name)
            await self._give_up(entry, "this request could not be taken up again after a restart")

    async def _give_up(self, entry: Entry, why: str) -> None:
        error = ApiError(500, why, type="server_error", code="given_up")
        status, body = error_shapes.whole(entry.request.kind, error, entry.request.name)
        _log.error("request %s is given up: %s", entry.request.name, why)
        try:
            await asyncio.wrap_future(self._requests.journal.finish(entry.number, status, body))
        except JournalError:
            _log.exception("that cannot be written down; it is tried again")
            self._requests.left_over.set()

    async def _prune(self, prune: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(PRUNE_S)
            try:
                await asyncio.wrap_future(self._requests.journal.prune())
                await prune()
            except (JournalError, ApiError) as error:
                _log.error("nothing old is forgotten: %s", error)
