"""Files that were uploaded, in a journal."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from concurrent.futures import Future
from typing import TypeVar

import msgspec

from ...journal.documents import Document
from ...journal.journal import Journal
from ...journal.quota import Quota, QuotaExceeded
from ...journal.writer import JournalError, JournalFull
from ..config import GatewayConfig
from ..http.errors import ApiError, unavailable
from ..schemas.journal_api.batches import FileObject

FILE, BATCH = "file", "batch"

Result = TypeVar("Result")


class Files:
    """One for each gateway with a journal; used on its event loop alone. Every method may raise ApiError."""

    def __init__(self, journal: Journal, config: GatewayConfig) -> None:
        self._journal = journal
        self._quota = quota_of(config, config.max_files, "max_files")

    async def put(self, owner: str, filename: str, content: bytes) -> FileObject:
        """Keep a file."""
        made = FileObject(
            id=f"file-{uuid.uuid4().hex}", bytes=len(content), created_at=int(time.time()), filename=filename
        )
        document = Document(FILE, owner, made.id, msgspec.json.encode(made), content)
        await done(self._journal.documents.put(document, self._quota), self._journal.keep_s)
        return self._with_end(made)

    async def find(self, owner: str, file_id: str) -> FileObject | None:
        """What is known of a file; None if there is none of this id."""
        document = await done(self._journal.documents.head(FILE, owner, file_id))
        return None if document is None else self._decoded(document)

    async def content(self, owner: str, file_id: str) -> bytes:
        """The bytes of a file."""
        document = await done(self._journal.documents.get(FILE, owner, file_id))
        if document is None:
            raise unknown("file_id", file_id)
        return document.content

    async def all(self, owner: str) -> list[FileObject]:
        """An owner's files, the newest first."""
        heads = await done(self._journal.documents.heads(FILE, owner))
        return [self._decoded(each) for each in reversed(heads)]

    async def delete(self, owner: str, file_id: str) -> bool:
        """Forget a file; whether there was one. Batches that were made of it go on."""
        return await done(self._journal.documents.delete(FILE, owner, file_id))

    async def prune(self, old: float) -> None:
        """Forget the files that were uploaded before a moment."""
        for document in await done(self._journal.documents.heads(FILE)):
            if self._decoded(document).created_at < old:
                await self.delete(document.owner, document.id)

    def _decoded(self, document: Document) -> FileObject:
        return self._with_end(msgspec.json.decode(document.head, type=FileObject))

    def _with_end(self, file: FileObject) -> FileObject:
        file.expires_at = end_of(file.created_at, self._journal.keep_s)
        return file


def end_of(begin: int, keep_s: float) -> int | None:
    """When what is kept from `begin` on is forgotten, Unix time in seconds; None if it never is."""
    return None if math.isinf(keep_s) else begin + math.ceil(keep_s)


def quota_of(config: GatewayConfig, most: int, setting: str) -> Quota:
    """How much one caller may have of what `setting` bounds, and how many bytes all have together."""
    most_bytes = config.journal_files_bytes
    return Quota((FILE, BATCH), most, setting, most_bytes, f"half of journal_max_mb={config.journal_max_mb}")


async def done(future: Future[Result], keep_s: float | None = None) -> Result:
    """The future's result, with errors of the journal as answers; `keep_s` is when a full quota has room again."""
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except QuotaExceeded as error:
        what_to_do = f"delete files, or wait: what is old is forgotten (journal_keep_s={keep_s})"
        message = f"{error}; {what_to_do}"
        raise ApiError(429, message, type="rate_limit_error", code="quota_exceeded") from None
    except JournalFull as error:
        raise unavailable(str(error), "journal_full") from None
    except JournalError as error:
        raise unavailable(str(error), "journal_failed") from None


def unknown(field: str, name: str) -> ApiError:
    """There is nothing of this id, or it is another owner's."""
    code = f"{field.removesuffix('_id')}_not_found"
    why = "it was deleted, or is forgotten, or belongs to another key"
    return ApiError(404, f"{field}={name[:100]!r} is not known: {why}", type="not_found_error", param=field, code=code)
