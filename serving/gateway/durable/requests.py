"""Where journaled requests go: each is accepted once, computed by one task at a time, and answered once."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...journal.entries import EXPIRED, Entry, Request, digest_of
from ...journal.journal import Journal
from ...journal.writer import JournalError
from ..config import GatewayConfig
from ..generation.response_store import ResponseStore
from ..http import error_shapes
from ..http.errors import ApiError, unavailable
from ..http.exchange import BodyBudget, ClientGone, Exchange
from .answer import Answer, CollectedAnswer, Headers, exchange_of
from .keys import idempotency_key, peek
from .open_request import OpenRequest

RETRY_S = 1.0
"""Seconds until what could not be done now is tried again."""

Respond = Callable[[Exchange], Awaitable[None]]
"""A route: reads an exchange and answers it, with an error where it must; it raises nothing."""

EXPIRED_CODE = "batch_expired"
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."

_log = logging.getLogger(__name__)


@dataclass
class _Running:
    """A request with a key that a task computes."""

    digest: bytes
    task: asyncio.Task[tuple[Answer, bool]]
    """The answer, and whether it was given before."""
    waiting: int = 0
    """Connections that wait for it."""


class DurableRequests:
    """One for each gateway with a journal; used on its event loop alone."""

    def __init__(self, journal: Journal, config: GatewayConfig, bodies: BodyBudget, responses: ResponseStore) -> None:
        self.journal = journal
        self.routes: dict[str, Respond] = {}
        """By path: what a request of this kind is answered by."""
        self.open: dict[str, OpenRequest] = {}
        """By id: what is being computed."""
        self.left_over = asyncio.Event()
        """Set when a request that was accepted waits for somebody to compute it."""
        self.closing = False
        """Whether the process ends: what is not answered by now stays for the next one."""
        self._config, self._bodies, self._responses = config, bodies, responses
        self._running: dict[tuple[str, str], _Running] = {}
        self._given_up: set[str] = set()
        """By id: what is about to be forgotten, and must not be begun meanwhile."""

    async def serve(self, exchange: Exchange, respond: Respond) -> None:
        """Answer one request. Raises ApiError, or ClientGone."""
        exchange.take_request_id()
        body = await exchange.read_body()
        streams, name = peek(body)
        if streams:
            await respond(exchange)
            return

        path, owner, key = str(exchange.scope["path"]), exchange.owner, idempotency_key(exchange)
        if name is not None and exchange.header(b"x-request-id") is None:
            exchange.request_id = name
        request = Request(
            id=uuid.uuid4().hex,
            kind=path,
            owner=owner,
            name=exchange.request_id,
            key=key,
            salt=exchange.salted(None),
            body=body,
            digest=digest_of(path.encode(), body),
        )
        exchange.release_body()

        headers = list(exchange.scope["headers"])
        if key is None:
            task = asyncio.create_task(self._first(request, headers))
            answer, before = await _wait(exchange, task, abandon=True)
        else:
            answer, before = await self._with_key(exchange, request, (owner, key), headers)
        exchange.request_id = answer.name or exchange.request_id
        more = {"idempotency-replayed": "true"} if before else {}
        await exchange.respond(answer.body, answer.status, headers={**answer.headers, **more})

    async def compute(self, opened: OpenRequest, headers: Headers, *, waiting: Callable[[], bool]) -> Answer:
        """Have a route answer a request, and keep the answer once the request was accepted.

        `waiting` tells whether somebody hears the answer: a refusal is the end of a request then, and is otherwise
        another process's, or another time's.
        """
        collected = CollectedAnswer()
        self.open[opened.request.id] = opened
        try:
            exchange = exchange_of(opened, collected, self._config, self._bodies, headers)
            await self.routes[opened.request.kind](exchange)
            await self._conclude(opened, collected.answer, waiting)
        except asyncio.CancelledError:
            # A batch that is cancelled has forgotten its lines already, but for those that had ended.
            if not self.closing and opened.request.batch is None:
                await opened.withdraw()
            raise
        finally:
            if not opened.background:
                self.open.pop(opened.request.id, None)
            opened.left.set()
        return collected.answer

    async def _conclude(self, opened: OpenRequest, answer: Answer, waiting: Callable[[], bool]) -> None:
        if opened.number is None or opened.background or self.closing:
            return
        if not answer.is_refusal:
            # Whoever waits has the answer; of what nobody waits for the journal has it, once it can be written again.
            while not await opened.finish(answer.status, answer.body) and not waiting() and not self.closing:
                await asyncio.sleep(RETRY_S)
        elif waiting() and not opened.recovered:
            await opened.withdraw()
        else:
            self.left_over.set()

    async def end_background(self, opened: OpenRequest, answer: bytes) -> None:
        """What went on after its HTTP answer has ended."""
        try:
            while not self.closing and not await opened.finish(200, answer):
                await asyncio.sleep(RETRY_S)
        finally:
            self.open.pop(opened.request.id, None)
        opened.ended.set()

    async def give_up(self, request_id: str) -> bool:
        """Forget a request that was accepted and that nobody computes. Whether there was one."""
        if request_id in self.open:
            return False
        self._given_up.add(request_id)
        try:
            entry = await asyncio.wrap_future(self.journal.by_id(request_id))
            if entry is None or entry.finished_at is not None:
                return False
            return await asyncio.wrap_future(self.journal.withdraw(entry.number))
        except JournalError as error:
            self.left_over.set()
            raise unavailable(str(error), "journal_failed") from None
        finally:
            self._given_up.discard(request_id)

    async def opened(self, entry: Entry) -> OpenRequest | None:
        """A request that was accepted before, as it is computed again; None if it has ended, is computed or given up.

        The caller computes it at once: nobody else may begin in between. Raises JournalError.
        """
        notes = await asyncio.wrap_future(self.journal.resume(entry.number))
        if notes is None or entry.request.id in self.open or entry.request.id in self._given_up:
            return None
        return OpenRequest(self.journal, entry.request, entry, notes)

    async def _first(self, request: Request, headers: Headers) -> tuple[Answer, bool]:
        return await self.compute(OpenRequest(self.journal, request), headers, waiting=lambda: True), False

    async def _with_key(
        self, exchange: Exchange, request: Request, key: tuple[str, str], headers: Headers
    ) -> tuple[Answer, bool]:
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = _Running(
                request.digest, asyncio.create_task(self._known(request, headers, key))
            )
            running.task.add_done_callback(lambda _: self._running.pop(key, None))
        elif running.digest != request.digest:
            raise other_body()
        running.waiting += 1
        try:
            return await _wait(exchange, running.task, abandon=False)
        finally:
            running.waiting -= 1

    async def _known(self, request: Request, headers: Headers, key: tuple[str, str]) -> tuple[Answer, bool]:
        """The answer of a request with a key: as it was given before, or computed now."""
        opened: OpenRequest | None = OpenRequest(self.journal, request)
        try:
            entry = await asyncio.wrap_future(self.journal.by_key(*key))
            if entry is not None and entry.request.digest != request.digest:
                raise other_body()
            if entry is not None:
                opened = await self.opened(entry) if entry.finished_at is None else None
                if opened is None:
                    return await self._follow(entry), True
        except JournalError as error:
            raise unavailable(str(error), "journal_failed") from None
        assert opened is not None
        answer = await self.compute(opened, headers, waiting=lambda: self._running[key].waiting > 0)
        return answer, False

    async def _follow(self, entry: Entry) -> Answer:
        """The answer of a request that has ended, or that somebody else computes."""
        opened = self.open.get(entry.request.id)
        if opened is not None and not opened.background:
            await opened.left.wait()
        if opened is not None and opened.background:
            record = self._responses.get(entry.request.owner, f"resp_{entry.request.id}")
            if record is not None:
                return Answer(200, record.response, entry.request.name, {})

        found = await asyncio.wrap_future(self.journal.by_id(entry.request.id))
        if found is None or found.finished_at is None:
            raise unavailable("the request was put off; try again soon", "in_progress")
        return kept_answer(found)


def kept_answer(entry: Entry) -> Answer:
    """The answer that the journal has of a request that has ended."""
    if entry.answer is not None:
        return Answer(entry.status or 200, entry.answer, entry.request.name, {})
    if entry.status == EXPIRED:
        error = ApiError(504, EXPIRED_MESSAGE, type="timeout_error", code=EXPIRED_CODE)
    else:
        why = "the request was computed, and its answer had no room in the journal (journal_max_mb)"
        error = ApiError(500, why, type="server_error", code="answer_not_kept")
    status, body = error_shapes.whole(entry.request.kind, error, entry.request.name)
    return Answer(status, body, entry.request.name, {})


def other_body() -> ApiError:
    return ApiError(
        409,
        "another request was sent with this Idempotency-Key: its path or body differs from this one's; use a new key",
        param="Idempotency-Key",
        code="idempotency_key_reused",
    )


async def _wait(exchange: Exchange, task: asyncio.Task[tuple[Answer, bool]], *, abandon: bool) -> tuple[Answer, bool]:
    """The task's result. When the client closes its connection first, an abandoned task is cancelled."""
    gone = asyncio.create_task(exchange.wait_until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        if abandon:
            task.cancel()
