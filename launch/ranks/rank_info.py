"""Which rank a process is, by torchrun's environment variables; a process on its own is rank 0 of 1."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ...engine.errors import ConfigError

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The network interface of gloo and NCCL, where ranks need them: nobody outside this host reaches it."""
UNKNOWN_RANK = -1
"""The rank of a process that will be forked to become one."""


@dataclass(frozen=True)
class RankInfo:
    """One rank among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Started by torchrun or another launcher, which watches this process's end."""
    agent_attempt: str | None = None
    """Which start of the ranks this is, of a torchrun whose agent serves the store by which they meet: that of a start
    before still holds what those ranks wrote. None where rank 0 would have to serve it."""
    folder: Path | None = None
    """The private folder of a client's own group, through whose files its ranks meet (see own_group.py)."""


def read_rank_info(folder: Path | None = None) -> RankInfo:
    """Return the rank that torchrun, or the supervisor of a group in `folder`, has given this process.

    Raises ConfigError if the environment variables are incomplete or no numbers.
    """
    if "WORLD_SIZE" not in os.environ:
        return RankInfo()

    values: dict[str, int] = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        text = os.environ.get(name, "")
        if not text.isdecimal():
            raise ConfigError(
                f"the environment says {name}={text!r}, where a number belongs: start ranks with torchrun, or unset "
                f"WORLD_SIZE to run without it"
            )
        values[name] = int(text)

    return RankInfo(
        rank=values["RANK"],
        size=values["WORLD_SIZE"],
        local_rank=values["LOCAL_RANK"],
        local_size=values["LOCAL_WORLD_SIZE"],
        launched=True,
        agent_attempt=(
            os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            else None
        ),
        folder=folder,
    )


def rank_environment(rank: int, size: int) -> dict[str, str]:
    """The environment of a rank's process, in which torch finds what torchrun would have set.

    Its last two variables name the rank (see name_rank()). For UNKNOWN_RANK they take as much room as any rank's.
    """
    replaced = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")
    return {
        **{name: value for name, value in os.environ.items() if name not in replaced},
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        **name_rank(rank, size),
    }


def name_rank(rank: int, size: int) -> dict[str, str]:
    """The variables that say which rank of a host's `size` a process is."""
    name = "-" * len(str(size - 1)) if rank == UNKNOWN_RANK else str(rank)
    return {"LOCAL_RANK": name, "RANK": name}
