"""The ranks that hold one model together: who this rank is, and how it reaches the others."""

from __future__ import annotations

import datetime
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .collectives.base import Collectives, CollectivesUnavailable
from .collectives.file_store import FileStoreCollectives
from .collectives.host_staged import DeviceStagedCollectives, HostStagedCollectives
from .collectives.local import LocalCollectives, LocalControl
from .collectives.peer_memory import SymmetricMemoryUnavailable, connect, gpu_identity
from .collectives.process_group import ProcessGroupCollectives
from .collectives.rendezvous import all_gather_ints, boot
from .collectives.shared_memory import SharedMemoryCollectives, SharedMemoryControl, SharedMemoryUnavailable
from .collectives.symmetric_memory import SymmetricMemoryCollectives
from .control import BroadcastControl, ControlChannel

_log = logging.getLogger("phalanx")
_CPU = torch.device("cpu")
_BY_HOST = ("gloo", "shared_memory")
_TRAVEL = "plans and CPU tensors travel"


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
    words: str = ""
    """How plans and CPU tensors travel, for the report; empty if there is one rank."""
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
    host = collectives if device.type == "cpu" else LocalCollectives(_CPU)
    return Group(0, 1, 1, device, collectives, host, LocalControl())


def join_group(
    *,
    rank: int,
    size: int,
    local_rank: int,
    local_size: int,
    device: str,
    collectives: str,
    timeout_s: float,
    store_file: Path | None = None,
    agent_attempt: str | None = None,
) -> Group:
    """Join the ranks that torchrun started (its env:// rendezvous), or those of one host that share `store_file`.

    `device` is cpu or cuda. With a `store_file`, in a folder that only the ranks' user may enter, no rendezvous listens
    anywhere. With `agent_attempt`, which names this start among those of one torchrun, CPU ranks of one host meet over
    the store of torchrun's agent, and open no socket of their own if they can share memory.

    `collectives` is how tensors of the model travel; plans and small CPU tensors never go over NCCL:
    * gloo: over it alone, as everything then does; tensors of a GPU by way of the host;
    * shared_memory: in memory that the ranks of one host share; tensors of a GPU by way of the host;
    * nccl: over it;
    * symmetric_memory: over NCCL, or small sums in memory of the GPUs that all reach;
    * auto: on a CPU as shared_memory, or over gloo if memory cannot be shared; on GPUs as symmetric_memory, or over
      NCCL if theirs cannot; by way of the host if ranks share a GPU, which NCCL refuses.

    Raises CollectivesUnavailable, on all ranks, if what is asked for by name cannot be. A CUDA rank takes card
    local_rank (modulo the cards there are). Size 1 starts no process group.
    """
    where = _CPU
    if device == "cuda":
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    if size == 1:
        return local_group(where)

    # A store is enough for ranks that can share memory; otherwise torch's process group meets over it.
    store: Any = None
    meeting: Any = store_file
    if meeting is None and agent_attempt is not None and device == "cpu" and size == local_size:
        meeting = _torchrun_store(rank, size, timeout_s, agent_attempt)
    if meeting is not None:
        host = FileStoreCollectives(meeting, rank, size, timeout_s)
        if device == "cpu" and collectives in ("auto", "shared_memory"):
            control, shared, words = _within_host(host, collectives, timeout_s)
            if control is not None and shared is not None:
                return Group(rank, size, local_size, where, shared, shared, control, words)
            collectives = "gloo"  # rank 0 has logged why
        store = torch._C._distributed_c10d.PrefixStore("torch", host.store)

    # NCCL connects only when the first tensor of a GPU travels by this group, which may be never.
    backend = "gloo" if device == "cpu" or collectives in _BY_HOST else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s)
    )
    world = dist.group.WORLD
    assert world is not None
    return _group_of(world, where, local_size, collectives, timeout_s, destroy=dist.destroy_process_group)


def _torchrun_store(rank: int, size: int, timeout_s: float, attempt: str) -> Any:
    """Return the store that torchrun's agent keeps for its ranks, as this attempt of theirs may use it.

    It outlives them: what ranks of an earlier attempt wrote would be taken for that of these.
    """
    from torch.distributed.rendezvous import rendezvous

    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    return torch._C._distributed_c10d.PrefixStore(f"phalanx/{attempt}", store)


def adopt_group(
    process_group: dist.ProcessGroup,
    *,
    device: torch.device,
    local_size: int,
    collectives: str,
    timeout_s: float,
) -> Group:
    """Make a group over somebody else's process group. All its ranks call it.

    Ranks of one host share memory, set up over the group itself, and open no socket. Where they cannot, or
    collectives=gloo is set, gloo groups of the same ranks are added, which listen as the caller's own does. Raises
    CollectivesUnavailable as join_group.
    """
    if dist.get_world_size(process_group) == 1:
        return local_group(device)
    return _group_of(process_group, device, local_size, collectives, timeout_s)


def _group_of(
    process_group: dist.ProcessGroup,
    device: torch.device,
    local_size: int,
    collectives: str,
    timeout_s: float,
    destroy: Callable[[], None] | None = None,
) -> Group:
    if collectives == "nccl" and device.type == "cpu":
        raise CollectivesUnavailable("NCCL carries tensors of GPUs only, and these ranks compute on the CPU")

    first = _over(process_group)
    by_host = device.type == "cpu" or collectives in _BY_HOST or _not_by_nccl(process_group, first, device, collectives)
    control, shared, words = _within_host(first, collectives, timeout_s)
    host = shared or _gloo(process_group, timeout_s)
    control = control or BroadcastControl(host)

    carrier: Collectives = ProcessGroupCollectives(process_group, device)
    if by_host:
        carrier = shared or _gloo(process_group, timeout_s)
        carrier = carrier if device.type == "cpu" else HostStagedCollectives(carrier, device)
    if collectives == "symmetric_memory" or (collectives == "auto" and not by_host):
        carrier = _with_symmetric_memory(process_group, carrier, host, collectives, timeout_s)
    return Group(host.rank, host.size, local_size, device, carrier, host, control, words, destroy or (lambda: None))


def has_nccl(process_group: dist.ProcessGroup) -> bool:
    """Whether the group carries tensors of GPUs over NCCL; it may carry those of a CPU over another backend."""
    cuda = torch.device("cuda")
    return cuda in process_group._device_types and process_group._get_backend(cuda).name() == "nccl"


def _gloo(process_group: dist.ProcessGroup, timeout_s: float) -> Collectives:
    """Make another group of the same ranks, for CPU tensors.

    It is made by hand: torch.distributed.new_group names groups by how many a rank has seen, which the caller's ranks
    need not agree on.
    """
    device = _CPU if _CPU in process_group._device_types else torch.device("cuda", torch.cuda.current_device())
    name = torch.tensor(list(uuid.uuid4().bytes), dtype=torch.uint8, device=device)
    dist.broadcast(name, group_src=0, group=process_group)
    prefix = f"phalanx/{bytes(name.tolist()).hex()}"
    store = torch._C._distributed_c10d.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    timeout = datetime.timedelta(seconds=timeout_s)
    gloo = dist.ProcessGroupGloo(store, process_group.rank(), process_group.size(), timeout)
    collectives = ProcessGroupCollectives(gloo, _CPU)
    collectives.barrier()  # nobody leaves while another is still connecting
    return collectives


def _over(process_group: dist.ProcessGroup) -> Collectives:
    """Return collectives of CPU tensors over the group itself, by way of a GPU where it carries no others."""
    if _CPU in process_group._device_types:
        return ProcessGroupCollectives(process_group, _CPU)
    device = torch.device("cuda", torch.cuda.current_device())
    return DeviceStagedCollectives(ProcessGroupCollectives(process_group, device))


def _within_host(
    host: Collectives, collectives: str, timeout_s: float
) -> tuple[ControlChannel | None, Collectives | None, str]:
    """The control channel and collectives of CPU tensors in shared memory, set up over `host`; None if not to be had.

    The text says, for the report, how they travel and why. Raises SharedMemoryUnavailable if asked for them by name.
    """
    control: ControlChannel | None = None
    shared: Collectives | None = None
    words = f"{_TRAVEL} in memory that the ranks share"
    if collectives == "gloo":
        words = f"{_TRAVEL} over gloo, whose sockets listen: collectives=gloo asks for it"
    else:
        try:
            control = SharedMemoryControl.connect(host, timeout_s)
            shared = SharedMemoryCollectives.connect(host, timeout_s)
        except SharedMemoryUnavailable as reason:
            if collectives == "shared_memory":
                raise
            if host.rank == 0:
                _log.warning("ranks talk over gloo, which is slower than shared memory: %s", reason)
            words = f"{_TRAVEL} over gloo, whose sockets listen: {reason}"
    return control, shared, words


def _not_by_nccl(process_group: dist.ProcessGroup, host: Collectives, device: torch.device, collectives: str) -> bool:
    """Whether tensors of these ranks' GPUs cannot go over NCCL. Raises CollectivesUnavailable if they were to."""
    gpus = [tuple(row) for row in all_gather_ints(host, [boot(), gpu_identity(device)])]
    second = next((rank for rank, gpu in enumerate(gpus) if gpu in gpus[:rank]), None)

    if not has_nccl(process_group):
        reason = "their process group has no NCCL"
    elif second is not None:
        reason = (
            f"ranks {gpus.index(gpus[second])} and {second} of {host.size} share a GPU, and NCCL needs one for each"
        )
    else:
        return False

    if collectives == "nccl":
        raise CollectivesUnavailable(reason)
    if host.rank == 0:
        _log.warning("ranks send tensors by way of the host, which is slow: %s", reason)
    return True


def _with_symmetric_memory(
    process_group: dist.ProcessGroup, carrier: Collectives, host: Collectives, collectives: str, timeout_s: float
) -> Collectives:
    """`carrier`, or with symmetric memory for small sums if it can be set up: it must, if it was asked for by name."""
    try:
        memory = connect(process_group, host, carrier.device, timeout_s)
    except SymmetricMemoryUnavailable as reason:
        if collectives == "symmetric_memory":
            raise
        if host.rank == 0:
            _log.warning("ranks talk over NCCL alone, which is slower for small messages: %s", reason)
        return carrier
    return SymmetricMemoryCollectives(carrier, host, memory)
