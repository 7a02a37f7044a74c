"""Server-sent events as OpenAI's API sends them: one JSON value an event, then [DONE]."""

from __future__ import annotations

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def event(value: object) -> bytes:
    """One event. JSON has no line breaks of its own, so that each is a single line of data."""
    return b"data: " + _encode(value) + b"\n\n"


class TextEvent:
    """An event of which only one text changes: what is around it is encoded once.

    Most tokens are such an event; encoding each whole takes several times as long.
    """

    MARK = "\ue000text\ue000"
    """Stands for the text in the event that shows the way."""

    def __init__(self, encoded: bytes) -> None:
        """`encoded` is an event in which a text, or several that are the same, is MARK."""
        self._around = encoded.split(_encode(self.MARK))

    def filled(self, text: str) -> bytes:
        """The event with a text."""
        return _encode(text).join(self._around)
