"""The journal's file: SQLite, checked at the door, of one process at a time.

SQLite's write-ahead log with synchronous=FULL: what a transaction has committed is on the disk. It survives a SIGKILL
of the process, a crash of the machine and a loss of power, as far as the disk keeps what it has confirmed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
import urllib.parse
from pathlib import Path

from ...engine.errors import ConfigError

APPLICATION_ID = 0x70686C78
"""Tells a journal of phalanx from any other SQLite file ("phlx")."""
SCHEMA_VERSION = 1

_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES, _APPLICATION_ID_AT = 100, 68
_SCHEMA = (
    """CREATE TABLE request (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        owner TEXT NOT NULL,
        name TEXT NOT NULL,
        key TEXT,
        salt TEXT NOT NULL,
        digest BLOB NOT NULL,
        body BLOB,
        batch TEXT,
        custom_id TEXT,
        accepted_at REAL NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        finished_at REAL,
        status INTEGER,
        answer BLOB,
        size INTEGER NOT NULL
    )""",
    "CREATE UNIQUE INDEX request_key ON request (owner, key) WHERE key IS NOT NULL",
    "CREATE INDEX request_name ON request (owner, name)",
    "CREATE INDEX request_finished ON request (finished_at) WHERE finished_at IS NOT NULL",
    "CREATE INDEX request_open ON request (number) WHERE finished_at IS NULL",
    "CREATE INDEX request_batch ON request (batch, number) WHERE batch IS NOT NULL",
    """CREATE TABLE progress (
        number INTEGER NOT NULL,
        place INTEGER NOT NULL,
        part INTEGER NOT NULL,
        data BLOB NOT NULL,
        PRIMARY KEY (number, place, part)
    ) WITHOUT ROWID""",
    """CREATE TABLE document (
        kind TEXT NOT NULL,
        owner TEXT NOT NULL,
        id TEXT NOT NULL,
        used_at REAL NOT NULL,
        head BLOB NOT NULL,
        content BLOB NOT NULL,
        size INTEGER NOT NULL,
        PRIMARY KEY (kind, owner, id)
    )""",
    "CREATE TABLE purpose (name TEXT NOT NULL)",
)


class JournalFile:
    """An open journal: its connection, and the lock that keeps every other process out. See `open`."""

    def __init__(self, connection: sqlite3.Connection, lock: int) -> None:
        self.connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: str, purpose: str) -> JournalFile:
        """Open the journal at `path`, or make one, for `purpose` ("gateway" or "generate").

        Raises ConfigError for a file that others may touch, is in use, is damaged, or is no journal of this version and
        purpose.
        """
        location = Path(os.path.expanduser(path)).absolute()
        _check_folder(path, location.parent)
        lock = _lock(path, location)
        try:
            _check_file(path, location)
            return cls(_connect(path, location, purpose), lock)
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Close it, and let another process have it."""
        self.connection.close()
        os.close(self._lock)


def _check_folder(path: str, folder: Path) -> None:
    """Raise ConfigError for a folder in which somebody else could put another file in the journal's location."""
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"journal={path!r} is in no folder that can be used: {error.strerror}; make it") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"journal={path!r} is in no folder: {str(folder)!r} is a file")
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"journal={path!r} is in a folder that others may write to: give a path in a folder of this user's, "
            f"chmod 700"
        )


def _open_own(path: str, location: Path) -> int:
    """Open a file of this user's alone, or make it. Raises ConfigError."""
    try:
        descriptor = os.open(location, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"journal={path!r}: {str(location)!r} cannot be opened: {why}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(descriptor)
        raise ConfigError(f"journal={path!r}: {str(location)!r} must be a file of this user's alone: chmod 600 it")
    return descriptor


def _lock(path: str, location: Path) -> int:
    """Return what holds the journal's lock until it is closed, or the process ends. Raises ConfigError."""
    # A file of its own: SQLite's locks are lost when any descriptor of the database is closed.
    descriptor = _open_own(path, location.with_name(f"{location.name}.lock"))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
        os.close(descriptor)
        by = f" by process {holder}" if holder.isdigit() else ""
        raise ConfigError(f"journal={path!r} is in use{by}: each process needs one of its own") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _check_file(path: str, location: Path) -> None:
    descriptor = _open_own(path, location)
    try:
        beginning = os.pread(descriptor, _HEADER_BYTES, 0)
    finally:
        os.close(descriptor)
    if not beginning:
        return
    if not beginning.startswith(_MAGIC):
        raise ConfigError(f"journal={path!r} is no journal: give the path of a new file")
    # From SQLite's header, so that another program's file is not even opened.
    if int.from_bytes(beginning[_APPLICATION_ID_AT : _APPLICATION_ID_AT + 4], "big") != APPLICATION_ID:
        raise ConfigError(f"journal={path!r} is another program's SQLite file: give the path of a new file")


def _connect(path: str, location: Path, purpose: str) -> sqlite3.Connection:
    uri = f"file:{urllib.parse.quote(str(location))}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=0.0)
    try:
        _prepare(connection, path, purpose, new=not location.stat().st_size)
    except sqlite3.Error as error:
        connection.close()
        raise ConfigError(
            f"journal={path!r} cannot be used: {error}; move the file and its -wal away, and what it held is given up"
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: str, purpose: str, *, new: bool) -> None:
    """Set the connection up, and make or check the tables. Raises ConfigError or sqlite3.Error."""
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "auto_vacuum=INCREMENTAL", "locking_mode=EXCLUSIVE"):
        connection.execute(f"PRAGMA {pragma}")
    if new:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
    (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise ConfigError(f"journal={path!r} is on a file system without write-ahead logs: give another path")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA journal_size_limit=16777216")

    connection.execute("BEGIN EXCLUSIVE")
    try:
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            _create(connection, purpose)
        _check_identity(connection, path, purpose)
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")

    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError(f"it is damaged: {found.strip()}")


def _create(connection: sqlite3.Connection, purpose: str) -> None:
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO purpose VALUES (?)", (purpose,))
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _check_identity(connection: sqlite3.Connection, path: str, purpose: str) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"journal={path!r} has schema version {version}, and this phalanx reads version {SCHEMA_VERSION}: let the "
            f"version that wrote it finish its requests, or give another path"
        )
    # A table that differs, a trigger or a view would make SQLite do what was not written here.
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        for statement in _SCHEMA:
            model.execute(statement)
        if _definitions(model) != _definitions(connection):
            raise ConfigError(f"journal={path!r} has tables that phalanx has not made: give another path")
    found = connection.execute("SELECT name FROM purpose LIMIT 2").fetchall()
    if found != [(purpose,)]:
        raise ConfigError(f"journal={path!r} is not one of {purpose}: give each program a journal of its own")


def _definitions(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT 100")
    return sorted(rows.fetchall(), key=repr)
