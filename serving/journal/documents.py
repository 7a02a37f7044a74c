"""What the journal keeps beside requests: responses, files and batches, by kind, owner and id."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from .entries import ROW_BYTES, taken
from .quota import Quota
from .writer import JournalFull, WriterThread

MOST_OF_A_KIND = 65536
"""Most documents of one kind; lists of them are made as a whole."""


@dataclass(frozen=True)
class Document:
    """One of them."""

    kind: str
    owner: str
    id: str
    head: bytes
    """What is known of it, JSON."""
    content: bytes = b""

    @property
    def size(self) -> int:
        """Bytes of the file that it takes, about."""
        return ROW_BYTES + taken(len(self.head)) + taken(len(self.content))


class _Size(Protocol):
    bytes: int


class Documents:
    """Part of a journal, see there: Futures have their result once it is on the disk."""

    def __init__(
        self,
        writer: WriterThread,
        reserve: Callable[[sqlite3.Connection, int], None],
        size: _Size,
        clock: Callable[[], float],
    ) -> None:
        self._writer, self._reserve, self._size, self._clock = writer, reserve, size, clock

    def put(self, document: Document, quota: Quota | None = None) -> Future[None]:
        """Keep a document, in place of the one of the same kind, owner and id; a new one within a quota.

        The Future's errors: JournalFull, QuotaExceeded.
        """

        def action(connection: sqlite3.Connection) -> None:
            if quota is not None:
                quota.check(connection, document.kind, document.owner, document.size)
            self.put_now(connection, document)

        return self._writer.run(action)

    def put_now(self, connection: sqlite3.Connection, document: Document, *, reserved: bool = False) -> None:
        """The same on the writer's thread, within its transaction; `reserved`: whether there is room for it."""
        before = _size_of(connection, document.kind, document.owner, document.id)
        if not before:
            (count,) = connection.execute("SELECT count(*) FROM document WHERE kind = ?", (document.kind,)).fetchone()
            if count >= MOST_OF_A_KIND:
                raise JournalFull(
                    f"the journal holds {count} of the kind {document.kind}, and may hold {MOST_OF_A_KIND}: delete "
                    f"some, or wait until some are forgotten (journal_keep_s)"
                )
        if not reserved:
            self._reserve(connection, document.size - before)
        values = (document.kind, document.owner, document.id, self._clock(), document.head, document.content)
        connection.execute(
            "INSERT OR REPLACE INTO document (kind, owner, id, used_at, head, content, size) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*values, document.size),
        )
        self._size.bytes += document.size - before

    def get(self, kind: str, owner: str, document_id: str) -> Future[Document | None]:
        """A document; None if there is none of this id."""

        def action(connection: sqlite3.Connection) -> Document | None:
            query = "SELECT head, content FROM document WHERE kind = ? AND owner = ? AND id = ?"
            found = connection.execute(query, (kind, owner, document_id)).fetchone()
            return None if found is None else Document(kind, owner, document_id, bytes(found[0]), bytes(found[1]))

        return self._writer.run(action)

    def head(self, kind: str, owner: str, document_id: str) -> Future[Document | None]:
        """The same without its content."""

        def action(connection: sqlite3.Connection) -> Document | None:
            query = "SELECT head FROM document WHERE kind = ? AND owner = ? AND id = ?"
            found = connection.execute(query, (kind, owner, document_id)).fetchone()
            return None if found is None else Document(kind, owner, document_id, bytes(found[0]))

        return self._writer.run(action)

    def heads(self, kind: str, owner: str | None = None) -> Future[list[Document]]:
        """All documents of a kind, of one owner or of all, without their contents, the oldest first."""

        def action(connection: sqlite3.Connection) -> list[Document]:
            query = "SELECT owner, id, head FROM document WHERE kind = ? AND (? IS NULL OR owner = ?) ORDER BY used_at"
            return [
                Document(kind, str(row[0]), str(row[1]), bytes(row[2]))
                for row in connection.execute(query, (kind, owner, owner))
            ]

        return self._writer.run(action)

    def all(self, kind: str) -> Future[list[Document]]:
        """All documents of a kind with their contents, the oldest first."""

        def action(connection: sqlite3.Connection) -> list[Document]:
            query = "SELECT owner, id, head, content FROM document WHERE kind = ? ORDER BY used_at"
            rows = connection.execute(query, (kind,))
            return [Document(kind, str(row[0]), str(row[1]), bytes(row[2]), bytes(row[3])) for row in rows]

        return self._writer.run(action)

    def delete(self, kind: str, owner: str, document_id: str) -> Future[bool]:
        """Forget a document; the Future tells whether there was one."""

        def action(connection: sqlite3.Connection) -> bool:
            self._size.bytes -= _size_of(connection, kind, owner, document_id)
            deleted = connection.execute(
                "DELETE FROM document WHERE kind = ? AND owner = ? AND id = ?", (kind, owner, document_id)
            )
            return deleted.rowcount > 0

        return self._writer.run(action)


def _size_of(connection: sqlite3.Connection, kind: str, owner: str, document_id: str) -> int:
    query = "SELECT size FROM document WHERE kind = ? AND owner = ? AND id = ?"
    found = connection.execute(query, (kind, owner, document_id)).fetchone()
    return 0 if found is None else int(found[0])
