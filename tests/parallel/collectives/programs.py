"""What the tests of collectives run on real ranks."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from phalanx.engine.config import EngineConfig
from phalanx.engine.execution.worker_factory import build_worker
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.parallel.collectives import shared_memory
from phalanx.parallel.collectives.base import CollectiveError, Collectives
from phalanx.parallel.collectives.host_staged import DeviceStagedCollectives, HostStagedCollectives
from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
from phalanx.parallel.control import BroadcastControl
from phalanx.parallel.group import Group, adopt_group


def _group(size: int, collectives: str = "auto", timeout_s: float = 60.0) -> Group:
    world = dist.group.WORLD
    assert world is not None
    device = torch.device("cpu")
    return adopt_group(world, device=device, local_size=size, collectives=collectives, timeout_s=timeout_s)


def exchange(rank: int, size: int, way: str, staged: bool) -> dict[str, object]:
    """Every operation once, for several dtypes and sizes; `staged` goes by way of the host, as if this were none."""
    group = _group(size, way)
    collectives = HostStagedCollectives(group.collectives, group.device) if staged else group.collectives
    results: dict[str, object] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1, 1000, 100_003):
            x = (torch.arange(length) % 7 + rank).to(dtype)
            expected = (torch.arange(length) % 7 * size + sum(range(size))).to(dtype)
            assert torch.equal(collectives.all_reduce(x), expected)
    strided = torch.arange(12.0).view(3, 4).T + rank
    assert torch.equal(collectives.all_reduce(strided), torch.arange(12.0).view(3, 4).T * size + sum(range(size)))
    gathered = collectives.gather(torch.tensor([rank, 2**40 + rank]), dst=size - 1)
    results["gathered"] = None if gathered is None else [part.tolist() for part in gathered]
    results["broadcast"] = collectives.broadcast(torch.full((3,), float(rank)), src=size - 1).tolist()
    collectives.barrier()
    collectives.warmup([1, 64])
    _add_norm(collectives)
    collectives.close()
    group.close()
    return results


def _add_norm(collectives: Collectives) -> None:
    rank, size = collectives.rank, collectives.size
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (None, torch.full((64,), 2.0, dtype=dtype)):
            x = (torch.arange(192) % 7 + rank).view(3, 64).to(dtype)
            total, weight = torch.arange(192.0).view(3, 64), torch.linspace(0.5, 2.0, 64)
            expected = total + x.float() * size + sum(range(size)) - rank * size + (0 if bias is None else 2)
            normed = collectives.add_reduced_norm(x, bias, total, weight, 1e-6, dtype)
            assert torch.equal(total, expected)
            assert normed.dtype == dtype
            torch.testing.assert_close(normed, torch.nn.functional.rms_norm(expected, (64,), weight, 1e-6).to(dtype))


def hosts(rank: int, size: int, way: str) -> tuple[str, str, str]:
    """What carries a group's small CPU tensors and plans, and what is said of it."""
    group = _group(size, way)
    assert group.host.device == torch.device("cpu")
    assert group.host.all_reduce(torch.ones(3)).tolist() == [size] * 3
    kind = type(group.host).__name__
    if isinstance(group.host, ProcessGroupCollectives):
        assert group.host._group is not dist.group.WORLD
        kind = group.host._group.name()
    if isinstance(group.control, BroadcastControl):
        assert group.control._collectives is group.host
    names = (kind, type(group.control).__name__, group.words)
    group.close()
    return names


def hosts_where_memory_cannot_be_shared(rank: int, size: int) -> tuple[str, str, str]:
    """The same where a rank misses the extension."""
    if rank == size - 1:
        shared_memory._native = None
        shared_memory._missing = "no such file"
    return hosts(rank, size, "auto")


def by_way_of_a_device(rank: int, size: int) -> list[object]:
    """Every operation as for a process group that carries tensors of a device alone, which is a CPU here."""
    world = dist.group.WORLD
    assert world is not None
    collectives = DeviceStagedCollectives(ProcessGroupCollectives(world, torch.device("cpu")))
    collectives.barrier()
    x = torch.tensor([rank, 2**40])
    gathered = collectives.gather(x, dst=1)
    return [
        collectives.all_reduce(x.clone()).tolist(),
        collectives.broadcast(x.clone(), src=1).tolist(),
        gathered and [part.tolist() for part in gathered],
    ]


def wait_for_a_late_rank(rank: int, count: int, late: int) -> tuple[list[float], list[float]]:
    """What each rank has waited, read by all of them: before any operation, and after one to which `late` came late."""
    from phalanx.parallel.collectives.shared_memory import SharedMemoryCollectives

    host = ProcessGroupCollectives(dist.group.WORLD, torch.device("cpu"))
    collectives = SharedMemoryCollectives.connect(host, 60.0)
    before = collectives.waited_s
    if rank == late:
        time.sleep(1.5)  # far longer than the others may be late themselves, on a busy machine
    for _ in range(2):  # what a rank has waited is published when it enters the next operation
        collectives.barrier()
    host.barrier()
    after = collectives.waited_s
    host.barrier()
    collectives.close()
    assert collectives.waited_s == []
    return before, after


def control(rank: int, size: int, messages: list[bytes], way: str) -> list[bytes]:
    """What each rank heard of the messages that rank 0 sent."""
    group = _group(size, way)
    heard = []
    for message in messages:
        if rank == 0:
            group.control.send(message)
        else:
            heard.append(group.control.receive())
    group.close()
    return heard


def lose_a_rank(rank: int, size: int, folder: str, way: str) -> str:
    """The last rank leaves without a word; the others say what they saw. Never returns through the group again."""
    group = _group(size, way, timeout_s=20.0)
    group.collectives.barrier()
    if rank == size - 1:
        os._exit(0)
    try:
        for _ in range(100):
            group.collectives.all_reduce(torch.ones(1000))
            time.sleep(0.01)
    except CollectiveError as error:
        (Path(folder) / str(rank)).write_text(str(error))
    os._exit(0)


def load(rank: int, size: int, folder: str) -> dict[str, int]:
    """Bytes read, bytes of the shard, and how far the peak of this process's memory rose while a worker was built."""
    group = _group(size)
    config = EngineConfig(model=folder, ranks=size, kv_memory=2**20, max_model_len=64, max_num_seqs=1)
    spec = spec_from_config(read_config(Path(folder)), folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    worker = build_worker(config, spec, Path(folder), group)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = worker.load_report
    return {"read": report.bytes_read, "shard": report.shard_bytes, "rise": peak - before}
