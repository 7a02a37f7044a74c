"""What the programs that serve HTTP share: their settings, the line that says they are ready, their end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ...serving.gateway.auth import AuthConfig
from ...serving.gateway.config import GatewayConfig
from ...serving.pool.config import PoolConfig
from ...serving.pool.pool import Engines
from ...serving.server import GRACE_S, Server, ServerConfig, Settings
from ..ranks.process import STOP_TIMEOUT_S, stop_on_signals
from .compose import Job
from .schema import Keys

K = TypeVar("K", bound=Keys)

_FROM_ENVIRONMENT = {"api_key": "PHALANX_API_KEY", "admin_key": "PHALANX_ADMIN_KEY"}


def server_settings() -> tuple[type, ...]:
    """The settings whose fields are keys of a program that serves HTTP."""
    return GatewayConfig, AuthConfig, ServerConfig, PoolConfig


def read_settings(job: Job[K]) -> Settings:
    """Return a job's settings, with the keys of the environment. Raises ConfigError for a value that cannot be."""
    auth = job.settings(AuthConfig)
    for field, variable in _FROM_ENVIRONMENT.items():
        value = os.environ.pop(variable, None)  # the processes started from here have no use for it
        if value and getattr(auth, field) is None:
            auth = dataclasses.replace(auth, **{field: value})
    return Settings(job.settings(ServerConfig), job.settings(GatewayConfig), auth, job.settings(PoolConfig))


def run_server(settings: Settings, attach: Callable[[Engines], Awaitable[None]]) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns 128 + the signal. `attach` gives the pool its engines.

    Raises ConfigError for settings that cannot be used, and the error that kept all engines from starting.
    """
    server = Server(settings)
    stopped_by: list[int] = []

    def stop(number: int) -> None:
        stopped_by.append(number)
        server.stop()

    stop_on_signals(stop, settings.server.drain_timeout_s + GRACE_S + STOP_TIMEOUT_S)
    server.run(attach, _say_ready)
    return 128 + stopped_by[0] if stopped_by else 1


def _say_ready(server: Server, pool: Engines) -> None:
    print(f"phalanx is ready at {server.url} with {next(iter(pool.models()))}", flush=True)
