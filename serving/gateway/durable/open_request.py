"""One journaled request while it is computed: taken in, noted as it grows, ended."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

import msgspec

from ....engine.protocol.messages import Accepted, Event, Submit
from ...journal.entries import Entry, Request, digest_of
from ...journal.journal import Journal, KeyInUse
from ...journal.progress import ProgressNotes, digest_of_submit, resume
from ...journal.writer import JournalError, JournalFull
from ..engine_pool import OnEvent, Submits, Ticket
from ..http.errors import ApiError, unavailable

_log = logging.getLogger(__name__)


class OpenRequest:
    """Belongs to the event loop, but for the notes of its progress."""

    def __init__(
        self,
        journal: Journal,
        request: Request,
        entry: Entry | None = None,
        notes: dict[int, list[bytes]] | None = None,
    ) -> None:
        """`entry` and `notes` are what the journal has of a request that was accepted before."""
        self.request = request
        self.number = None if entry is None else entry.number
        """Its number in the journal, once it is accepted."""
        self.recovered = entry is not None
        """Whether it was accepted before, so that nobody can be told that it is refused."""
        self.background = False
        """Whether it goes on after its HTTP answer, and is ended by what computes it."""
        self.left = asyncio.Event()
        """Set when its HTTP answer is made."""
        self.ended = asyncio.Event()
        """Set when what goes on in the background has ended too."""
        self._journal = journal
        self._notes = notes or {}

    async def accept(self) -> None:
        """Return once the request is on the disk. Raises ApiError where it cannot be kept."""
        if self.number is not None:
            return
        accepted = self._journal.accept([self.request])
        try:
            [self.number] = await asyncio.shield(asyncio.wrap_future(accepted))
        except asyncio.CancelledError:
            accepted.add_done_callback(self._take_back)
            raise
        except JournalFull as error:
            raise unavailable(str(error), "journal_full") from None
        except KeyInUse:
            raise ApiError(409, "a request with this Idempotency-Key was just accepted", code="key_in_use") from None
        except JournalError as error:
            raise unavailable(f"{error}; requests with stream=true are still taken", "journal_failed") from None

    async def finish(self, status: int, answer: bytes) -> bool:
        """Keep the answer; returns once it is on the disk. Where that fails it returns False, and the log says so."""
        if self.number is None:
            return True
        try:
            first = await asyncio.shield(asyncio.wrap_future(self._journal.finish(self.number, status, answer)))
        except JournalError as error:
            _log.error("the answer of request %s is not kept: %s", self.request.name, error)
            return False
        if not first:
            _log.info("request %s was given up while it was computed: its answer is not kept", self.request.name)
        return True

    async def withdraw(self) -> None:
        """Forget the request: its caller was told that it is not computed."""
        if self.number is not None:
            try:
                await asyncio.shield(asyncio.wrap_future(self._journal.withdraw(self.number)))
            except JournalError as error:
                _log.error("request %s is not forgotten: %s", self.request.name, error)

    def around(self, submits: Submits, model: str) -> Submits:
        """`submits` with what the journal knows of this request; `model` tells what computes it."""
        return _Noted(self._journal, self, submits, self._notes, model)

    def _take_back(self, accepted: Future[list[int]]) -> None:
        """Forget a request whose caller had gone when it was accepted. On the journal's thread."""
        if accepted.exception() is None:
            for number in accepted.result():
                self._journal.withdraw(number)


class _Noted:
    """Sends each submit on from where it was, and notes how it gets on."""

    def __init__(
        self, journal: Journal, opened: OpenRequest, inner: Submits, notes: dict[int, list[bytes]], model: str
    ) -> None:
        self._journal, self._opened, self._inner, self._notes, self._model = journal, opened, inner, notes, model
        self._place = 0

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> Ticket:
        """As EnginePool.submit. The submits of a request come in the same order each time."""
        place, self._place = self._place, self._place + 1
        number = self._opened.number
        assert number is not None
        submit = seeded(submit, self._opened.request.id, place)
        digest = digest_of_submit(submit, self._model)
        notes = ProgressNotes(self._journal, lambda: number, place, digest)
        before = resume(submit, self._notes.get(place, []), digest)
        if before is not None:
            submit = before.submit
            for event in before.events:
                on_event(event)

        def noted(event: Event) -> None:
            if before is not None and isinstance(event, Accepted):
                return  # it was replayed
            notes.add(event)
            on_event(event)

        return self._inner.submit(submit, noted, affinity=affinity)


def seeded(submit: Submit, request_id: str, place: int) -> Submit:
    """The submit with a seed: its own, or one that follows from its request, so that it draws the same each time."""
    if submit.sampling.seed is not None:
        return submit
    seed = int.from_bytes(digest_of(request_id.encode(), str(place).encode())[:8], "big", signed=True)
    return msgspec.structs.replace(submit, sampling=msgspec.structs.replace(submit.sampling, seed=seed))
