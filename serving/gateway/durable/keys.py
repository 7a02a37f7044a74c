"""What a body says before it is read in earnest, and the key by which a request is known again."""

from __future__ import annotations

from typing import Any

import msgspec

from ..http.errors import invalid
from ..http.exchange import Exchange
from ..http.request_ids import WHAT_MAY_BE, is_request_id

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class _Beginning(msgspec.Struct):
    """The fields that decide where a request goes; everything else is passed over."""

    stream: Any = None
    request_id: Any = None


def peek(body: bytes) -> tuple[bool, str | None]:
    """(whether a body asks for a stream, the request id that it gives).

    What is no request passes for a stream: its route refuses it, and nothing of it is kept.
    """
    try:
        beginning = msgspec.json.decode(body.removeprefix(_BYTE_ORDER_MARK), type=_Beginning)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True, None
    given = beginning.request_id
    name = given if isinstance(given, str) and is_request_id(given) else None
    return beginning.stream not in (None, False), name


def idempotency_key(exchange: Exchange) -> str | None:
    """The header Idempotency-Key. Raises ApiError for one that is too long or no printable ASCII."""
    key = exchange.header(b"idempotency-key")
    if key is None:
        return None
    if not is_request_id(key):
        raise invalid(f"Idempotency-Key must be {WHAT_MAY_BE}", "Idempotency-Key")
    return key
