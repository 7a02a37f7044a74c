"""The requests in a batch's file: JSON lines, each checked before any of them is accepted."""

from __future__ import annotations

import io
import uuid
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ...journal.entries import Request
from ..http.errors import ApiError
from ..http.json_body import LONG_BODY_BYTES, parse_json, to_struct
from ..schemas.journal_api.batches import BatchError

MOST_LINES = 50_000
"""Most requests of a batch: OpenAI's bound."""
_MOST_ERRORS = 20


class _Line(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


def read_lines(
    content: bytes, endpoint: str, batch: str, owner: str, salt: str, most_bytes: int
) -> tuple[list[Request], list[BatchError]]:
    """The requests of a file, or what is wrong with it: the first lines that are no requests for `endpoint`.

    No body is longer than `most_bytes`.
    """
    requests: list[Request] = []
    errors: list[BatchError] = []
    seen: set[str] = set()
    for number, raw in enumerate(io.BytesIO(content), 1):
        if not raw.strip():
            continue
        if len(requests) == MOST_LINES:
            errors.append(BatchError(code="too_many_requests", message=f"a batch has at most {MOST_LINES} requests"))
        if len(errors) >= _MOST_ERRORS or len(requests) == MOST_LINES:
            break
        try:
            # Before it is parsed, which may take thirty times as much memory.
            if len(raw) > most_bytes:
                why = f"the line has {len(raw)} bytes, and may have {most_bytes} (max_body_bytes)"
                raise ApiError(400, why, code="line_too_long")
            line = to_struct(parse_json(raw, yielding=len(raw) >= LONG_BODY_BYTES), _Line)
            body = msgspec.json.encode(line.body)
            _check(line, endpoint, len(body), most_bytes, seen)
        except ApiError as error:
            info = error.info
            message = info.message.replace("the body", "the line", 1) if info.param is None else info.message
            errors.append(
                BatchError(code=str(info.code or "invalid_line"), message=message, line=number, param=info.param)
            )
            continue
        seen.add(line.custom_id)
        identity = uuid.uuid4().hex
        requests.append(
            Request(identity, endpoint, owner, identity, None, salt, body, b"", batch=batch, custom_id=line.custom_id)
        )
    if not requests and not errors:
        errors.append(BatchError(code="empty_file", message="the file has no requests"))
    return requests, errors


def _check(line: _Line, endpoint: str, size: int, most_bytes: int, seen: set[str]) -> None:
    if line.custom_id in seen:
        raise ApiError(400, f"custom_id={line.custom_id[:100]!r} occurs twice", param="custom_id")
    if line.method != "POST":
        raise ApiError(400, f"method={line.method[:20]!r} must be POST", param="method")
    if line.url != endpoint:
        raise ApiError(400, f"url={line.url[:100]!r} must be the batch's endpoint, {endpoint}", param="url")
    for name in ("stream", "background"):
        if line.body.get(name):
            raise ApiError(400, f"{name} is not supported in a batch", param=f"body.{name}")
    if size > most_bytes:
        raise ApiError(400, f"the body has {size} bytes, and may have {most_bytes} (max_body_bytes)", param="body")
