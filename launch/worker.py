"""`torchrun ... -m phalanx.launch.worker model=... address=ipc://...`: a bare engine group for clients elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import ConfigError
from .cli.compose import Job
from .cli.program import run_program
from .cli.schema import Keys
from .ranks.rank import serve_rank


@dataclass
class WorkerKeys(Keys):
    """What a bare group is told."""

    address: str | None = None
    """Where rank 0 serves clients: ipc:///run/engine on this host, tcp://127.0.0.1:5555 for others."""


def work(job: Job[WorkerKeys]) -> int:
    """Serve until a client or a signal ends the group."""
    config, address = job.engine_config(), job.keys.address
    if address is None or not address.startswith(("ipc://", "tcp://")):
        raise ConfigError(f"address={address!r} must be ipc://PATH or tcp://HOST:PORT")
    if config.ranks != job.rank_info.size:
        raise ConfigError(
            f"ranks={config.ranks}, but this is rank {job.rank_info.rank} of {job.rank_info.size}: start as many with "
            f"torchrun --nproc-per-node {config.ranks} -m {__package__}.worker"
        )
    return serve_rank(config, job.rank_info, address)


if __name__ == "__main__":
    run_program(WorkerKeys, work, f"{__package__}.worker", "one rank of an engine that serves clients over ZeroMQ")
