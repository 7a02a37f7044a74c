"""The id by which a request is known: in its answer, whatever answers it, and in the log."""

from __future__ import annotations

import re
import uuid
from collections.abc import MutableMapping
from typing import Any

HEADER = b"x-request-id"
WHAT_MAY_BE = "1 to 256 printable ASCII characters without spaces"
_FORM = re.compile(r"[\x21-\x7e]{1,256}")
_STATE = "request_id"


def is_request_id(text: str) -> bool:
    """Whether a header can hold `text` as an id; see WHAT_MAY_BE."""
    return _FORM.fullmatch(text) is not None


def request_id_of(scope: MutableMapping[str, Any]) -> str:
    """The id of a request, the same each time it is asked for: the caller's X-Request-Id if it may be, else a new one.

    The last one counts if there are several.
    """
    state = scope.setdefault("state", {})
    if _STATE not in state:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == HEADER]
        state[_STATE] = given[-1] if given and is_request_id(given[-1]) else uuid.uuid4().hex
    return str(state[_STATE])


def set_request_id(scope: MutableMapping[str, Any], request_id: str) -> None:
    """Know a request by another id from now on: the one in its body."""
    scope.setdefault("state", {})[_STATE] = request_id
