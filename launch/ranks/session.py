"""An engine for a program of ours: in this process, on torchrun's ranks, or as a group of its own.

What computes is imported where this process is a rank: a client of its own group starts without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...engine.client.llm import LLM
from ...engine.config import EngineConfig
from ...engine.errors import ConfigError, EngineStopped, PhalanxError
from ...engine.protocol.transport import InProcess
from .rank_info import RankInfo

if TYPE_CHECKING:
    from ...engine.execution.cpu_binding import Binding
    from ...parallel.group import Group
    from ...parallel.loading.checkpoint import Progress


def bind(config: EngineConfig, rank_info: RankInfo) -> Binding:
    """Bind this process, a rank's own, to its CPUs; call it before join(), so that join's memory is on their NUMA node.

    Raises ConfigError if this machine lacks what the settings ask for.
    """
    from ...engine.engine import device_type
    from ...engine.execution.cpu_binding import bind_process

    return bind_process(config, device_type(config), rank_info.local_rank, rank_info.local_size)


def join(config: EngineConfig, rank_info: RankInfo) -> Group:
    """Join this rank's group; all ranks call it. Raises ConfigError if this machine lacks what the settings ask for."""
    from ...engine.engine import device_type
    from ...parallel.collectives.base import CollectivesUnavailable
    from ...parallel.group import join_group

    device = device_type(config)
    if config.collectives in ("nccl", "symmetric_memory") and device == "cpu":
        raise ConfigError(f"collectives={config.collectives} needs device=cuda; with device=cpu set collectives=auto")
    try:
        return join_group(
            rank=rank_info.rank,
            size=rank_info.size,
            local_rank=rank_info.local_rank,
            local_size=rank_info.local_size,
            device=device,
            collectives=config.collectives,
            timeout_s=config.timeout_s,
            store_file=None if rank_info.folder is None else rank_info.folder / "store",
            agent_attempt=rank_info.agent_attempt,
        )
    except CollectivesUnavailable as error:
        raise ConfigError(f"collectives={config.collectives}: {error}; set collectives=auto") from error


def follow(config: EngineConfig, rank_info: RankInfo) -> None:
    """Run a rank other than 0 until rank 0 stops the group."""
    from ...engine.engine import Engine

    binding = bind(config, rank_info)
    group = join(config, rank_info)
    engine = Engine(config, group, None, binding=binding)
    engine.run()
    engine.close()
    group.close()


@contextmanager
def open_llm(config: EngineConfig, rank_info: RankInfo, on_progress: Progress | None = None) -> Iterator[LLM]:
    """Yield an LLM for rank 0, or for a process on its own, which starts a group if ranks > 1. It is closed at the end.

    An error that stopped the engine's steps in this process is raised as it was, with its traceback.
    """
    if not rank_info.launched and config.ranks > 1:
        with LLM.from_config(config, on_progress) as llm:
            yield llm
        return

    from ...engine.engine import Engine

    binding = bind(config, rank_info)
    group = join(config, rank_info)
    link = InProcess()
    engine = Engine(config, group, link.transport, on_progress, binding)
    coordinator = engine.coordinator
    assert coordinator is not None

    try:
        with LLM.from_engine(engine, link) as llm:
            yield llm
    except EngineStopped:
        if coordinator.stopped is not None:
            raise coordinator.stopped from None
        raise
    group.close()


def why_stopped(llm: LLM, error: PhalanxError) -> PhalanxError:
    """Return the fullest account of an EngineStopped: once its group has ended, the client knows which rank failed."""
    try:
        llm.status()
    except PhalanxError as fuller:
        return fuller
    return error
