"""What a client's own group leaves behind about its end; see group_process.py. Imports no torch."""

from __future__ import annotations

import msgspec


class GroupFailure(msgspec.Struct, frozen=True):
    """What the supervisor writes to failure.json when a rank fails, and a rank for the supervisor."""

    rank: int
    error: str  # a type of engine/errors.py, or any other exception's name
    message: str
