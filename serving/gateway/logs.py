"""The gateway's log: one JSON object on each line. Bodies, queries and headers of requests are never in it."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from ...engine.errors import ConfigError
from .auth import App, Message, Receive, Scope, Send
from .http.request_ids import HEADER, request_id_of

LEVELS = ("debug", "info", "warning", "error")
PATH_CHARS = 200
CLIENT_GONE = 499
"""What the log says in place of a status where the client was gone before it was sent, as nginx does."""
FAILED = 500
_FIELDS = "phalanx_fields"

_log = logging.getLogger("phalanx.gateway.access")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time (ISO 8601, UTC), level, logger, message, and the fields of log_fields()."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=repr).decode("utf-8", "replace")


def log_fields(**fields: object) -> dict[str, dict[str, object]]:
    """Return what `extra=` of a logging call takes to add fields to the line."""
    return {_FIELDS: fields}


def configure_logging(level: str = "info") -> None:
    """Send every record of this process, from `level` on, to standard error as JSON. Raises ConfigError."""
    if level not in LEVELS:
        raise ConfigError(f"log_level={level!r} is not supported; it must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # These tell of each connection what one line for each request says better.
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


class AccessLog:
    """ASGI middleware: one line for each request at its end, and an X-Request-Id in each answer.

    The id is the caller's if it may be, or else a new one.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = time.monotonic()
        request_id_of(scope)
        status = CLIENT_GONE
        sent = 0

        async def observe(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                own = next((value for name, value in headers if name.lower() == HEADER), None)
                if own is None:
                    message = {**message, "headers": [*headers, (HEADER, request_id_of(scope).encode())]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observe)
        except Exception:
            status = FAILED if status == CLIENT_GONE else status
            raise
        finally:
            fields = log_fields(
                request_id=request_id_of(scope),
                method=scope["method"],
                path=scope["path"][:PATH_CHARS],
                status=status,
                bytes=sent,
                seconds=round(time.monotonic() - started, 6),
                client=scope["client"][0] if scope.get("client") else None,
            )
            # Probes would be most of the log.
            quiet = scope["path"].startswith("/health") or scope["path"] == "/metrics"
            _log.log(logging.DEBUG if quiet else logging.INFO, "request", extra=fields)
