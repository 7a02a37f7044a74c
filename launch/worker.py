"""`torchrun ... -m phalanx.launch.worker model=... address=ipc://...`: a bare engine group for clients elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from ..engine.errors import ConfigError
from ..engine.protocol.secret import check_address, read_secret
from .cli.compose import Job
from .cli.program import run_program
from .cli.schema import Keys
from .ranks.rank import serve_rank


@dataclass
class WorkerKeys(Keys):
    """The keys of a bare group, besides the engine's configuration."""

    address: str | None = None
    """Where rank 0 serves clients: ipc:///run/engine for its owner on this host, tcp://HOST:5555 for others."""
    endpoint: str | None = None
    """Another name of address."""
    secret_file: str | None = None
    """A file whose secret clients over tcp:// need; chmod 600. ipc:// needs none."""


def work(job: Job[WorkerKeys]) -> int:
    """Serve until a client or a signal ends the group."""
    config = job.engine_config()
    address = job.keys.address
    endpoint = job.keys.endpoint
    if address is not None and endpoint not in (None, address):
        raise ConfigError(f"address={address!r} and endpoint={endpoint!r} are two names of one setting: give one")
    address = address or endpoint
    if address is None:
        raise ConfigError("address is not set; it must be ipc://PATH or tcp://HOST:PORT")
    secret = None if job.keys.secret_file is None else read_secret(job.keys.secret_file)
    check_address(address, secret)

    if config.ranks != job.rank_info.size:
        raise ConfigError(
            f"ranks={config.ranks}, but this is rank {job.rank_info.rank} of {job.rank_info.size}: start as many with "
            f"torchrun --nproc-per-node {config.ranks} -m {__package__}.worker"
        )
    return serve_rank(config, job.rank_info, address, secret)


if __name__ == "__main__":
    run_program(WorkerKeys, work, f"{__package__}.worker", "one rank of an engine that serves clients over ZeroMQ")
