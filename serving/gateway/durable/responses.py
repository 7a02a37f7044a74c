"""Kept responses on the disk, so that they are there after a restart."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

import msgspec

from ...journal.documents import Document
from ...journal.journal import Journal
from ..generation.response_store import ResponseStore, StoredResponse

KIND = "response"
_PENDING = ("queued", "in_progress")

_log = logging.getLogger(__name__)


class _Kept(msgspec.Struct):
    response: msgspec.Raw
    input: msgspec.Raw
    item_ids: list[str]


class _Status(msgspec.Struct):
    status: str = ""


class ResponseMirror:
    """Writes what the store keeps into the journal, beside the event loop."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.closing = False
        """Whether the process ends: what its end does to responses is not written."""

    def put(self, owner: str, response_id: str, record: StoredResponse) -> None:
        """A response is kept, as it is now."""
        if self.closing:
            return
        kept = _Kept(msgspec.Raw(record.response), msgspec.Raw(record.input), record.item_ids)
        written = self._journal.documents.put(Document(KIND, owner, response_id, b"", msgspec.json.encode(kept)))
        written.add_done_callback(_tell_failure)

    def delete(self, owner: str, response_id: str) -> None:
        """A response is kept no more."""
        if not self.closing:
            self._journal.documents.delete(KIND, owner, response_id)

    def load(self, store: ResponseStore) -> None:
        """Have the store keep what the journal has. One that was begun, but never accepted, is forgotten."""
        for document in self._journal.documents.all(KIND).result():
            try:
                kept = msgspec.json.decode(document.content, type=_Kept)
                status = msgspec.json.decode(kept.response, type=_Status).status
            except msgspec.DecodeError as error:
                _log.error("response %s of the journal cannot be read: %s", document.id, error)
                continue
            entry = self._journal.by_id(document.id.removeprefix("resp_")).result()
            if status in _PENDING and (entry is None or entry.finished_at is not None):
                self._journal.documents.delete(KIND, document.owner, document.id)
                continue
            record = StoredResponse(bytes(kept.response), bytes(kept.input), None, kept.item_ids)
            store.load(document.owner, document.id, record)


def _tell_failure(written: Future[None]) -> None:
    try:
        error = written.exception()
    except asyncio.CancelledError:
        return
    if error is not None:
        _log.warning("a response is kept in memory alone: %s", error)
