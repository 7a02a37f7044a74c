"""uvicorn with bounds that it lacks: on the bytes of a request's head and on the time it may take to arrive."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from ..config import GatewayConfig
from . import error_shapes
from .errors import ApiError, unavailable
from .exchange import LINGER_S, Exchange

MAX_HEAD_BYTES = 64 * 1024
WRITE_TIMEOUT_S = 60.0
MAX_PIPELINED = 64
"""Requests of one connection that wait for the answer to the one before them; more end it."""
MAX_PIPELINED_BYTES = 64 * 1024
"""Bytes of their bodies above which no more are read meanwhile; then nobody sees that the client closes, either."""
_HOST = re.compile(rb"\s*[\w.~!$&'()*+,;=%:\[\]-]*\s*", re.ASCII)
"""What Host may be: a URI's host and its port (RFC 3986, 3.2.2)."""
RESERVED_CONNECTIONS = 64
"""Connections above max_connections that are let in, so that probes of /health are answered."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to a head of more than MAX_HEAD_BYTES and 408 to one that takes longer than head_timeout_s.

    With max_connections open it answers 503 to whatever is no probe. A wish to upgrade to another protocol is left out:
    the request is answered as it is (RFC 9110, 7.8). Trailers after a body count for nothing.

    Requests of one connection are answered one after the other, those before a bad one too. When the client closes the
    connection, the one that is computed is told.

    A client that has read nothing for WRITE_TIMEOUT_S while an answer waits for it loses its connection.
    """

    _gateway = GatewayConfig()
    _head_bytes = 0
    _in_head = True  # a new connection's first bytes are a head's
    _framing_bytes = 0  # of trailers and chunks' extensions, since the last bytes of a body
    _wants_upgrade = False
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None
    _in_body = False  # of the last request that was begun, which is self.cycle
    _running: RequestResponseCycle | None = None  # the request that is answered now; self.cycle may wait behind it
    _why: ApiError | None = None  # what is wrong with a head, where the parser is stopped
    _refused = False
    _last_answer: ApiError | None = None  # is sent after the answers before it
    url = b""

    @classmethod
    def bounded_by(cls, config: GatewayConfig) -> type[BoundedHttpProtocol]:
        """The same with the bounds of `config`."""
        return type(cls.__name__, (cls,), {"_gateway": config})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a head."""
        super().connection_made(transport)
        if len(self.connections) > self._gateway.max_connections + RESERVED_CONNECTIONS:
            self._refuse(self._full())
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._stop_timer()
        self._stop_write_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

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
        if self._refused:
            return
        if self._in_head:
            # A piece may end the head and hold a part of the body: only what is surely head counts.
            end = data.find(b"\r\n\r\n")
            self._head_bytes += len(data) if end < 0 else end
            if self._head_bytes > MAX_HEAD_BYTES:
                self.url = self.url or _target(data)
                self._refuse(
                    ApiError(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes", code="head_too_large")
                )
                return
        self._unset_keepalive_if_required()
        self._framing_bytes += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._refuse(self._why or _invalid("Invalid HTTP request received."))
            return
        if self._framing_bytes > MAX_HEAD_BYTES:
            what = f"{MAX_HEAD_BYTES} bytes that are none of the request's body follow a part of it"
            self._refuse(ApiError(431, f"more than {what}", code="trailers_too_large"))

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        self._head_bytes = max(1, self._head_bytes)  # its first bytes may have come with the end of another
        if self._head_timer is None:
            self._expect_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head; those that follow a body were not checked with it, and would replace some."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head ends, and a body begins."""
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._wants_upgrade = True
            return
        self._in_head = False
        self._head_bytes = self._framing_bytes = 0
        self._stop_timer()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refused = True
            self.transport.close()
            raise ValueError(f"more than {MAX_PIPELINED} requests of one connection wait")  # stops the parser
        self._why = _wrong_with(self.headers, self.parser.get_http_version())
        if self._why is not None:
            raise ValueError(self._why.info.message)
        full = len(self.connections) > self._gateway.max_connections and not self.url.startswith(b"/health")
        self.app = self._answer_full if full else self.config.loaded_app
        super().on_headers_complete()
        self._in_body = True
        self._read_ahead()
        if self.scope["http_version"] == "1.0" and self.cycle is not None:
            _end_by_closing(self.cycle)

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._framing_bytes = 0
        super().on_body(body)
        self._read_ahead()

    def on_message_complete(self) -> None:
        """A body ends; what comes next is a head."""
        if self._wants_upgrade:
            return
        self._in_head = True
        self._in_body = False
        self._framing_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has been sent; the next request's turn comes."""
        super().on_response_complete()
        if self._last_answer is not None and (self._running is None or self._running.response_complete):
            self._answer_and_close(self._last_answer)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP as every other error is answered."""
        self._refuse(_invalid(msg))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _read_ahead(self) -> None:
        """Go on reading though a request waits, so that the end of the connection is seen; within bounds."""
        if not self.pipeline:
            return
        if sum(len(cycle.body) for cycle, _ in self.pipeline) > MAX_PIPELINED_BYTES:
            self.flow.pause_reading()
        else:
            self.flow.resume_reading()

    def _parse(self, data: bytes) -> None:
        """Feed the parser. Raises httptools.HttpParserError for what is no HTTP."""
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._wants_upgrade:  # CONNECT: what follows is not HTTP
                    return
                data = data[upgrade.args[0] :]
            # The parser takes what follows such a head for the other protocol, the request's own body too. Java's
            # clients ask for HTTP/2 so with every request.
            head = _without_upgrade(self.parser, self.url, self.headers)
            self._wants_upgrade = False
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self.parser.feed_data(head)

    def _full(self) -> ApiError:
        most = self._gateway.max_connections
        return unavailable(
            f"the server has {most} connections (max_connections); try again later", "too_many_connections"
        )

    async def _answer_full(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer in place of the app, in the order of the connection's requests."""
        error = self._full()
        error.headers["Connection"] = "close"
        await Exchange(scope, receive, send, self._gateway).fail(error)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._gateway.head_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._head_bytes or self.cycle is None:
            limit = f"{self._gateway.head_timeout_s:g} s (head_timeout_s)"
            self._refuse(ApiError(408, f"the request's head did not arrive within {limit}", code="head_timeout"))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, error: ApiError) -> None:
        """Answer what the app never sees, after the requests before it, and close the connection."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop_timer()
        if self._in_body and self.cycle is not None:
            if self.cycle.response_started:  # this answer would be read as a part of that one, or as another's
                self.transport.close()
                return
            if self.pipeline:
                self.pipeline.popleft()
            else:  # the app waits for the rest of a request that will not come
                self.cycle.disconnected = True
                self.cycle.message_event.set()
                self._running = None

        if self._running is None or self._running.response_complete:
            self._answer_and_close(error)
        else:
            self._last_answer = error

    def _answer_and_close(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        status, body = error_shapes.whole(self.url.partition(b"?")[0].decode("latin-1"), error)
        phrase = "Overloaded" if status == 529 else HTTPStatus(status).phrase
        fields = {name.decode(): value.decode() for name, value in self.server_state.default_headers}
        fields |= {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in fields.items())
        head = f"HTTP/1.1 {status} {phrase}\r\n{lines}connection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        # Closing with unread bytes resets the connection, and a client that still sends would not see the answer.
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)


def _end_by_closing(cycle: RequestResponseCycle) -> None:
    """Have an answer of unknown length end with its connection: a client of HTTP/1.0 knows no chunks (RFC 9112, 6.1).

    uvicorn closes the connection after such an answer anyway.
    """
    send = cycle.send
    unknown_length = False

    async def send_plain(message: Any) -> None:
        nonlocal unknown_length
        if message["type"] == "http.response.start":
            unknown_length = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if unknown_length:
                cycle.chunked_encoding = False
        elif unknown_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]


def _without_upgrade(parser: httptools.HttpRequestParser, url: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """A head that the parser has read, without the wish to upgrade to another protocol."""
    lines = [b"%s %s HTTP/%s" % (parser.get_method(), url, parser.get_http_version().encode())]
    for name, value in headers:
        kept = value
        if name == b"connection":
            options = (option.strip() for option in value.split(b","))
            kept = b", ".join(option for option in options if option.lower() not in (b"upgrade", b"http2-settings"))
        if name != b"upgrade":
            lines.append(b"%s: %s" % (name, kept))
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _wrong_with(headers: list[tuple[bytes, bytes]], version: str) -> ApiError | None:
    """Why a head is refused that a proxy before this server may have read in another way (RFC 9112).

    The parser takes several hosts or none, and codings of a body before the chunks that nobody undoes.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1:
        return _invalid("the head has more than one host")
    if not hosts and version == "1.1":
        return _invalid("the head has no host, which HTTP/1.1 requires")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return _invalid(f"host={hosts[0][:100].decode('latin-1')!r} is no name or address with a port or without")
    for name, value in headers:
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            return _invalid("a body may be sent in chunks, but not in another transfer coding")
    return None


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_http")


def _target(head: bytes) -> bytes:
    """The path in the first line of a request's head."""
    words = head[:1024].partition(b"\r\n")[0].split(b" ")
    return words[1] if len(words) > 1 else b""


def make_server(app: Any, config: GatewayConfig, **options: Any) -> uvicorn.Server:
    """A server for the gateway's app at config's address; `options` go to uvicorn.Config (TLS, timeouts)."""
    settings: dict[str, Any] = {
        "host": config.host,
        "port": config.port,
        "http": BoundedHttpProtocol.bounded_by(config),
        "ws": "none",
        "loop": "uvloop",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 65,
        "timeout_graceful_shutdown": 30,
    }
    return uvicorn.Server(uvicorn.Config(app, **{**settings, **options}))
