"""What the tests of ranks that watch one another run on real ranks."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from phalanx.engine.config import EngineConfig
from phalanx.launch.ranks.rank_info import RankInfo
from phalanx.launch.ranks.torchrun.peer_watch import TICK_S, watch_peers
from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
from phalanx.parallel.collectives.shared_memory import SharedMemoryCollectives
from phalanx.parallel.control import BroadcastControl
from phalanx.parallel.group import Group

LATE_S = 1.0
"""Far more than a rank waits for another before it looks whether that one lives."""


def wait_for_one_that_is_late(rank: int, size: int) -> float:
    """The sum of ones over ranks that watch one another, to which the last one comes late."""
    cpu = torch.device("cpu")
    host = ProcessGroupCollectives(dist.group.WORLD, cpu)
    collectives = SharedMemoryCollectives.connect(host, 60.0)
    group = Group(rank, size, size, cpu, collectives, host, BroadcastControl(host))
    heartbeat = watch_peers(EngineConfig(model="none", ranks=size), group, RankInfo(rank, size, rank, size))
    assert heartbeat is not None
    heartbeat.shares(collectives.segment)
    # Each has looked at all of them.
    time.sleep(3 * TICK_S)
    host.barrier()
    if rank == size - 1:
        time.sleep(LATE_S)
    total = float(collectives.all_reduce(torch.ones(1)))
    host.barrier()
    return total
