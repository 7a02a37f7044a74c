"""A server that answers every request with so many tokens at once: against it, a client measures itself.

    python benchmarks/lab/http_load/trivial_server.py TOKENS

It prints its port. Each token is an event of its own, written in a turn of its own of the event loop.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":0,"model":"trivial",'
    b'"choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":null}]}\n\n'
)
_END = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":1}}\n\ndata: [DONE]\n\n'


class Trivial(asyncio.Protocol):
    """One connection."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by their class

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        if not end:
            return
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(rest) >= length:
            self._buffer = rest[length:]
            self._write(_HEAD)
            self._next(self._tokens)

    def _next(self, left: int) -> None:
        if left == 0:
            end = _END % self._tokens
            self._write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(end), end))
            return
        self._write(b"%x\r\n%b\r\n" % (len(_TOKEN), _TOKEN))
        asyncio.get_running_loop().call_soon(self._next, left - 1)

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


async def _serve(tokens: int) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Trivial(tokens), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
