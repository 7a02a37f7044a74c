"""An HTTP client for load: it only notes when bytes arrive, and reads them after the run.

Each connection is an asyncio protocol without streams or queues; see trivial_server.py for what it costs by itself.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

Piece = tuple[float, bytes]

_LIMIT_BYTES = 64 * 1024 * 1024


@dataclass
class Exchange:
    """One request, and what came back; seconds on the monotonic clock."""

    due: float
    """When it was to be sent: later than that only if the client was late."""
    sent: float = 0.0
    status: int = 0
    pieces: list[Piece] = field(default_factory=list)
    """The answer's body as it arrived."""
    ended: float = 0.0
    error: str | None = None
    """Why there is no whole answer."""


class Target:
    """Where requests go; keeps connections that are idle for the next ones."""

    def __init__(self, base_url: str, key: str | None, timeout_s: float) -> None:
        """`base_url` ends with /v1, as OpenAI's clients take it. Raises ValueError for what is no URL."""
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no http:// or https:// URL")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._headers = {"Host": parts.netloc, "Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def connect(self, count: int) -> None:
        """Make `count` connections, so that the first requests do not wait for one."""
        self._idle += [await self._open() for _ in range(count - len(self._idle))]

    async def post(self, path: str, body: bytes, due: float | None = None) -> Exchange:
        """Send a request and wait for its whole answer; what goes wrong is noted in the exchange."""
        return await self._request("POST", path, body, due)

    async def get(self, path: str) -> Exchange:
        """The same without a body."""
        return await self._request("GET", path, b"", None)

    def close(self) -> None:
        """Close every connection."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _request(self, method: str, path: str, body: bytes, due: float | None) -> Exchange:
        exchange = Exchange(time.monotonic() if due is None else due)
        head = f"{method} {self._path}{path} HTTP/1.1\r\n"
        fields = {**self._headers, "Content-Length": str(len(body))}
        data = (head + _lines(fields) + "\r\n").encode() + body
        connection: _Connection | None = None
        try:
            connection = self._idle.pop() if self._idle else await self._open()
            if connection.closed:
                connection = await self._open()
            exchange.sent = time.monotonic()
            reusable = await asyncio.wait_for(connection.send(exchange, data), self._timeout_s)
        except asyncio.TimeoutError:
            exchange.error = f"no whole answer within {self._timeout_s:g} s"
            if connection is not None:
                connection.close()
        except OSError as error:
            exchange.error = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            if connection is not None:
                connection.close()
            raise
        else:
            if reusable:
                self._idle.append(connection)
            else:
                connection.close()
        exchange.ended = time.monotonic()
        return exchange

    async def _open(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[bool] | None = None
        self._buffer = b""
        self._left: int | None = None  # bytes that are due of a body without chunks, or of a chunk
        self._chunked = False
        self._in_body = False
        self._keep = True
        self._bytes = 0
        self.closed = False

    async def send(self, exchange: Exchange, data: bytes) -> bool:
        """Send a request; True once its answer is whole and the connection may be used again. Raises OSError."""
        assert self._transport is not None
        self._exchange, self._done = exchange, asyncio.get_running_loop().create_future()
        self._buffer, self._left, self._in_body, self._bytes = b"", None, False, 0
        self._transport.write(data)
        return await self._done

    def close(self) -> None:
        """Close it; an answer under way is lost."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._bytes += len(data)
        if self._exchange is None or self._done is None or self._done.done():
            return
        if self._bytes > _LIMIT_BYTES:
            self._done.set_exception(ConnectionAbortedError(f"the answer is longer than {_LIMIT_BYTES} bytes"))
            return
        self._buffer += data
        if not self._in_body and not self._read_head():
            return
        if self._chunked:
            self._read_chunks(now)
        else:
            self._read_plain(now)

    def _read_head(self) -> bool:
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return False
        assert self._exchange is not None
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._exchange.status = int(first.split()[1])
        self._chunked = fields.get("transfer-encoding", "").lower() == "chunked"
        self._left = None if self._chunked else int(fields.get("content-length", 0))
        self._keep = fields.get("connection", "").lower() != "close"
        self._buffer, self._in_body = rest, True
        return True

    def _read_chunks(self, now: float) -> None:
        assert self._exchange is not None
        assert self._done is not None
        start = 0
        while True:
            line_end = self._buffer.find(b"\r\n", start)
            if line_end < 0:
                break
            size = int(self._buffer[start:line_end].partition(b";")[0], 16)
            end = line_end + 2 + size
            if len(self._buffer) < end + 2:
                break
            if size == 0:
                self._done.set_result(self._keep)
                return
            self._exchange.pieces.append((now, self._buffer[line_end + 2 : end]))
            start = end + 2
        self._buffer = self._buffer[start:]

    def _read_plain(self, now: float) -> None:
        assert self._exchange is not None
        assert self._done is not None
        assert self._left is not None
        if self._buffer:
            self._exchange.pieces.append((now, self._buffer))
            self._left -= len(self._buffer)
            self._buffer = b""
        if self._left <= 0:
            self._done.set_result(self._keep)


def _lines(fields: Mapping[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in fields.items())
