"""A request that nobody's connection belongs to, and the whole answer that it gets."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..auth import OWNER, TENANT_SALT
from ..config import GatewayConfig
from ..http.exchange import BodyBudget, Exchange, Message, Scope
from .open_request import OpenRequest

Headers = list[tuple[bytes, bytes]]

_SECRET = (b"authorization", b"x-api-key", b"cookie", b"content-length")
_TEMPORARY = (429, 503, 529)


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    body: bytes
    name: str
    """The request id that it tells."""
    headers: dict[str, str]
    """Those that tell more than its length, type and name do."""

    @property
    def is_refusal(self) -> bool:
        """Whether it says that the request is not computed now, but may be another time."""
        return self.status in _TEMPORARY


class CollectedAnswer:
    """Takes an answer in place of a connection."""

    def __init__(self) -> None:
        self._status = 0
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []

    async def send(self, message: Message) -> None:
        """As ASGI's send."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            self._body.append(message.get("body", b""))

    @property
    def answer(self) -> Answer:
        """The whole of it."""
        headers = {name: self._headers[name] for name in ("retry-after",) if name in self._headers}
        return Answer(self._status, b"".join(self._body), self._headers.get("x-request-id", ""), headers)


def exchange_of(
    opened: OpenRequest, collected: CollectedAnswer, config: GatewayConfig, bodies: BodyBudget, headers: Headers
) -> Exchange:
    """The exchange of a request as its route reads it; its answer is collected. `headers` are the caller's, if any."""
    request = opened.request
    state = {OWNER: request.owner, TENANT_SALT: request.salt}
    own = [(b"content-type", b"application/json"), (b"x-request-id", request.name.encode())]
    known = {name for name, _ in own}
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": request.kind,
        "path_params": {},
        "query_string": b"",
        "headers": [*own, *((name, value) for name, value in headers if name not in known and name not in _SECRET)],
        "state": state,
    }
    unread: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

    async def receive() -> Message:
        if not unread:
            await asyncio.get_running_loop().create_future()  # nobody's connection closes
        return unread.pop()

    exchange = Exchange(scope, receive, collected.send, config, bodies)
    exchange.request_id = request.name
    exchange.durable = opened
    return exchange
