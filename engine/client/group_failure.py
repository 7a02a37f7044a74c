"""What a client's own group leaves behind about its end; see group_process.py. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import msgspec


class GroupFailure(msgspec.Struct, frozen=True):
    """What the supervisor writes to failure.json when a rank fails, and a rank for the supervisor."""

    rank: int
    error: str  # a type of engine/errors.py, or any other exception's name
    message: str


def read_failure(path: Path) -> GroupFailure | None:
    """Return what was recorded at `path`; None if nothing was, or something that cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=GroupFailure)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
