"""Who may send requests: API keys, the admin key, a cache salt for each key, and answers to browsers of other origins.

Keys are hashed as soon as they are read, and only hashes are compared, in constant time. No key is in a log, a
representation or an error.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...engine.errors import ConfigError
from .config import GatewayConfig
from .http.browsers import check_hosts, check_origins
from .http.errors import ApiError
from .http.exchange import Exchange

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PREFIX = "/health"
STATUS_PAGE = "/"
"""It holds nothing of the server's: what it shows it asks for, with the key that is typed into it."""
ADMIN_PREFIX = "/admin"
TENANT_SALT = "cache_salt"
"""Under this name in a scope's "state" is the salt of a request's tenant, if tenants are isolated."""
OWNER = "owner"
"""Under this name in a scope's "state" is who sent a request, to what is stored: a digest of its key's hash."""
KEY_BYTES = 8
"""Fewest bytes of a key."""


@dataclass(frozen=True)
class AuthConfig:
    """Who may send requests."""

    api_key: str | None = field(default=None, repr=False)
    """A key that every route but / and /health* then needs, as "Authorization: Bearer KEY" or "x-api-key: KEY"; the
    environment variable PHALANX_API_KEY sets it too. Prefer it, or api_keys_file: a command line is seen by others."""
    api_keys_file: str | None = None
    """A file with more keys, one on each line; chmod 600. Lines that begin with # are left out."""
    admin_key: str | None = field(default=None, repr=False)
    """The key of the routes under /admin, which are refused without one; the environment variable PHALANX_ADMIN_KEY
    sets it too."""
    isolate_tenants: bool = False
    """Whether requests share cached prefixes only with requests of the same API key."""
    allow_origins: tuple[str, ...] = ()
    """Origins of web pages that may read answers (CORS), such as https://example.org; * is all. None by default.
    To a server on the loopback interface without a key, no other pages of other sites may send anything either."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the header Host that are answered beside addresses and local names, such as api.example.org or
    *.example.org; others are answered 421. * is all. Without any, all are answered, but on the loopback interface
    without a key only local ones: a web page could give itself a name that leads to this machine (DNS rebinding)."""

    def __post_init__(self) -> None:
        check_hosts(self.allowed_hosts)
        check_origins(self.allow_origins)


class Keys:
    """The hashes of the keys that are let in."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """`keys` are the keys, each with where it stands. Raises ConfigError for one that is short or that no header
        can hold."""
        digests = set()
        for key, where in keys.items():
            if len(key) < KEY_BYTES or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    f"{where}: a key has {len(key)} characters, or one of them cannot be in a header: use at least "
                    f"{KEY_BYTES} printable ASCII characters without spaces"
                )
            digests.add(_digest(key.encode()))
        self._digests = tuple(sorted(digests))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def find(self, key: bytes) -> bytes | None:
        """Return the hash of a key that is let in, else None; the time does not tell how much of it was right."""
        digest = _digest(key)
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return found


def read_keys(config: AuthConfig) -> tuple[Keys, Keys]:
    """Return the API keys and the admin's. Raises ConfigError for a file that cannot be read or that others may."""
    keys = {} if config.api_key is None else {config.api_key: "api_key"}
    if config.api_keys_file is not None:
        keys |= _read_file(config.api_keys_file)
    admin = {} if config.admin_key is None else {config.admin_key: "admin_key"}
    if config.admin_key is not None and config.admin_key in keys:
        raise ConfigError("admin_key is one of the API keys too: choose another, which only administrators know")
    if config.isolate_tenants and not keys:
        raise ConfigError("isolate_tenants=true tells tenants apart by their key: set api_key or api_keys_file")
    return Keys(keys), Keys(admin)


def tenant_salt(digest: bytes) -> str:
    """Return the cache salt of the tenant whose key has this hash; the key cannot be found from it."""
    return hashlib.blake2b(digest, digest_size=16, person=b"phalanx-tenant").hexdigest()


def owner_of(digest: bytes) -> str:
    """Return by what the owner of the key with this hash is known; the key cannot be found from it."""
    return hashlib.blake2b(digest, digest_size=16, person=b"phalanx-owner").hexdigest()


class Auth:
    """ASGI middleware: lets a request through to its route, or answers 401 or 403."""

    def __init__(self, app: App, config: AuthConfig) -> None:
        """Raises ConfigError; see read_keys."""
        self._app = app
        self._keys, self._admin = read_keys(config)
        self._isolate = config.isolate_tenants

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: no route has one
            return

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await Exchange(scope, receive, send, GatewayConfig()).fail(refusal)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        if _is_under(path, ADMIN_PREFIX):
            if not self._admin:
                return ApiError(
                    403,
                    "the routes under /admin need an admin key, and this server has none: start it with admin_key",
                    type="permission_error",
                    code="admin_disabled",
                )
            found = self._admin.find(_given_key(scope))
            return None if found is not None else _unauthorized("this route needs the server's admin key")

        if not self._keys or path == STATUS_PAGE or _is_under(path, OPEN_PREFIX):
            return None
        found = self._keys.find(_given_key(scope))
        if found is None:
            return _unauthorized('this server needs an API key that it knows: send "Authorization: Bearer KEY"')
        scope.setdefault("state", {})[OWNER] = owner_of(found)
        if self._isolate:
            scope.setdefault("state", {})[TENANT_SALT] = tenant_salt(found)
        return None


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, type="authentication_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )


def _given_key(scope: Scope) -> bytes:
    """Return the key that a request brings; empty without one."""
    given = b""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
        if name == b"x-api-key":
            given = bytes(value.strip())
    return given


def _is_under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(f"{prefix}/")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read_file(path: str) -> dict[str, str]:
    file = Path(os.path.expanduser(path))
    try:
        others = stat.S_IMODE(file.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"api_keys_file={path!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_keys_file={path!r} is no text: write one key on each line") from error
    if others:
        raise ConfigError(f"api_keys_file={path!r} may be used by others than its owner: chmod 600 it")
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = {key: f"api_keys_file={path!r}, line {number}" for number, key in numbered if key and key[0] != "#"}
    if not keys:
        raise ConfigError(f"api_keys_file={path!r} holds no key: write one on each line")
    return keys
