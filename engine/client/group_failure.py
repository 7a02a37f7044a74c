"""What the supervisor of a client's own group tells the client, in files; see group_process.py. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

import msgspec

STATE_FILE = "state.json"
FAILURE_FILE = "failure.json"
READY_FILE = "ready"
"""Rank 0 makes it once it takes requests."""

T = TypeVar("T")


class GroupFailure(msgspec.Struct, frozen=True):
    """What the supervisor writes to failure.json when a rank fails, and a rank for the supervisor."""

    rank: int
    error: str  # a type of engine/errors.py, or any other exception's name
    message: str
    from_outside: bool = False
    """Whether somebody has killed or stopped it, so that no request of it is to blame."""

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.error}: {self.message}"


class GroupState(msgspec.Struct, frozen=True):
    """What the supervisor writes to state.json whenever it changes."""

    phase: Literal["starting", "running", "stalled", "restarting"]
    """"restarting" lasts until the ranks take requests again."""
    why: str = ""
    """A sentence: what is wrong. Empty while all is well."""
    restarts: int = 0
    """How often the group was started again."""


def read_failure(path: Path) -> GroupFailure | None:
    """Return what was recorded at `path`; None if nothing was, or something that cannot be read."""
    return _read(path, GroupFailure)


def read_state(folder: Path) -> GroupState | None:
    """Return what the supervisor of the group in `folder` said last; None if nothing that can be read."""
    return _read(folder / STATE_FILE, GroupState)


def write_whole(path: Path, record: GroupFailure | GroupState) -> None:
    """Write a record so that whoever reads finds all of it, or the one before it."""
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(msgspec.json.encode(record))
    unfinished.replace(path)


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
