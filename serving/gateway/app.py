"""The gateway as an ASGI app."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route

from ...engine.errors import PhalanxError
from .config import GatewayConfig
from .engine_pool import EnginePool
from .gateway import Gateway
from .http.errors import ApiError, from_engine, internal
from .http.exchange import ClientGone, Exchange, Receive, Scope, Send
from .openapi import openapi_document
from .page import page
from .routes.table import JOURNALED, OPERATIONS, Handler, Operation
from .schemas.chat import ChatRequest
from .schemas.completions import CompletionRequest
from .schemas.tokens import DetokenizeRequest, GenerateRequest, GenerateSampling

_log = logging.getLogger(__name__)


def create_app(
    pool: EnginePool,
    config: GatewayConfig | None = None,
    *,
    middleware: Sequence[Middleware] = (),
    routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """The app in front of `pool`. `routes` come beside the gateway's own, `middleware` around all of them.

    app.state.gateway is the Gateway: its admission tells how much is open.
    """
    gateway = Gateway(pool, config or GatewayConfig())
    own = [
        # A model's name may hold slashes.
        Route(
            operation.path.replace("{model}", "{model:path}"),
            _endpoint(gateway, operation),
            methods=[operation.method],
        )
        for operation in OPERATIONS
    ]
    others = [
        Route("/", Endpoint(gateway, page), methods=["GET"]),
        Route("/openapi.json", Endpoint(gateway, _openapi), methods=["GET"]),
    ]
    app = Starlette(
        routes=[*own, *others, *routes],
        middleware=[*middleware, Middleware(_WithoutLastSlash)],
        exception_handlers={HTTPException: _RoutingError(gateway.config)},
    )
    app.router.redirect_slashes = False
    app.state.gateway = gateway
    return app


class Endpoint:
    """One route: runs its handler, and answers with the error that the handler raises."""

    def __init__(self, gateway: Gateway, handler: Handler, fields: Mapping[str, str] | None = None) -> None:
        """`fields` has the request's path for each field of the protocol."""
        self._gateway = gateway
        self._handler = handler
        self._fields = fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self.answer(Exchange(scope, receive, send, self._gateway.config, self._gateway.bodies))

    async def answer(self, exchange: Exchange) -> None:
        """Answer an exchange, whoever it belongs to."""
        try:
            try:
                await self._handler(self._gateway, exchange)
            except ApiError as error:
                await exchange.fail(error)
            except PhalanxError as error:
                made = from_engine(error, self._fields)
                if made.status == 429:
                    made.headers["Retry-After"] = str(self._gateway.admission.retry_after())
                if made.status >= 500:
                    _log.error("request %s failed: %s: %s", exchange.request_id, type(error).__name__, error)
                await exchange.fail(made)
        except (ClientGone, ConnectionError):
            _log.info("request %s: the client closed its connection", exchange.request_id)
        except Exception:
            _log.exception("request %s failed", exchange.request_id)
            await exchange.fail(internal())


def _endpoint(gateway: Gateway, operation: Operation) -> Endpoint:
    """The route of an operation; by way of the journal, if there is one and it keeps such requests."""
    endpoint = Endpoint(gateway, operation.handler, _paths(operation))
    if gateway.journaling is None or operation.handler not in JOURNALED:
        return endpoint
    durable = gateway.journaling.requests
    durable.routes[operation.path] = endpoint.answer

    async def journaled(_: Gateway, exchange: Exchange) -> None:
        await durable.serve(exchange, endpoint.answer)

    return Endpoint(gateway, journaled)


def _paths(operation: Operation) -> dict[str, str]:
    """The path that each field of the protocol has in an operation's request: refusals of the engine begin with it."""
    if operation.request is None:
        return {}
    paths = {name: name for name in operation.request.__struct_fields__}
    if operation.request is ChatRequest:
        paths["prompt"] = "messages"
    elif operation.request is CompletionRequest:
        paths["token_ids"] = "prompt"
    elif operation.request is GenerateRequest:
        paths |= {name: f"sampling_params.{name}" for name in GenerateSampling.__struct_fields__}
        paths["prompt"] = "token_ids"
    elif operation.request is DetokenizeRequest:
        paths["token_ids"] = "tokens"
    return paths


class _WithoutLastSlash:
    """Takes what is sent to a path with a slash too many for what was meant: /v1/completions/ (clients join paths so).

    Other methods' paths may end with an id, which is missing then.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            scope = {**scope, "path": scope["path"].removesuffix("/") or "/"}
        await self._app(scope, receive, send)


class _RoutingError:
    """Answers where no route does: 404, 405."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    async def __call__(self, request: Any, error: Exception) -> Any:
        """The answer, as Starlette's exception handlers return it."""
        assert isinstance(error, HTTPException)
        method, path = request.scope["method"], request.scope["path"][:100]
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            made = ApiError(405, f"{path} does not take {method}; it takes {allowed}", code="method_not_allowed")
        elif error.status_code == 404:
            made = ApiError(404, f"there is no route {path}", type="not_found_error", code="not_found")
        else:
            made = ApiError(error.status_code, str(error.detail))
        made.headers.update(error.headers or {})

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            exchange = Exchange(scope, receive, send, self._config)
            await exchange.fail(made)

        return answer


async def _openapi(gateway: Gateway, exchange: Exchange) -> None:
    """The OpenAPI document."""
    await exchange.respond(msgspec.json.encode(openapi_document()))
