"""The ranks that hold one model together: who this rank is, and how it reaches the others."""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from .collectives.base import Collectives
from .collectives.local import LocalCollectives
from .collectives.process_group import ProcessGroupCollectives
from .collectives.shared_memory import SharedMemoryCollectives, SharedMemoryControl, SharedMemoryUnavailable
from .control import BroadcastControl, ControlChannel, LocalControl

_log = logging.getLogger("phalanx")


@dataclass(frozen=True)
class Group:
    """One rank's view of its tensor-parallel group.

    `collectives` carry tensors on `device`; `host` carries small CPU tensors; `control` carries rank 0's plans.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    collectives: Collectives
    host: Collectives
    control: ControlChannel
    _destroy: Callable[[], None] = field(default=lambda: None, repr=False)

    def close(self) -> None:
        """Release what was made for this group; a process group passed in by the caller stays."""
        self.collectives.close()
        self.control.close()
        self.host.close()
        self._destroy()


def local_group(device: torch.device) -> Group:
    """A group of one rank: no process group, no global state."""
    collectives = LocalCollectives(device)
    host = collectives if device.type == "cpu" else LocalCollectives(torch.device("cpu"))
    return Group(0, 1, 1, device, collectives, host, LocalControl())


def join_group(
    *,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    device: str,
    backend: str,
    shared_memory: bool | None,
    timeout_s: float,
) -> Group:
    """Join the ranks that torchrun started (its env:// rendezvous). `device` is cpu or cuda, `backend` gloo or nccl.

    `shared_memory` says whether ranks of one host reach each other through it: True insists, and raises
    SharedMemoryUnavailable; None takes `backend` where it cannot be; False never tries. On CUDA it carries the plans
    alone. A CUDA rank takes card local_rank (modulo the cards there are). Size 1 starts no process group.
    """
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    if size == 1:
        return local_group(where)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s))
    world = dist.group.WORLD
    assert world is not None
    return _group_of(world, where, local_size, shared_memory, timeout_s, destroy=dist.destroy_process_group)


def adopt_group(
    process_group: dist.ProcessGroup,
    *,
    device: torch.device,
    local_size: int,
    shared_memory: bool | None,
    timeout_s: float,
) -> Group:
    """A group over somebody else's process group; called by all its ranks. Only a gloo group of its own is added, and
    shared memory as in join_group.
    """
    if dist.get_world_size(process_group) == 1:
        return local_group(device)
    return _group_of(process_group, device, local_size, shared_memory, timeout_s)


def _group_of(
    process_group: dist.ProcessGroup,
    device: torch.device,
    local_size: int,
    shared_memory: bool | None,
    timeout_s: float,
    destroy: Callable[[], None] | None = None,
) -> Group:
    collectives: Collectives = ProcessGroupCollectives(process_group, device)
    # Plans and small CPU tensors travel apart from the model's collectives, never over NCCL. The group for them is made
    # by hand: torch.distributed.new_group names groups by how many a rank has seen, which the caller's ranks need not
    # agree on.
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, group_src=0, group=process_group)
    store = torch._C._distributed_c10d.PrefixStore(f"phalanx/{name[0]}", dist.distributed_c10d._get_default_store())
    gloo = dist.ProcessGroupGloo(store, collectives.rank, collectives.size, datetime.timedelta(seconds=timeout_s))
    host: Collectives = ProcessGroupCollectives(gloo, torch.device("cpu"))
    control: ControlChannel = BroadcastControl(host)
    if shared_memory is not False:
        try:
            control = SharedMemoryControl.connect(host, timeout_s)
            if device.type == "cpu":
                collectives = SharedMemoryCollectives.connect(host, timeout_s)
        except SharedMemoryUnavailable as reason:
            if shared_memory:
                raise
            if collectives.rank == 0:
                _log.warning("ranks talk over gloo, which is slower than shared memory: %s", reason)
    return Group(
        collectives.rank,
        collectives.size,
        local_size,
        device,
        collectives,
        host,
        control,
        destroy or (lambda: None),
    )
