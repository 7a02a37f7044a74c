"""A whole server: the gateway's app, its middleware and its engines, from the first connection to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import uvloop
from prometheus_client import ProcessCollector
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..engine.errors import ConfigError
from .gateway.admin import admin_routes
from .gateway.app import create_app
from .gateway.auth import Auth, AuthConfig, read_keys
from .gateway.config import GatewayConfig
from .gateway.durable.journal_metrics import JournalMetrics
from .gateway.http.browsers import BrowserGuard, BrowserRules, is_loopback
from .gateway.http.server import make_server
from .gateway.logs import LEVELS, AccessLog, configure_logging, log_fields
from .gateway.metrics import CONTENT_TYPE
from .pool.config import PoolConfig
from .pool.pool import Engines

GRACE_S = 2.0
"""Seconds in which the last answers are written, once every request has ended."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens, logs and ends. Raises ConfigError for a value that cannot be."""

    ssl_certfile: str | None = None
    """A certificate chain (PEM) with which the server speaks HTTPS."""
    ssl_keyfile: str | None = None
    """The certificate's private key (PEM), if it is not in ssl_certfile."""
    backlog: int = 2048
    """Connections that the operating system holds until they are accepted."""
    drain_timeout_s: float = 30.0
    """Seconds that requests have to finish after Ctrl-C or SIGTERM; what has not by then fails. A second signal ends
    the server at once."""
    log_level: str = "info"
    """Least level of the log, which is JSON on standard error: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError(f"ssl_keyfile={self.ssl_keyfile!r} needs its certificate: set ssl_certfile")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                raise ConfigError(f"{name}={path!r} is not a file")
        if not self.backlog >= 1:
            raise ConfigError(f"backlog={self.backlog!r} is out of range: it must be at least 1")
        if not self.drain_timeout_s >= 0:
            raise ConfigError(f"drain_timeout_s={self.drain_timeout_s!r} is out of range: it must be at least 0")
        if self.log_level not in LEVELS:
            raise ConfigError(f"log_level={self.log_level!r} is not supported; it must be one of {', '.join(LEVELS)}")


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a server."""

    server: ServerConfig
    gateway: GatewayConfig
    auth: AuthConfig
    pool: PoolConfig


class Server:
    """Serves HTTP from run()'s beginning, first with 503, then with what the engines answer, until stop()."""

    def __init__(self, settings: Settings) -> None:
        """Bind the address. Raises ConfigError for settings that cannot be used."""
        self._settings = settings
        read_keys(settings.auth)  # a wrong one is told before a model is loaded
        config = settings.server
        self._tls: dict[str, Any] = {}
        if config.ssl_certfile is not None:
            self._tls = {"ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
            _check_tls(config)
        self._socket = _listen(settings.gateway, config.backlog)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host, port = self._socket.getsockname()[:2]
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, attach: Callable[[Engines], Awaitable[None]], on_ready: Callable[[Server, Engines], None]) -> None:
        """Serve until stop() is called and everything has ended.

        `attach` gives the pool its engines. `on_ready` is called once one of them takes requests. Raises the error that
        kept all engines from starting.
        """
        configure_logging(self._settings.server.log_level)
        try:
            uvloop.run(self._run(attach, on_ready))
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Drain, then end; from any thread, also from a signal handler."""
        loop = self._loop
        if loop is None:
            self._stop.set()
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            loop.call_soon_threadsafe(self._stop.set)

    async def _run(
        self, attach: Callable[[Engines], Awaitable[None]], on_ready: Callable[[Server, Engines], None]
    ) -> None:
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        pool = Engines(settings.pool, settings.gateway.served_model_names)
        app = make_app(pool, settings)
        app.state.gateway.start()

        http = make_server(
            app,
            settings.gateway,
            backlog=settings.server.backlog,
            timeout_graceful_shutdown=GRACE_S,
            **self._tls,
        )
        http.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]

        stopped = asyncio.create_task(self._stop.wait())
        serving = asyncio.create_task(http.serve([self._socket]))
        try:
            await attach(pool)
            ready = asyncio.create_task(pool.wait_until_ready())
            await asyncio.wait((ready, stopped, serving), return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
                on_ready(self, pool)
                await asyncio.wait((stopped, serving), return_when=asyncio.FIRST_COMPLETED)

            ready.cancel()
            await self._drain(pool)
        finally:
            # What is left fails now, and its callers are told; of a journal it is computed after the next start.
            app.state.gateway.stop()
            await pool.close()
            http.should_exit = True
            await serving
            stopped.cancel()
            await asyncio.to_thread(app.state.gateway.close)

    async def _drain(self, pool: Engines) -> None:
        timeout_s = self._settings.server.drain_timeout_s
        _log.info("draining", extra=log_fields(open_requests=pool.open_requests))
        if not await pool.drain_all(timeout_s):
            _log.warning(
                "requests had not finished within drain_timeout_s=%g and fail",
                timeout_s,
                extra=log_fields(open_requests=pool.open_requests),
            )


def make_app(pool: Engines, settings: Settings) -> Starlette:
    """The gateway's app with metrics, the administrator's routes and the middleware that is asked for."""

    async def metrics(request: Request) -> Response:
        # Else the requests that run would be those of the last look, beside those that are open now.
        await pool.refresh()
        return Response(pool.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    origins = list(settings.auth.allow_origins)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Request-Id", "Retry-After", "Idempotency-Replayed"],
    )
    keyless_loopback = not read_keys(settings.auth)[0] and is_loopback(settings.gateway.host)
    rules = BrowserRules(settings.gateway.host, settings.auth.allowed_hosts, origins, keyless_loopback=keyless_loopback)
    auth = Middleware(Auth, config=settings.auth)
    app = create_app(
        pool,
        settings.gateway,
        # A browser's question before its request carries no key.
        middleware=[Middleware(AccessLog), *([cors] if origins else []), Middleware(BrowserGuard, rules=rules), auth],
        routes=[Route("/metrics", metrics, methods=["GET"]), *admin_routes(pool)],
    )
    admission = app.state.gateway.admission
    pool.metrics.refused = lambda: int(admission.refused)
    pool.metrics.tasks = lambda: len(asyncio.all_tasks())
    if (journaling := app.state.gateway.journaling) is not None:
        pool.metrics.registry.register(JournalMetrics(journaling))
    ProcessCollector(registry=pool.metrics.registry)  # the gateway's own memory, file descriptors, processor time
    return app


def _listen(config: GatewayConfig, backlog: int) -> socket.socket:
    """Return a socket that listens at the gateway's address. Raises ConfigError if it cannot be had."""
    host = config.host
    port = config.port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host={host!r} is no address of this machine: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(backlog)  # now: until then Linux would let another process bind the address too
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"host={host!r} with port={port} cannot be used: {error.strerror}; choose another port, or 0 for a free one"
        ) from error
    return bound


def _check_tls(config: ServerConfig) -> None:
    try:
        assert config.ssl_certfile is not None
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"ssl_certfile={config.ssl_certfile!r} with ssl_keyfile={config.ssl_keyfile!r} cannot be used: {error}; "
            f"give a certificate and its private key in PEM, without a password"
        ) from error
