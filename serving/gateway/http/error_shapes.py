"""How an error is written on each face of the API: by the path of its request, whole and in mid-stream."""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from .errors import CONTEXT_LENGTH, UNSUPPORTED, ApiError

MESSAGES_PREFIX = "/v1/messages"
RESPONSES_PREFIX = "/v1/responses"

AnthropicErrorType = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "request_too_large",
    "rate_limit_error",
    "api_error",
    "timeout_error",
    "overloaded_error",
]

_ANTHROPIC_TYPES: dict[int, AnthropicErrorType] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


_COUNTED = re.compile(r"the \w+ has (\d+) tokens; with max_model_len=\d+ it may have at most (\d+)")


class AnthropicErrorDetails(msgspec.Struct):
    """What clients go by where there are several reasons for one status."""

    error_code: Literal["thread_unsupported_request"]


class AnthropicErrorInfo(msgspec.Struct):
    """What went wrong, in Anthropic's words."""

    type: AnthropicErrorType
    message: str
    details: AnthropicErrorDetails | UnsetType = UNSET


class AnthropicErrorBody(msgspec.Struct, kw_only=True):
    """The body of every answer under /v1/messages that is an error."""

    type: Literal["error"] = "error"
    error: AnthropicErrorInfo
    request_id: str | None = None


class ResponsesErrorEvent(msgspec.Struct, kw_only=True):
    """An error in the stream of /v1/responses."""

    type: Literal["error"] = "error"
    sequence_number: int
    code: str | None
    message: str
    param: str | None


def is_anthropic(path: str) -> bool:
    """Whether errors of this path have Anthropic's shape."""
    return path == MESSAGES_PREFIX or path.startswith(f"{MESSAGES_PREFIX}/")


def whole(path: str, error: ApiError, request_id: str | None = None) -> tuple[int, bytes]:
    """The status and the body, JSON, of an answer that is an error.

    Under /v1/messages a 503 is a 529, by which Anthropic's clients know that a server is overloaded or not ready.
    """
    if not is_anthropic(path):
        return error.status, error.body
    status = 529 if error.status == 503 else error.status
    return status, msgspec.json.encode(anthropic_body(error, request_id))


def anthropic_body(error: ApiError, request_id: str | None = None) -> AnthropicErrorBody:
    """The error in Anthropic's shape, which has no place for the field: the message names it."""
    info = error.info
    message = info.message
    if info.code == CONTEXT_LENGTH:
        message = _too_long(message)
    elif info.param and info.param not in message:
        message = f"{info.param}: {message}"
    status = 529 if error.status == 503 else error.status
    kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    made = AnthropicErrorInfo(kind, message)
    if info.param == "thread" and info.code == UNSUPPORTED:
        # Anthropic's tool runner asks for a thread first. It goes on without one if it is told so by this code.
        made.details = AnthropicErrorDetails("thread_unsupported_request")
    return AnthropicErrorBody(error=made, request_id=request_id)


def _too_long(message: str) -> str:
    """The refusal of a long prompt as Anthropic's server begins it: its clients shorten a conversation by that."""
    if counted := _COUNTED.match(message):
        tokens, most = counted.groups()
        return f"prompt is too long: {tokens} tokens > {most} maximum ({message})"
    return f"prompt is too long: {message}"


def in_stream(path: str, error: ApiError, request_id: str | None = None) -> bytes:
    """The last events of a stream that fails."""
    if is_anthropic(path):
        return b"event: error\ndata: " + msgspec.json.encode(anthropic_body(error, request_id)) + b"\n\n"
    if path == RESPONSES_PREFIX:
        # A failure that nobody foresaw: how many events came before it is not known here.
        return b"event: error\ndata: " + msgspec.json.encode(responses_event(error, 0)) + b"\n\n"
    return b"data: " + error.body + b"\n\ndata: [DONE]\n\n"


def responses_event(error: ApiError, sequence_number: int) -> ResponsesErrorEvent:
    """The error as an event of /v1/responses."""
    info = error.info
    code = str(info.code) if info.code is not None else info.type
    return ResponsesErrorEvent(sequence_number=sequence_number, code=code, message=info.message, param=info.param)


def extra_headers(path: str, request_id: str) -> dict[str, str]:
    """The header under which clients of this path look for the request's id, beside X-Request-Id."""
    return {"request-id": request_id} if is_anthropic(path) else {}
