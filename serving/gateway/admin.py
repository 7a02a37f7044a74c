"""The administrator's routes: which engines there are, and which of them take requests. See auth.py for the key."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ...engine.errors import InvalidRequest
from .engine_pool import PoolState
from .http.errors import ApiError

MAX_BODY_BYTES = 4096


class AdministeredEngine(Protocol):
    """What is said of one engine."""

    label: str
    name: str
    open_requests: int

    @property
    def phase(self) -> str:
        """loading, ready, draining or stopped."""

    @property
    def trouble(self) -> str:
        """Why it is stopped or does not go on; empty while all is well."""


class AdministeredPool(Protocol):
    """What the routes need of the pool."""

    @property
    def state(self) -> PoolState:
        """The phase of all engines together."""

    @property
    def engines(self) -> Any:
        """The engines, in their order."""

    def drain(self, name: str) -> Any:
        """Send nothing more to an engine. Raises InvalidRequest for an unknown name."""

    def resume(self, name: str) -> Any:
        """Send requests to a drained engine again. Raises InvalidRequest for an unknown name."""


class _Named(msgspec.Struct, forbid_unknown_fields=True):
    engine: str | int


def admin_routes(pool: AdministeredPool) -> list[Route]:
    """GET /admin/engines, and POST /admin/drain and /admin/resume with {"engine": NUMBER or ADDRESS}."""

    async def engines(request: Request) -> Response:
        return _json({"state": pool.state.phase, "engines": [_described(engine) for engine in pool.engines]})

    async def drain(request: Request) -> Response:
        return await changed(request, pool.drain)

    async def resume(request: Request) -> Response:
        return await changed(request, pool.resume)

    async def changed(request: Request, change: Any) -> Response:
        try:
            named = await _read(request)
            return _json(_described(change(str(named.engine))))
        except ApiError as error:
            return _json(error.body, error.status)
        except InvalidRequest as error:
            return _json(ApiError(404, str(error), param="engine", code="engine_not_found").body, 404)

    return [
        Route("/admin/engines", engines, methods=["GET"]),
        Route("/admin/drain", drain, methods=["POST"]),
        Route("/admin/resume", resume, methods=["POST"]),
    ]


async def _read(request: Request) -> _Named:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is longer than {MAX_BODY_BYTES} bytes", code="body_too_large")
    try:
        return msgspec.json.decode(body, type=_Named)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f'the body must be {{"engine": NUMBER or ADDRESS}}: {error}', param="engine") from error


def _described(engine: AdministeredEngine) -> dict[str, object]:
    return {
        "engine": engine.label,
        "name": engine.name,
        "state": engine.phase,
        "trouble": engine.trouble or None,
        "open_requests": engine.open_requests,
    }


def _json(content: object, status: int = 200) -> Response:
    body = content if isinstance(content, bytes) else msgspec.json.encode(content)
    return Response(body, status, media_type="application/json")
