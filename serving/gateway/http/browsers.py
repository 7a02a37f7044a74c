"""What web pages could have a browser do with a server that asks for no key, and which requests are refused therefore.

A page of another site may send a request, though it reads no answer (cross-site request forgery). And a page whose name
is made to point at 127.0.0.1 is of the server's own site to the browser (DNS rebinding): the name in Host tells.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from ....engine.errors import ConfigError
from ..config import GatewayConfig
from .errors import ApiError
from .exchange import Exchange, Receive, Scope, Send

App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAME = re.compile(r"\*|(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|[0-9a-f:.]+")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d+)?")
_DEFAULT_PORT = re.compile(r"http:.*:80|https:.*:443")
_LOCAL = ("localhost", "local", "internal", "home.arpa")
"""Domains of which nobody can own a name that the rest of the world resolves (RFC 6761, 6762, 8375; ICANN)."""
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_PORT = re.compile(r":\d*$")


def check_hosts(names: Sequence[str]) -> None:
    """Raise ConfigError for a name that no Host can have."""
    for name in names:
        if not _NAME.fullmatch(name.lower()):
            raise ConfigError(
                f"allowed_hosts has {name!r}: give names without a port such as example.org, *.example.org for those "
                f"below it, or * for all"
            )


def check_origins(origins: Sequence[str]) -> None:
    """Raise ConfigError for an origin that no browser sends: the page would be refused, and nobody told why."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin) or _DEFAULT_PORT.fullmatch(origin):
            raise ConfigError(
                f"allow_origins has {origin!r}: give origins as browsers send them, such as https://example.org or "
                f"http://localhost:3000 (in lower case, with no path, no last slash and no port that is the scheme's "
                f"own), or * for all"
            )


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is reached from its own machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return _is_below(host.lower(), "localhost")


class BrowserRules:
    """Which requests are refused as those of web pages."""

    def __init__(
        self, own_host: str, allowed: Sequence[str], origins: Sequence[str], *, keyless_loopback: bool
    ) -> None:
        """`allowed` are the names in Host besides local ones. With none every name is right, unless the server is
        reached from its own machine alone, and asks for no key (`keyless_loopback`): then none is but local ones.

        `origins` are those of web pages that may send requests.
        """
        self._checks_host = bool(allowed) or keyless_loopback
        self._checks_site = keyless_loopback
        self._allowed = [name.lower() for name in allowed]
        self._own = {own_host.lower(), socket.gethostname().lower()}
        self._origins = origins

    def refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is refused; None if it is not."""
        fields = {bytes(name): bytes(value).decode("latin-1").strip() for name, value in scope["headers"]}
        host = _PORT.sub("", fields.get(b"host", "")).lower()
        if self._checks_host and not self._is_allowed(host):
            return ApiError(
                421,
                f"host={host[:100]!r} is not a name of this server: it may be a web page that reaches for it (DNS "
                f"rebinding); if the name is right, start the server with allowed_hosts=[{host[:100]}], or with a key",
                code="host_not_allowed",
            )

        if not self._checks_site or scope["method"] in _SAFE_METHODS or "*" in self._origins:
            return None
        if fields.get(b"sec-fetch-site") == "cross-site" and fields.get(b"origin") not in self._origins:
            origin = fields.get(b"origin", "")[:100]
            return ApiError(
                403,
                f"origin={origin!r} is another site's: web pages send requests to a server without a key only if it is "
                f"started with allow_origins=[{origin}]",
                type="permission_error",
                code="cross_site_request",
            )
        return None

    def _is_allowed(self, host: str) -> bool:
        name = host.removesuffix(".")
        if not name or "." not in name or name in self._own or _is_address(name):
            return True
        if any(_is_below(name, domain) for domain in _LOCAL):
            return True
        for allowed in self._allowed:
            below = allowed.startswith("*.") and name.endswith(allowed[1:])
            if allowed in ("*", name) or below:
                return True
        return False


class BrowserGuard:
    """ASGI middleware: answers what BrowserRules refuse."""

    def __init__(self, app: App, rules: BrowserRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        refusal = self._rules.refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await Exchange(scope, receive, send, GatewayConfig()).fail(refusal)


def _is_below(name: str, domain: str) -> bool:
    return name == domain or name.endswith(f".{domain}")


def _is_address(name: str) -> bool:
    """Whether it is an address, which no page's name can stand for."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
