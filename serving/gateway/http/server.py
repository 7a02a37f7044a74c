"""uvicorn with bounds that it lacks: on the bytes of a request's head and on the time it may take to arrive."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..config import GatewayConfig
from .errors import ApiError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 60.0


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head of more than MAX_HEAD_BYTES and 408 to one that takes longer than HEAD_TIMEOUT_S.

    A client that has read nothing for WRITE_TIMEOUT_S while an answer waits for it loses its connection.
    """

    _head_bytes = 0
    _in_head = True  # a new connection's first bytes are a head's
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as its answer is made."""
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        """The client has read."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head; the parser takes the rest."""
        if self._in_head:
            # A piece may end the head and hold a part of the body: only what is surely head counts.
            end = data.find(b"\r\n\r\n")
            self._head_bytes += len(data) if end < 0 else end
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(
                    ApiError(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes", code="head_too_large")
                )
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A head ends, and a body begins."""
        self._in_head, self._head_bytes = False, 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body ends; what comes next is a head."""
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP as every other error is answered."""
        self._refuse(ApiError(400, msg, code="invalid_http"))

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._head_bytes or self.cycle is None:
            self._refuse(ApiError(408, f"the request's head did not arrive within {HEAD_TIMEOUT_S:g} s"))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = error.body
        head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def make_server(app: Any, config: GatewayConfig, **options: Any) -> uvicorn.Server:
    """A server for the gateway's app at config's address; `options` go to uvicorn.Config (TLS, timeouts)."""
    settings: dict[str, Any] = {
        "host": config.host,
        "port": config.port,
        "http": BoundedHttpProtocol,
        "ws": "none",
        "loop": "uvloop",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "limit_concurrency": config.max_connections,
        "timeout_keep_alive": 65,
        "timeout_graceful_shutdown": 30,
    }
    return uvicorn.Server(uvicorn.Config(app, **{**settings, **options}))
