"""Files and batches over a journal: what is told of a batch follows from its requests, so that it is always right."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from ...journal.documents import Document
from ...journal.entries import Entry
from ...journal.writer import JournalError, JournalFull
from ..http.errors import ApiError, unavailable
from ..schemas.journal_api.batches import BatchErrors, BatchObject, BatchRequest, FileObject, RequestCounts
from .batch_lines import read_lines
from .requests import DurableRequests, kept_answer

FILE, BATCH = "file", "batch"
WINDOW_S = 86400
"""Seconds until the requests of a batch are given up."""
OUTPUT, ERRORS = "output", "errors"
_AT_ONCE = 64

Result = TypeVar("Result")


class Batches:
    """One for each gateway with a journal; used on its event loop alone. Every method may raise ApiError."""

    def __init__(self, requests: DurableRequests, max_body_bytes: int) -> None:
        self._requests, self._journal, self._max_body_bytes = requests, requests.journal, max_body_bytes

    # ---- files

    async def put_file(self, owner: str, filename: str, content: bytes) -> FileObject:
        """Keep a file."""
        made = FileObject(
            id=f"file-{uuid.uuid4().hex}", bytes=len(content), created_at=int(time.time()), filename=filename
        )
        document = Document(FILE, owner, made.id, msgspec.json.encode(made), content)
        await _done(self._journal.documents.put(document))
        return made

    async def file(self, owner: str, file_id: str) -> tuple[FileObject, Document | None]:
        """A file; a batch's, which has no document, is made from its requests."""
        document = await _done(self._journal.documents.get(FILE, owner, file_id))
        if document is not None:
            return msgspec.json.decode(document.head, type=FileObject), document
        batch, kind = await self._batch_of_file(owner, file_id)
        size = 0
        async for line in self.lines(batch.id, kind):
            size += len(line)
        name = f"{batch.id}_{kind}.jsonl"
        return (
            FileObject(id=file_id, bytes=size, created_at=batch.created_at, filename=name, purpose="batch_output"),
            None,
        )

    async def files(self, owner: str) -> list[FileObject]:
        """An owner's uploaded files, the newest first."""
        heads = await _done(self._journal.documents.heads(FILE, owner))
        return [msgspec.json.decode(each.head, type=FileObject) for each in reversed(heads)]

    async def delete_file(self, owner: str, file_id: str) -> None:
        """Forget an uploaded file; batches that were made of it go on."""
        if not await _done(self._journal.documents.delete(FILE, owner, file_id)):
            raise _unknown("file_id", file_id)

    async def lines(self, batch_id: str, kind: str) -> AsyncIterator[bytes]:
        """The lines of a batch's output, or of its errors, in the order of its file."""
        after = 0
        while entries := await _done(self._journal.of_batch(batch_id, after, _AT_ONCE)):
            after = entries[-1].number
            for entry in entries:
                if entry.finished_at is not None and ((entry.status or 0) >= 400) == (kind == ERRORS):
                    yield _line(entry)

    async def _batch_of_file(self, owner: str, file_id: str) -> tuple[BatchObject, str]:
        name, _, kind = file_id.removeprefix("file-").rpartition("-")
        if kind in (OUTPUT, ERRORS):
            batch = await self.batch(owner, f"batch_{name}")
            if file_id in (batch.output_file_id, batch.error_file_id):
                return batch, kind
        raise _unknown("file_id", file_id)

    # ---- batches

    async def create(self, owner: str, salt: str, request: BatchRequest) -> BatchObject:
        """Accept every request of a file: once this returns, each will be answered once. A wrong file fails whole."""
        file, document = await self.file(owner, request.input_file_id)
        if document is None:
            raise ApiError(400, "input_file_id names what became of a batch: upload a file", param="input_file_id")
        now, identity = int(time.time()), uuid.uuid4().hex
        lines, errors = await asyncio.to_thread(
            read_lines, document.content, request.endpoint, f"batch_{identity}", owner, salt, self._max_body_bytes
        )
        batch = BatchObject(
            id=f"batch_{identity}",
            endpoint=request.endpoint,
            input_file_id=file.id,
            status="failed" if errors else "in_progress",
            created_at=now,
            in_progress_at=None if errors else now,
            failed_at=now if errors else None,
            expires_at=now + WINDOW_S,
            errors=BatchErrors(data=errors) if errors else None,
            request_counts=RequestCounts(total=0 if errors else len(lines)),
            metadata=request.metadata,
        )
        if errors:
            await self._put(owner, batch)
            return batch
        # Together: there is no batch without its requests.
        await _done(self._journal.accept(lines, _document(owner, batch)))
        self._requests.left_over.set()
        return batch

    async def batch(self, owner: str, batch_id: str) -> BatchObject:
        """A batch as it is now."""
        document = await _done(self._journal.documents.get(BATCH, owner, batch_id))
        if document is None:
            raise _unknown("batch_id", batch_id)
        return await self._current(msgspec.json.decode(document.head, type=BatchObject))

    async def batches(self, owner: str) -> list[BatchObject]:
        """An owner's batches, the newest first."""
        heads = await _done(self._journal.documents.heads(BATCH, owner))
        found = [msgspec.json.decode(each.head, type=BatchObject) for each in heads]
        return sorted(found, key=lambda batch: batch.created_at, reverse=True)

    async def current(self, batches: list[BatchObject]) -> list[BatchObject]:
        """The same as they are now."""
        return [await self._current(batch) for batch in batches]

    async def cancel(self, owner: str, batch_id: str, *, expired: bool = False) -> BatchObject:
        """Give up what has not ended of a batch; what is being computed is thrown away when it ends."""
        batch = await self.batch(owner, batch_id)
        if batch.status != "in_progress":
            return batch
        now = int(time.time())
        if expired:
            batch.status, batch.expired_at = "expired", now
        else:
            batch.status, batch.cancelling_at, batch.cancelled_at = "cancelled", now, now
        await self._put(owner, batch)
        await _done(self._journal.withdraw_batch(batch_id, finished=False))
        return await self._current(batch)

    async def prune(self) -> None:
        """Give up what is past its window, and forget files and batches a while after their end."""
        old = time.time() - self._journal.keep_s
        for document in await _done(self._journal.documents.heads(BATCH)):
            batch = await self._current(msgspec.json.decode(document.head, type=BatchObject))
            if batch.status == "in_progress":
                if time.time() > (batch.expires_at or 0):
                    await self.cancel(document.owner, batch.id, expired=True)
            elif (batch.completed_at or batch.cancelled_at or batch.expired_at or batch.failed_at or 0) < old:
                await _done(self._journal.withdraw_batch(batch.id, finished=True))
                await _done(self._journal.documents.delete(BATCH, document.owner, batch.id))
        for document in await _done(self._journal.documents.heads(FILE)):
            if msgspec.json.decode(document.head, type=FileObject).created_at < old:
                await _done(self._journal.documents.delete(FILE, document.owner, document.id))

    async def _put(self, owner: str, batch: BatchObject) -> None:
        await _done(self._journal.documents.put(_document(owner, batch)))

    async def _current(self, batch: BatchObject) -> BatchObject:
        counts = await _done(self._journal.count_of_batch(batch.id))
        batch.request_counts.completed, batch.request_counts.failed = counts.completed, counts.failed
        if batch.status == "in_progress" and counts.completed + counts.failed >= batch.request_counts.total:
            batch.status = "completed"
            batch.finalizing_at = batch.completed_at = int(counts.finished_at or batch.created_at)
        if batch.status != "in_progress":
            name = batch.id.removeprefix("batch_")
            batch.output_file_id = f"file-{name}-{OUTPUT}" if counts.completed else None
            batch.error_file_id = f"file-{name}-{ERRORS}" if counts.failed else None
        return batch


def _document(owner: str, batch: BatchObject) -> Document:
    return Document(BATCH, owner, batch.id, msgspec.json.encode(batch))


def _line(entry: Entry) -> bytes:
    """What became of a request, as a line of its batch's output."""
    answer, request = kept_answer(entry), entry.request
    response = {"status_code": answer.status, "request_id": request.name, "body": msgspec.Raw(answer.body)}
    line = {"id": f"batch_req_{request.id}", "custom_id": request.custom_id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"


async def _done(future: Future[Result]) -> Result:
    """The future's result, with errors of the journal as answers."""
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except JournalFull as error:
        raise unavailable(str(error), "journal_full") from None
    except JournalError as error:
        raise unavailable(str(error), "journal_failed") from None


def _unknown(field: str, name: str) -> ApiError:
    code = f"{field.removesuffix('_id')}_not_found"
    why = "it was deleted, or is forgotten, or belongs to another key"
    return ApiError(404, f"{field}={name[:100]!r} is not known: {why}", type="not_found_error", param=field, code=code)
