"""The journal: requests from the moment they are accepted until their answers are forgotten, bounded in bytes and time.

Every method that returns a Future may be called from any thread; the Future has its result once it is on the disk, and
fails with JournalError where the file cannot be written.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from . import rows
from .documents import Document, Documents
from .entries import Entry, Request, taken
from .file import JournalFile
from .quota import Quota
from .writer import JournalFull, WriterThread

READ_BYTES = 4 * 2**20
"""Bytes of answers above which no more are read at once."""
BACKLOG = 4096
"""Actions that wait for the writer above which no progress is noted: a disk that is slow must not fill the memory."""


class KeyInUse(Exception):
    """Another request has the id, or the owner's key."""


@dataclass
class JournalSize:
    """What the journal holds now. Belongs to the writer's thread, others may read it."""

    bytes: int = 0
    unfinished: int = 0
    finished: int = 0


class Journal:
    """One process has it: a second one is refused until this one has closed it, or has died."""

    def __init__(
        self,
        path: str,
        purpose: str,
        *,
        max_bytes: int,
        keep_s: float,
        setting: str = "journal_max_mb",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file. Raises ConfigError; see JournalFile.open. `setting` is what bounds max_bytes, for errors."""
        self.max_bytes, self.keep_s = max_bytes, keep_s
        self._setting, self._clock = setting, clock
        file = JournalFile.open(path, purpose)
        self.size = rows.measure(file.connection, JournalSize())
        self._writer = WriterThread(file, lambda connection: _measure_again(connection, self.size))
        self.documents = Documents(self._writer, self._reserve, self.size, clock)

    def accept(
        self, requests: Sequence[Request], document: Document | None = None, quota: Quota | None = None
    ) -> Future[list[int]]:
        """Take requests in, with the document that tells of them, within a quota: all or nothing.

        The Future has their numbers. Its errors: JournalFull, KeyInUse, QuotaExceeded.
        """

        def action(connection: sqlite3.Connection) -> list[int]:
            if rows.is_any_known(connection, requests):
                raise KeyInUse(f"a request with the id {requests[0].id!r}, or of those after it, or its key is there")
            size = sum(request.size for request in requests)
            with_document = size + (0 if document is None else document.size)
            if document is not None and quota is not None:
                quota.check(connection, document.kind, document.owner, with_document)
            self._reserve(connection, with_document)
            if document is not None:
                self.documents.put_now(connection, document)
            numbers = rows.insert(connection, requests, self._clock())
            self.size.bytes += size
            self.size.unfinished += len(requests)
            return numbers

        return self._writer.run(action)

    def attempt(self, number: int) -> Future[int]:
        """Count that a process begins to compute it again; the Future has the attempts without progress so far."""

        def action(connection: sqlite3.Connection) -> int:
            connection.execute("UPDATE request SET attempts = attempts + 1 WHERE number = ?", (number,))
            found = connection.execute("SELECT attempts FROM request WHERE number = ?", (number,)).fetchone()
            return int(found[0]) if found else 0

        return self._writer.run(action)

    @property
    def takes_progress(self) -> bool:
        """Whether the writer keeps up."""
        return len(self._writer) < BACKLOG

    def progress(self, number: int, place: int, data: bytes) -> Future[bool]:
        """Note more of what was computed of a request; `place` is which of its submits.

        The Future tells whether it was noted: not where there is no room, or the request has ended.
        """

        def action(connection: sqlite3.Connection) -> bool:
            size = rows.PROGRESS_BYTES + taken(len(data))
            if self.size.bytes + size > self.max_bytes or not rows.is_open(connection, number):
                return False
            rows.insert_progress(connection, number, place, data, size)
            self.size.bytes += size
            return True

        return self._writer.run(action)

    def finish(self, number: int, status: int, answer: bytes) -> Future[bool]:
        """Keep a request's answer, in place of its body and its progress.

        The Future tells whether it had none yet: a request is answered once. An answer that has no room is left out,
        and the entry says so by answer=None.
        """

        def action(connection: sqlite3.Connection) -> bool:
            if not rows.is_open(connection, number):
                return False
            before = rows.size_of(connection, number)
            now = self._clock()
            small = rows.finish(connection, number, status, None, now)
            self.size.bytes += small - before
            self.size.unfinished -= 1
            self.size.finished += 1
            if self.size.bytes + taken(len(answer)) > self.max_bytes:
                self._forget_finished(connection, taken(len(answer)), but=number)
            if self.size.bytes + taken(len(answer)) <= self.max_bytes:
                self.size.bytes += rows.finish(connection, number, status, answer, now) - small
            return True

        return self._writer.run(action)

    def withdraw(self, number: int) -> Future[bool]:
        """Forget a request, whether it has ended or not; the Future tells whether there was one."""

        def action(connection: sqlite3.Connection) -> bool:
            return self._delete(connection, number)

        return self._writer.run(action)

    def by_key(self, owner: str, key: str) -> Future[Entry | None]:
        """The request of an owner with this Idempotency-Key."""
        return self._writer.run(lambda connection: rows.find(connection, "owner = ? AND key = ?", (owner, key)))

    def by_name(self, owner: str, name: str) -> Future[Entry | None]:
        """The last request of an owner with this request id."""
        return self._writer.run(lambda connection: rows.find(connection, "owner = ? AND name = ?", (owner, name)))

    def by_id(self, request_id: str) -> Future[Entry | None]:
        """The request with this id of the journal's."""
        return self._writer.run(lambda connection: rows.find(connection, "id = ?", (request_id,)))

    def unfinished(self, after: int, most: int) -> Future[list[Entry]]:
        """The first `most` requests above the number `after` that have not ended."""
        return self._writer.run(lambda connection: rows.unfinished(connection, after, most))

    def progress_of(self, number: int) -> Future[dict[int, list[bytes]]]:
        """What was noted of a request, by place, in its order."""
        return self._writer.run(lambda connection: rows.progress_of(connection, number))

    def resume(self, number: int) -> Future[dict[int, list[bytes]] | None]:
        """The same of a request that has not ended; None of one that has, or that there is not."""

        def action(connection: sqlite3.Connection) -> dict[int, list[bytes]] | None:
            return rows.progress_of(connection, number) if rows.is_open(connection, number) else None

        return self._writer.run(action)

    def of_batch(self, batch: str, after: int, most: int) -> Future[list[Entry]]:
        """The first requests of a batch above the number `after`, whether they have ended or not: at most `most`.

        There are fewer where their answers are long. None is there where there are no more.
        """
        return self._writer.run(
            lambda connection: rows.select(connection, "batch = ? AND number > ?", (batch, after), most, READ_BYTES)
        )

    def count_of_batch(self, batch: str) -> Future[rows.BatchCounts]:
        """How many requests of a batch there are, and how they ended."""
        return self._writer.run(lambda connection: rows.count_of_batch(connection, batch))

    def withdraw_batch(self, batch: str, *, finished: bool, document: Document | None = None) -> Future[int]:
        """Forget the requests of a batch: those that have not ended, and with `finished` all. How many there were.

        The document that tells of it takes the place of the one before in the same transaction.
        """

        def action(connection: sqlite3.Connection) -> int:
            count, ended, size = rows.delete_batch(connection, batch, finished)
            self.size.bytes -= size
            self.size.finished -= ended
            self.size.unfinished -= count - ended
            if document is not None:
                # A full journal must not keep what would make room in it.
                self.documents.put_now(connection, document, reserved=True)
            return count

        return self._writer.run(action)

    def expire_batch(self, batch: str) -> Future[int]:
        """End the requests of a batch that have not ended: its window is over. The Future has how many there were."""

        def action(connection: sqlite3.Connection) -> int:
            count, freed = rows.expire_batch(connection, batch, self._clock())
            self.size.bytes -= freed
            self.size.finished += count
            self.size.unfinished -= count
            return count

        return self._writer.run(action)

    def prune(self) -> Future[int]:
        """Forget what ended more than keep_s ago, and give free pages back. How many requests were forgotten."""

        def action(connection: sqlite3.Connection) -> int:
            old = rows.finished_before(connection, self._clock() - self.keep_s)
            count = sum(self._delete(connection, number) for number in old)
            connection.execute("PRAGMA incremental_vacuum(1024)").fetchall()
            return count

        return self._writer.run(action)

    def close(self) -> None:
        """Write what is left, and let another process have the file. Closing twice is harmless."""
        self._writer.close()

    # ---- on the writer's thread

    def _reserve(self, connection: sqlite3.Connection, size: int) -> None:
        """Make room for so many bytes. Raises JournalFull, and forgets nothing then."""
        if self.size.bytes + size <= self.max_bytes:
            return
        forgettable = rows.finished_bytes(connection)
        if self.size.bytes - forgettable + size > self.max_bytes:
            held = f"{self.size.bytes} bytes, {self.size.unfinished} requests that have not ended among them"
            raise JournalFull(
                f"the journal holds {held}, and may hold {self.max_bytes} ({self._setting}): {size} more do not fit; "
                f"try again later"
            )
        self._forget_finished(connection, size)

    def _forget_finished(self, connection: sqlite3.Connection, size: int, but: int = -1) -> None:
        """Forget what ended longest ago until there is room, as far as that goes."""
        for number in rows.finished_in_order(connection):
            if self.size.bytes + size <= self.max_bytes:
                return
            if number != but:
                self._delete(connection, number)

    def _delete(self, connection: sqlite3.Connection, number: int) -> bool:
        found = rows.delete(connection, number)
        if found is None:
            return False
        size, finished = found
        self.size.bytes -= size
        self.size.finished -= finished
        self.size.unfinished -= not finished
        return True


def _measure_again(connection: sqlite3.Connection, size: JournalSize) -> None:
    """Count anew, since a transaction was given up."""
    rows.measure(connection, size)
