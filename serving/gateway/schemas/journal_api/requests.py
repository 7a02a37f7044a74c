"""What is told of a request that the journal keeps."""

from __future__ import annotations

from typing import Literal

import msgspec


class JournaledAnswer(msgspec.Struct, kw_only=True):
    """The answer that a request got, or would have got if its caller had waited."""

    status_code: int
    request_id: str
    body: msgspec.Raw
    """What its route answered."""


class JournaledRequest(msgspec.Struct, kw_only=True):
    """A request that the gateway has accepted."""

    id: str
    """The request's id, as its caller knows it."""
    object: Literal["request"] = "request"
    path: str
    status: Literal["in_progress", "completed"]
    created_at: int
    """Unix time in seconds."""
    completed_at: int | None = None
    response: JournaledAnswer | None = None
