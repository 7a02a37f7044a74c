"""Batches over a journal: what is told of a batch follows from its requests, so that it is always right."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future

import msgspec

from ...journal.documents import Document
from ...journal.entries import EXPIRED, Entry
from ..config import GatewayConfig
from ..http.errors import ApiError, invalid
from ..schemas.journal_api.batches import BatchErrors, BatchObject, BatchRequest, FileObject, RequestCounts
from .batch_lines import read_lines
from .files import BATCH, Files, done, end_of, quota_of, unknown
from .requests import EXPIRED_CODE, EXPIRED_MESSAGE, DurableRequests, kept_answer

WINDOW_S = 86400
"""Seconds until the requests of a batch are given up."""
OUTPUT, ERRORS = "output", "errors"
_AT_ONCE = 64

_log = logging.getLogger(__name__)


class Batches:
    """One for each gateway with a journal; used on its event loop alone. Every method may raise ApiError."""

    def __init__(
        self, requests: DurableRequests, files: Files, config: GatewayConfig, abort: Callable[[str], Awaitable[None]]
    ) -> None:
        """`abort` ends what is being computed of a batch, and returns once it has ended."""
        self._requests, self._journal, self._files, self._abort = requests, requests.journal, files, abort
        self._max_body_bytes = config.max_body_bytes
        self._quota = quota_of(config, config.max_batches, "max_batches")
        self._creating = asyncio.Lock()
        self._ending: set[str] = set()
        """Batches of which something may still be computed, though nobody wants it any more."""
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- what became of batches, as files

    async def file(self, owner: str, file_id: str) -> FileObject:
        """An uploaded file, or what became of a batch's requests as one."""
        found = await self._files.find(owner, file_id)
        if found is not None:
            return found
        batch, kind = await self.batch_of_file(owner, file_id)
        size = 0
        async for line in self.lines(batch.id, kind):
            size += len(line)
        ended_at = _ended_at(batch)
        return FileObject(
            id=file_id,
            bytes=size,
            created_at=batch.created_at,
            expires_at=None if ended_at is None else end_of(ended_at, self._journal.keep_s),
            filename=f"{batch.id}_{kind}.jsonl",
            purpose="batch_output",
        )

    async def delete_file(self, owner: str, file_id: str) -> None:
        """Forget an uploaded file."""
        if not await self._files.delete(owner, file_id):
            batch, _ = await self.batch_of_file(owner, file_id)
            why = f"it is what became of {batch.id}, and is forgotten with it (journal_keep_s={self._journal.keep_s:g})"
            raise invalid(f"file_id={file_id!r} cannot be deleted: {why}", "file_id")

    async def lines(self, batch_id: str, kind: str) -> AsyncIterator[bytes]:
        """The lines of a batch's output, or of its errors, in the order of its file."""
        after = 0
        while entries := await done(self._journal.of_batch(batch_id, after, _AT_ONCE)):
            after = entries[-1].number
            for entry in entries:
                if entry.finished_at is not None and ((entry.status or 0) >= 400) == (kind == ERRORS):
                    yield _line(entry)

    async def batch_of_file(self, owner: str, file_id: str) -> tuple[BatchObject, str]:
        """(the batch that a file is of, OUTPUT or ERRORS)."""
        name, _, kind = file_id.removeprefix("file-").rpartition("-")
        if kind in (OUTPUT, ERRORS):
            document = await done(self._journal.documents.head(BATCH, owner, f"batch_{name}"))
            batch = None if document is None else await self._current(_decoded(document))
            if batch is not None and file_id in (batch.output_file_id, batch.error_file_id):
                return batch, kind
        raise unknown("file_id", file_id)

    # ---- batches

    async def create(self, owner: str, salt: str, request: BatchRequest) -> BatchObject:
        """Accept every request of a file: once this returns, each will be answered once. A wrong file fails whole."""
        file = await self._files.find(owner, request.input_file_id)
        if file is None:
            raise await self._no_input(owner, request.input_file_id)
        now = int(time.time())
        batch = BatchObject(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            status="in_progress",
            created_at=now,
            expires_at=now + WINDOW_S,
            request_counts=RequestCounts(total=0),
            metadata=request.metadata,
        )
        # One at a time: a file is held as a whole until its requests are on the disk.
        async with self._creating:
            await self._accept(owner, salt, batch)
        return batch

    async def batch(self, owner: str, batch_id: str) -> BatchObject:
        """A batch as it is now."""
        document = await done(self._journal.documents.head(BATCH, owner, batch_id))
        if document is None:
            raise unknown("batch_id", batch_id)
        return await self._current(_decoded(document))

    async def batches(self, owner: str) -> list[BatchObject]:
        """An owner's batches, the newest first."""
        found = [_decoded(each) for each in await done(self._journal.documents.heads(BATCH, owner))]
        return sorted(found, key=lambda batch: batch.created_at, reverse=True)

    async def current(self, batches: list[BatchObject]) -> list[BatchObject]:
        """The same as they are now."""
        return [await self._current(batch) for batch in batches]

    async def cancel(self, owner: str, batch_id: str) -> BatchObject:
        """Give up what has not ended of a batch: it is forgotten at once, and what is being computed is aborted."""
        batch = await self.batch(owner, batch_id)
        if batch.status != "in_progress" or batch_id in self._ending:
            return batch
        batch.status, batch.cancelling_at = "cancelling", int(time.time())
        document = _document(owner, batch)
        await self._give_up(batch, self._journal.withdraw_batch(batch_id, finished=False, document=document))
        try:
            return await self._current(msgspec.structs.replace(batch))
        finally:
            self._begin_end(owner, batch)

    async def _give_up(self, batch: BatchObject, written: Future[int]) -> None:
        """Wait until the journal has `written` that nobody wants the rest of a batch. _begin_end follows."""
        # Written before anything is aborted: what a crash interrupts here is not computed again, and no line ends
        # after this.
        self._ending.add(batch.id)
        try:
            await done(written)
        except BaseException:
            self._ending.discard(batch.id)
            raise

    def _begin_end(self, owner: str, batch: BatchObject) -> None:
        task = asyncio.create_task(self._end(owner, batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def prune(self) -> None:
        """Give up what is past its window, and forget files and batches a while after their end."""
        old = time.time() - self._journal.keep_s
        for document in await done(self._journal.documents.heads(BATCH)):
            batch = await self._current(_decoded(document))
            if batch.status == "in_progress":
                if time.time() > (batch.expires_at or 0) and batch.id not in self._ending:
                    await self._give_up(batch, self._journal.expire_batch(batch.id))
                    self._begin_end(document.owner, batch)
            elif (ended_at := _ended_at(batch)) is not None and ended_at < old:
                await done(self._journal.withdraw_batch(batch.id, finished=True))
                await done(self._journal.documents.delete(BATCH, document.owner, batch.id))
        await self._files.prune(old)

    async def _accept(self, owner: str, salt: str, batch: BatchObject) -> None:
        content = await self._files.content(owner, batch.input_file_id)
        lines, errors = await asyncio.to_thread(
            read_lines, content, batch.endpoint, batch.id, owner, salt, self._max_body_bytes
        )
        keep_s = self._journal.keep_s
        if errors:
            batch.status, batch.failed_at, batch.errors = "failed", batch.created_at, BatchErrors(data=errors)
            await done(self._journal.documents.put(_document(owner, batch), self._quota), keep_s)
            return
        batch.in_progress_at = batch.created_at
        batch.request_counts.total = len(lines)
        # Together: there is no batch without its requests.
        await done(self._journal.accept(lines, _document(owner, batch), self._quota), keep_s)
        self._requests.left_over.set()

    async def _no_input(self, owner: str, file_id: str) -> ApiError:
        try:
            await self.batch_of_file(owner, file_id)
        except ApiError as error:
            return unknown("input_file_id", file_id) if error.status == 404 else error
        return invalid(f"input_file_id={file_id!r} is what became of a batch: upload a file", "input_file_id")

    async def _end(self, owner: str, batch: BatchObject) -> None:
        """Abort what is being computed of a batch whose requests are forgotten."""
        try:
            await self._abort(batch.id)
            if batch.status == "cancelling":
                batch.status, batch.cancelled_at = "cancelled", int(time.time())
                await done(self._journal.documents.put(_document(owner, batch)))
        except ApiError as error:
            _log.error("batch %s is cancelled, which cannot be written down: %s", batch.id, error)
        finally:
            self._ending.discard(batch.id)

    async def _current(self, batch: BatchObject) -> BatchObject:
        counts = await done(self._journal.count_of_batch(batch.id))
        batch.request_counts.completed, batch.request_counts.failed = counts.completed, counts.failed
        if batch.status == "in_progress" and counts.expired:
            batch.status, batch.expired_at = "expired", int(counts.finished_at or batch.created_at)
        if batch.status == "in_progress" and counts.completed + counts.failed >= batch.request_counts.total:
            batch.status = "completed"
            batch.finalizing_at = batch.completed_at = int(counts.finished_at or batch.created_at)
        if batch.status == "cancelling" and batch.id not in self._ending:  # the process that cancelled it died
            batch.status, batch.cancelled_at = "cancelled", batch.cancelling_at
        if batch.status not in ("in_progress", "cancelling"):
            name = batch.id.removeprefix("batch_")
            batch.output_file_id = f"file-{name}-{OUTPUT}" if counts.completed else None
            batch.error_file_id = f"file-{name}-{ERRORS}" if counts.failed else None
        return batch


def _decoded(document: Document) -> BatchObject:
    return msgspec.json.decode(document.head, type=BatchObject)


def _document(owner: str, batch: BatchObject) -> Document:
    return Document(BATCH, owner, batch.id, msgspec.json.encode(batch))


def _ended_at(batch: BatchObject) -> int | None:
    return batch.completed_at or batch.cancelled_at or batch.expired_at or batch.failed_at


def _line(entry: Entry) -> bytes:
    """What became of a request, as a line of its batch's output or errors."""
    request = entry.request
    response, error = None, None
    if entry.status == EXPIRED:
        error = {"code": EXPIRED_CODE, "message": EXPIRED_MESSAGE}
    else:
        answer = kept_answer(entry)
        response = {"status_code": answer.status, "request_id": request.name, "body": msgspec.Raw(answer.body)}
    line = {"id": f"batch_req_{request.id}", "custom_id": request.custom_id, "response": response, "error": error}
    return msgspec.json.encode(line) + b"\n"
