"""The journal's rows, read and written. Everything here runs on the writer's thread, within its transaction."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from .entries import EXPIRED, Entry, Request, taken

PROGRESS_BYTES = 64
"""About what a row of progress takes beside its bytes."""

_IDS_AT_ONCE = 500
_COLUMNS = (
    "number, id, kind, owner, name, key, salt, digest, body, batch, custom_id, accepted_at, attempts, finished_at, "
    "status, answer"
)


class Size(Protocol):
    """What is counted."""

    bytes: int
    unfinished: int
    finished: int


S = TypeVar("S", bound=Size)


@dataclass(frozen=True)
class BatchCounts:
    """The requests of a batch."""

    total: int
    completed: int
    """Answered with a status below 400."""
    failed: int
    """Answered with another one, or expired."""
    expired: int
    """Not answered within the batch's window."""
    finished_at: float | None
    """When the last one of them ended, Unix time in seconds."""


def measure(connection: sqlite3.Connection, size: S) -> S:
    """Count everything into `size`, and return it."""
    total, finished, taken_bytes = connection.execute(
        "SELECT count(*), count(finished_at), coalesce(sum(size), 0) FROM request"
    ).fetchone()
    (documents,) = connection.execute("SELECT coalesce(sum(size), 0) FROM document").fetchone()
    size.bytes, size.finished, size.unfinished = taken_bytes + documents, finished, total - finished
    return size


def is_any_known(connection: sqlite3.Connection, requests: Sequence[Request]) -> bool:
    """Whether there is a request that has the id of one of these, or its owner and key."""
    for begin in range(0, len(requests), _IDS_AT_ONCE):
        ids = [request.id for request in requests[begin : begin + _IDS_AT_ONCE]]
        query = f"SELECT 1 FROM request WHERE id IN ({', '.join('?' * len(ids))}) LIMIT 1"  # nosec B608 # question marks
        if connection.execute(query, ids).fetchone() is not None:
            return True
    keys = ((request.owner, request.key) for request in requests if request.key is not None)
    same = "SELECT 1 FROM request WHERE owner = ? AND key = ?"
    return any(connection.execute(same, each).fetchone() is not None for each in keys)


def insert(connection: sqlite3.Connection, requests: Sequence[Request], now: float) -> list[int]:
    """Write new requests, and return their numbers."""
    if not requests:
        return []
    connection.executemany(
        "INSERT INTO request (id, kind, owner, name, key, salt, digest, body, batch, custom_id, accepted_at, size) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                request.id,
                request.kind,
                request.owner,
                request.name,
                request.key,
                request.salt,
                request.digest,
                request.body,
                request.batch,
                request.custom_id,
                now,
                request.size,
            )
            for request in requests
        ),
    )
    # AUTOINCREMENT, and nobody else writes: one number after the other.
    (last,) = connection.execute("SELECT last_insert_rowid()").fetchone()
    return list(range(last - len(requests) + 1, last + 1))


def insert_progress(connection: sqlite3.Connection, number: int, place: int, data: bytes, size: int) -> None:
    """Write more progress of a request, which has got on."""
    connection.execute(
        "INSERT INTO progress SELECT ?, ?, coalesce(max(part) + 1, 0), ? FROM progress WHERE number = ? AND place = ?",
        (number, place, data, number, place),
    )
    connection.execute("UPDATE request SET size = size + ?, attempts = 0 WHERE number = ?", (size, number))


def progress_of(connection: sqlite3.Connection, number: int) -> dict[int, list[bytes]]:
    """The progress of a request by place, in the order in which it was written."""
    found: dict[int, list[bytes]] = {}
    query = "SELECT place, data FROM progress WHERE number = ? ORDER BY place, part"
    for place, data in connection.execute(query, (number,)):
        found.setdefault(place, []).append(data)
    return found


def is_open(connection: sqlite3.Connection, number: int) -> bool:
    """Whether there is such a request, and it has not ended."""
    query = "SELECT 1 FROM request WHERE number = ? AND finished_at IS NULL"
    return connection.execute(query, (number,)).fetchone() is not None


def size_of(connection: sqlite3.Connection, number: int) -> int:
    """Bytes of a request that there is."""
    (size,) = connection.execute("SELECT size FROM request WHERE number = ?", (number,)).fetchone()
    return int(size)


def finish(connection: sqlite3.Connection, number: int, status: int, answer: bytes | None, now: float) -> int:
    """Write a request's end over its body and its progress; returns its new size."""
    connection.execute("DELETE FROM progress WHERE number = ?", (number,))
    entry = find(connection, "number = ?", (number,))
    assert entry is not None
    size = entry.request.size - taken(len(entry.request.body)) + taken(len(answer or b""))
    connection.execute(
        "UPDATE request SET finished_at = ?, status = ?, answer = ?, body = NULL, size = ? WHERE number = ?",
        (now, status, answer, size, number),
    )
    return size


def delete(connection: sqlite3.Connection, number: int) -> tuple[int, bool] | None:
    """Delete a request; returns its size and whether it had ended, None without one."""
    query = "SELECT size, finished_at IS NOT NULL FROM request WHERE number = ?"
    found = connection.execute(query, (number,)).fetchone()
    if found is None:
        return None
    connection.execute("DELETE FROM progress WHERE number = ?", (number,))
    connection.execute("DELETE FROM request WHERE number = ?", (number,))
    return int(found[0]), bool(found[1])


def find(connection: sqlite3.Connection, condition: str, values: tuple[object, ...]) -> Entry | None:
    """The last request for which a condition of this package's own holds."""
    query = f"SELECT {_COLUMNS} FROM request WHERE {condition} ORDER BY number DESC LIMIT 1"  # nosec B608 # conditions are of this package
    found = connection.execute(query, values).fetchone()
    return None if found is None else _entry(found)


def select(
    connection: sqlite3.Connection,
    condition: str,
    values: tuple[object, ...],
    most: int,
    most_bytes: int | None = None,
) -> list[Entry]:
    """The first `most` requests for which a condition of this package's own holds.

    With `most_bytes` the list ends with the request with which bodies and answers are longer than that.
    """
    query = f"SELECT {_COLUMNS} FROM request WHERE {condition} ORDER BY number LIMIT ?"  # nosec B608 # conditions are of this package
    found: list[Entry] = []
    size = 0
    with contextlib.closing(connection.execute(query, (*values, most))) as selected:
        for row in selected:
            found.append(_entry(row))
            size += len(found[-1].request.body) + len(found[-1].answer or b"")
            if most_bytes is not None and size > most_bytes:
                break
    return found


def unfinished(connection: sqlite3.Connection, after: int, most: int) -> list[Entry]:
    """The first `most` requests above the number `after` that have not ended."""
    return select(connection, "finished_at IS NULL AND number > ?", (after,), most)


_FORGETTABLE = "finished_at IS NOT NULL AND batch IS NULL"  # a batch's answers are wanted together


def finished_bytes(connection: sqlite3.Connection) -> int:
    """Bytes of the requests that have ended and may be forgotten."""
    query = f"SELECT coalesce(sum(size), 0) FROM request WHERE {_FORGETTABLE}"  # nosec B608 # a constant of this module
    (size,) = connection.execute(query).fetchone()
    return int(size)


def finished_in_order(connection: sqlite3.Connection) -> Iterator[int]:
    """The numbers of the requests that have ended and may be forgotten, those that ended longest ago first."""
    order = "ORDER BY finished_at, number LIMIT 256"
    query = f"SELECT number FROM request WHERE {_FORGETTABLE} {order}"  # nosec B608 # constants of this module
    before: list[tuple[int]] = []
    while (found := connection.execute(query).fetchall()) and found != before:
        yield from (number for (number,) in found)
        before = found


def finished_before(connection: sqlite3.Connection, moment: float) -> list[int]:
    """The numbers of requests that ended before a moment."""
    order = "ORDER BY finished_at LIMIT 4096"
    query = f"SELECT number FROM request WHERE {_FORGETTABLE} AND finished_at < ? {order}"  # nosec B608 # of this module
    return [number for (number,) in connection.execute(query, (moment,))]


def delete_batch(connection: sqlite3.Connection, batch: str, finished: bool) -> tuple[int, int, int]:
    """Delete the requests of a batch that have not ended, or all.

    Returns how many there were, how many of them had ended, and their size together.
    """
    condition = "batch = ?" if finished else "batch = ? AND finished_at IS NULL"
    query = f"SELECT count(*), count(finished_at), coalesce(sum(size), 0) FROM request WHERE {condition}"  # nosec B608 # of this function
    count, ended, size = connection.execute(query, (batch,)).fetchone()
    numbers = f"SELECT number FROM request WHERE {condition}"  # nosec B608 # of this function
    connection.execute(f"DELETE FROM progress WHERE number IN ({numbers})", (batch,))  # nosec B608 # of this function
    connection.execute(f"DELETE FROM request WHERE {condition}", (batch,))  # nosec B608 # of this function
    return int(count), int(ended), int(size)


def count_of_batch(connection: sqlite3.Connection, batch: str) -> BatchCounts:
    """How the requests of a batch ended."""
    query = (
        "SELECT count(*), total(status < 400), total(status >= 400), total(status = ?), max(finished_at) "
        "FROM request WHERE batch = ?"
    )
    total, completed, failed, expired, finished_at = connection.execute(query, (EXPIRED, batch)).fetchone()
    return BatchCounts(total, int(completed), int(failed), int(expired), finished_at)


def expire_batch(connection: sqlite3.Connection, batch: str, now: float) -> tuple[int, int]:
    """End the requests of a batch that have not ended, without an answer.

    Returns how many there were, and how many bytes they take less than before.
    """
    query = "SELECT number, name, key, custom_id, size FROM request WHERE batch = ? AND finished_at IS NULL"
    found = connection.execute(query, (batch,)).fetchall()
    ended = []
    for number, name, key, custom_id, _ in found:
        size = Request("", "", name=_text(name), key=key, custom_id=custom_id).size
        ended.append((now, EXPIRED, size, number))

    connection.executemany("DELETE FROM progress WHERE number = ?", ((number,) for *_, number in ended))
    connection.executemany(
        "UPDATE request SET finished_at = ?, status = ?, answer = NULL, body = NULL, size = ? WHERE number = ?", ended
    )
    return len(found), sum(row[-1] for row in found) - sum(size for _, _, size, _ in ended)


def _entry(row: tuple[object, ...]) -> Entry:
    (number, identity, kind, owner, name, key, salt, digest, body, batch, custom_id, accepted_at, attempts) = row[:13]
    finished_at, status, answer = row[13:]
    request = Request(
        id=_text(identity),
        kind=_text(kind),
        owner=_text(owner),
        name=_text(name),
        key=None if key is None else _text(key),
        salt=_text(salt),
        body=_bytes(body),
        digest=_bytes(digest),
        batch=None if batch is None else _text(batch),
        custom_id=None if custom_id is None else _text(custom_id),
    )
    return Entry(
        request,
        int(str(number)),
        float(str(accepted_at)),
        int(str(attempts)),
        None if finished_at is None else float(str(finished_at)),
        None if status is None else int(str(status)),
        None if answer is None else _bytes(answer),
    )


def _text(value: object) -> str:
    """A column that SQLite would let be anything. Raises sqlite3.DatabaseError for what this package never writes."""
    if not isinstance(value, str):
        raise sqlite3.DatabaseError(f"a text of the journal is {type(value).__name__}")
    return value


def _bytes(value: object) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise sqlite3.DatabaseError(f"bytes of the journal are {type(value).__name__}")
    return value
