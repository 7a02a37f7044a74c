"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from ....engine.errors import CapacityExceeded, EngineStopped, InvalidRequest, PhalanxError, Timeout


class ErrorInfo(msgspec.Struct, kw_only=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The field that is wrong, as a path such as messages[0].content."""
    code: str | int | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is an error."""

    error: ErrorInfo


class ApiError(Exception):
    """An answer other than the one asked for. `param` is the path of the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.info = ErrorInfo(message=message, type=type, param=param, code=code)

    @property
    def body(self) -> bytes:
        """The answer's body, JSON."""
        return msgspec.json.encode(ErrorBody(self.info))


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: one field, `param`, is not acceptable."""
    return ApiError(400, message, param=param, code=code)


def unavailable(reason: str, code: str) -> ApiError:
    """A 503: no engine takes requests now."""
    return ApiError(503, reason, type="service_unavailable_error", code=code, headers={"Retry-After": "1"})


def internal() -> ApiError:
    """A 500, which says nothing of the inside; the log does."""
    return ApiError(500, "the server failed to answer this request", type="server_error", code="internal_error")


_FIELD = re.compile(r"^(the )?([a-z_]+)(?: key)?(?:\[\w+\])?[= ]")
_TOO_LONG = re.compile(
    r"^the (?:(?:prompt has|first \d+ of \d+ characters have) \d+ tokens|request begins with more than \d+ bytes)"
)
UNSUPPORTED = "unsupported_parameter"
"""The code of a field that other servers take and this one does not."""
CONTEXT_LENGTH = "context_length_exceeded"
"""The code by which OpenAI's clients know that they have to shorten a prompt."""


def from_engine(error: PhalanxError, fields: Mapping[str, str] | None = None) -> ApiError:
    """The answer for an error of the engine or the protocol.

    An InvalidRequest begins with its field; `fields` has the request's own path for each field of the protocol.
    """
    message = str(error)
    if isinstance(error, InvalidRequest):
        found = _FIELD.match(message)
        param = (fields or {}).get(found[2]) if found else None
        if found and param and not found[1]:
            message = message.replace(found[2], param, 1)
        if _TOO_LONG.match(message):
            return invalid(message, (fields or {}).get("prompt"), CONTEXT_LENGTH)
        return invalid(message, param)
    if isinstance(error, CapacityExceeded):
        return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": "1"})
    if isinstance(error, EngineStopped):
        return unavailable(message, "engine_stopped")
    if isinstance(error, Timeout):
        return ApiError(504, message, type="timeout_error", code="timeout")
    # EngineFault and whatever else is not the caller's doing.
    return ApiError(500, message, type="server_error", code="engine_fault")
