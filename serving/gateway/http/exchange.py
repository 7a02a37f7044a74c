"""One HTTP request and its answer, over ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ..config import GatewayConfig
from . import error_shapes
from .errors import ApiError, invalid
from .json_body import read_struct, to_struct
from .request_ids import WHAT_MAY_BE, is_request_id, request_id_of, set_request_id

if TYPE_CHECKING:
    from ..durable.open_request import OpenRequest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Request = TypeVar("Request", bound=msgspec.Struct)

_MAX_QUERY_FIELDS = 64

LINGER_S = 2.0
"""Seconds in which the rest of a refused request is read and thrown away."""

_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class BodyBudget:
    """Bytes of request bodies that the gateway holds until they are parsed; more than `most` are refused."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0


class HeldBytes:
    """One request's part of a BodyBudget."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._size = 0

    def grow_to(self, size: int) -> None:
        """Hold `size` bytes in all. Raises ApiError (429) where there is no room for more."""
        more = size - self._size
        if more <= 0:
            return
        budget = self._budget
        if budget.held + more > budget.most:
            raise ApiError(
                429,
                f"the server holds {budget.held} bytes of request bodies, and may hold {budget.most} "
                f"(max_open_body_bytes); try again later",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        budget.held += more
        self._size = size

    def release(self) -> None:
        """Hold nothing any more."""
        self._budget.held -= self._size
        self._size = 0


class Exchange:
    """Reads the request's body, bounded in bytes and time, and sends the answer. Belongs to one task."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, config: GatewayConfig, budget: BodyBudget | None = None
    ) -> None:
        """`budget` is what the bodies of all exchanges have together; without one this body has it alone."""
        self.scope = scope
        self._receive = receive
        self._send = send
        self._config = config
        self._budget = budget or BodyBudget(config.max_open_body_bytes)
        self.started = False
        """Whether the answer's status has been sent."""
        self.status = 0
        self.durable: OpenRequest | None = None
        """What the journal has of this request, if there is a journal and nothing of the answer is sent early."""
        self._path = str(scope.get("path", ""))
        self._held = HeldBytes(self._budget)
        self._body: bytes | None = None

    @property
    def request_id(self) -> str:
        """Echoed in X-Request-Id; the header's, the body's, or one of the gateway's."""
        return request_id_of(self.scope)

    @request_id.setter
    def request_id(self, request_id: str) -> None:
        set_request_id(self.scope, request_id)

    def header(self, name: bytes) -> str | None:
        """A header's value by its lower-case name; the last one if there are several."""
        for key, value in reversed(self.scope["headers"]):
            if key == name:
                return str(value.decode("latin-1"))
        return None

    def salted(self, salt: str | None) -> str:
        """What the prefix cache is salted with: the request's own salt, and the one of the caller's key.

        The middleware that checks keys sets scope["state"]["cache_salt"] where callers share nothing.
        """
        own = str(self.scope.get("state", {}).get("cache_salt", ""))
        return f"{own}/{salt}" if own and salt else own or salt or ""

    def take_request_id(self, given: str | None = None) -> None:
        """Use the header X-Request-Id, or else `given`. Raises ApiError for one that no header can hold."""
        header = self.header(b"x-request-id")
        for each in (header, given):
            if each and not is_request_id(each):
                raise invalid(f"request_id must be {WHAT_MAY_BE}", "request_id")
        self.request_id = header or given or self.request_id

    @property
    def owner(self) -> str:
        """Who the caller is to what is stored: a digest of the API key; "" where the server has no keys."""
        return str(self.scope.get("state", {}).get("owner", ""))

    def read_query(self, kind: type[Request]) -> Request:
        """The parameters after the path's "?" as a struct. Raises ApiError (400) for one that it does not have."""
        text = bytes(self.scope.get("query_string", b"")).decode("latin-1")
        values: dict[str, Any] = {}
        try:
            given = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=_MAX_QUERY_FIELDS)
        except ValueError:
            raise invalid(f"the query has more than {_MAX_QUERY_FIELDS} parameters") from None
        for key, value in given:
            listed = key.endswith("[]")
            name = key.removesuffix("[]")
            if name in values and not listed:
                raise invalid(f"{name} occurs twice in the query", name)
            values[name] = [*values.get(name, []), value] if listed else value
        return to_struct(values, kind, strict=False)

    async def read(self, kind: type[Request], refused: Mapping[str, str] | None = None) -> Request:
        """The body as a struct. Raises ApiError: 400, 408, 413 or 415."""
        self.take_request_id()
        body = await self.read_body()
        self._body = None
        try:
            return await read_struct(body, kind, refused)
        finally:
            self.release_body()

    async def read_body(self) -> bytes:
        """The body's bytes, which count as held until release_body(). Raises ApiError: 408, 413, 415 or 429."""
        if self._body is not None:
            return self._body
        content_type = (self.header(b"content-type") or "application/json").partition(";")[0].strip().lower()
        if content_type != "application/json" and not content_type.endswith("+json"):
            why = f"content-type={content_type!r} is not supported: send application/json"
            raise ApiError(415, why, headers={"Accept": "application/json"})
        encoding = self.header(b"content-encoding")
        if encoding and encoding.strip().lower() != "identity":
            why = f"content-encoding={encoding!r} is not supported: send the body as it is"
            raise ApiError(415, why, headers={"Accept-Encoding": "identity"})
        try:
            self._body = await self._read_body(self._held, self._config.max_body_bytes, "max_body_bytes")
        except BaseException:
            self._held.release()
            raise
        return self._body

    async def read_file(self) -> bytes:
        """The same of a body that is a file, whatever its type is."""
        self.take_request_id()
        try:
            self._body = await self._read_body(self._held, self._config.max_file_bytes, "max_file_bytes")
        except BaseException:
            self._held.release()
            raise
        return self._body

    def hold(self, size: int) -> None:
        """Count so many bytes as held until release_body(). Raises ApiError (429) where there is no room for them."""
        self._held.grow_to(size)

    def release_body(self) -> None:
        """Hold the body no more."""
        self._body = None
        self._held.release()

    async def _read_body(self, held: HeldBytes, limit: int, setting: str) -> bytes:
        declared = self.header(b"content-length") or ""
        if declared.isdigit() and int(declared) > limit:
            raise _too_long(limit, setting)
        held.grow_to(int(declared) if declared.isdigit() else 0)

        chunks: list[bytes] = []
        size = 0
        try:
            deadline = self._config.body_timeout_s
            while True:
                before = asyncio.get_running_loop().time()
                message = await asyncio.wait_for(self._receive(), deadline)
                deadline -= asyncio.get_running_loop().time() - before
                if message["type"] == "http.disconnect":
                    raise ClientGone

                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > limit:
                    raise _too_long(limit, setting)
                held.grow_to(size)
                if not message.get("more_body"):
                    return b"".join(chunks)
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._config.body_timeout_s:g} s (body_timeout_s)",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None

    async def wait_until_gone(self) -> None:
        """Return when the client has closed the connection. To be called once the body has been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(
        self,
        body: bytes,
        status: int = 200,
        *,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send a whole answer."""
        await self._start(status, content_type, {"content-length": str(len(body)), **(headers or {})})
        await self._send({"type": "http.response.body", "body": body})

    async def respond_json(self, value: object, status: int = 200) -> None:
        """Send a struct or plain data as JSON."""
        await self.respond(msgspec.json.encode(value), status)

    async def start_stream(self) -> None:
        """Send the head of a stream of server-sent events."""
        # X-Accel-Buffering: proxies of nginx's kind would hold events back otherwise.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        await self._start(200, "text/event-stream; charset=utf-8", headers)

    async def start_file(self, size: int | None = None) -> None:
        """Send the head of a file of `size` bytes, or of one whose length is not known yet."""
        headers = {} if size is None else {"content-length": str(size)}
        await self._start(200, "application/octet-stream", headers)

    async def write(self, data: bytes, last: bool = False) -> None:
        """Send a part of the stream; returns when the connection takes more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def fail(self, error: ApiError) -> None:
        """Answer with an error; in mid-stream as an event, after which the stream ends."""
        if self.started:
            await self.write(error_shapes.in_stream(self._path, error, self.request_id), last=True)
            return
        status, body = error_shapes.whole(self._path, error, self.request_id)
        if "Connection" in error.headers:
            await self._respond_and_discard(status, body, error.headers)
        else:
            await self.respond(body, status, headers=error.headers)

    async def _respond_and_discard(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer, and read what the client still sends, for a while: closing with unread bytes resets the connection,
        and the client would not see the answer."""
        await self._start(status, "application/json", {"content-length": str(len(body)), **headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._discard(), LINGER_S)
        await self._send({"type": "http.response.body", "body": b""})

    async def _discard(self) -> None:
        while (message := await self._receive())["type"] == "http.request" and message.get("more_body"):
            pass

    async def _start(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.started = True
        self.status = status
        fields = [
            (b"content-type", content_type.encode()),
            (b"x-request-id", self.request_id.encode()),
            *((name.lower().encode(), value.encode()) for name, value in headers.items()),
            *((n.encode(), v.encode()) for n, v in error_shapes.extra_headers(self._path, self.request_id).items()),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})


def _too_long(limit: int, setting: str) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {limit} bytes ({setting})",
        code="body_too_large",
        # What is still to come is not read: the connection cannot serve another request.
        headers={"Connection": "close"},
    )
