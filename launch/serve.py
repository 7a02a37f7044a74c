"""OpenAI's API over HTTP with an engine of its own: `python -m phalanx.launch.serve model=... ranks=2 port=8000`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..engine.client.group_process import GroupProcess
from ..engine.config import EngineConfig
from ..engine.errors import ConfigError
from ..serving.pool.pool import Engines
from .cli.compose import Job
from .cli.program import run_program
from .cli.schema import Keys
from .cli.server import read_settings, run_server, server_settings

OWN_GROUP = "own group"


@dataclass
class ServeKeys(Keys):
    """The keys of the server, besides the engine's configuration."""

    @classmethod
    def included(cls) -> tuple[type, ...]:
        """The settings of the server."""
        return server_settings()


class OwnGroup:
    """The server's own group of ranks, each a process: this one imports no torch, and outlives any of them."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._process: GroupProcess | None = None

    async def attach(self, pool: Engines) -> None:
        """Start the group; the pool watches it. Raises ConfigError or CheckpointError for what is seen at once."""
        engine = pool.add(OWN_GROUP)
        # A model that is not on this machine yet is fetched here.
        process = self._process = await asyncio.to_thread(GroupProcess, self._config, wait=False)
        engine.start(process.client, pool.on_change, lambda: process.state.why)

    def close(self) -> None:
        """End every rank."""
        if self._process is not None:
            self._process.close()


def serve(job: Job[ServeKeys]) -> int:
    """Serve until a signal ends it. Returns 128 + the signal."""
    if job.rank_info.launched:
        raise ConfigError(
            f"serve starts its own ranks: run it without torchrun, or start a bare group ({__package__}.worker) under "
            f"torchrun and {__package__}.gateway in front of it"
        )
    group = OwnGroup(job.engine_config())
    try:
        return run_server(read_settings(job), group.attach)
    finally:
        group.close()


if __name__ == "__main__":
    run_program(ServeKeys, serve, f"{__package__}.serve", "OpenAI's API over HTTP, with an engine of its own")
