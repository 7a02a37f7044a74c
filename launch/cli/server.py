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


def server_settings() -> tuple[type, ...]:
    """The settings whose fields are keys of a program that serves HTTP."""
    return GatewayConfig, AuthConfig, ServerConfig, PoolConfig


def read_settings(job: Job[K]) -> Settings:
    """Return a job's settings, with the keys of the environment. Raises ConfigError for a value that cannot be."""
    auth = job.settings(AuthConfig)
    # The processes that are started from here have no use for the keys.
    api_key, admin_key = os.environ.pop("PHALANX_API_KEY", None), os.environ.pop("PHALANX_ADMIN_KEY", None)
    auth = dataclasses.replace(
        auth, api_key=auth.api_key or api_key or None, admin_key=auth.admin_key or admin_key or None
    )
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
