"""OpenAI's API over HTTP in front of groups that run elsewhere: `python -m phalanx.launch.gateway engines=[tcp://...]`.

Each group is started by `torchrun ... -m phalanx.launch.worker`, and all have the same model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine.client.client import Client
from ..engine.client.resume.connection import ResumingConnection
from ..engine.errors import ConfigError
from ..engine.protocol.secret import check_address, read_secret
from ..engine.protocol.transport import Connection, ZmqConnection
from ..serving.pool.pool import Engines
from .cli.compose import Job
from .cli.program import run_program
from .cli.schema import Keys
from .cli.server import read_settings, run_server, server_settings


@dataclass
class GatewayKeys(Keys):
    """The keys of the gateway. Those of the engine's configuration belong to the groups and are not read here."""

    engines: list[str] = field(default_factory=list)
    """Addresses of the groups: [ipc:///run/engine] on this host, [tcp://host-a:5555,tcp://host-b:5555] elsewhere."""
    secret_file: str | None = None
    """The file whose secret the groups at tcp:// addresses have; chmod 600. ipc:// needs none."""

    @classmethod
    def included(cls) -> tuple[type, ...]:
        """The settings of the server."""
        return server_settings()


def gateway(job: Job[GatewayKeys]) -> int:
    """Serve until a signal ends it. Returns 128 + the signal."""
    addresses = job.keys.engines
    if not addresses:
        raise ConfigError("engines is not set; it must be a list such as [ipc:///run/engine] or [tcp://host-a:5555]")
    if len(set(addresses)) != len(addresses):
        raise ConfigError(f"engines={addresses} holds an address twice: give each once")
    secret = None if job.keys.secret_file is None else read_secret(job.keys.secret_file)
    for address in addresses:
        check_address(address, secret)

    async def attach(pool: Engines) -> None:
        for address in addresses:
            connection: Connection = ZmqConnection(address, secret if address.startswith("tcp://") else None)
            if len(addresses) == 1:  # several take over from one another
                connection = ResumingConnection(connection, pool.config.restart_wait_s)
            pool.add(address, Client(connection))

    return run_server(read_settings(job), attach)


if __name__ == "__main__":
    run_program(GatewayKeys, gateway, f"{__package__}.gateway", "OpenAI's API over HTTP, in front of running groups")
