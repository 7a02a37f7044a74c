"""Server-sent events as OpenAI's API sends them: one JSON value an event, then [DONE]."""

from __future__ import annotations

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """One event. JSON has no line breaks of its own, so that each is a single line of data."""
    return b"data: " + _encode(value) + b"\n\n"
