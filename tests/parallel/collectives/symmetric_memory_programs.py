"""What the tests of symmetric memory run on real ranks, over a stand-in: files that all ranks have mapped.

The stand-in refuses what torch's operations refuse (CUDASymmetricMemoryOps.cu): dtypes, alignments, foreign memory.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from phalanx.kernels import cuda
from phalanx.parallel import group as group_module
from phalanx.parallel.collectives import peer_memory
from phalanx.parallel.collectives.autotune_table import Threshold
from phalanx.parallel.collectives.base import Collectives, CollectivesUnavailable
from phalanx.parallel.collectives.peer_memory import FUSED, MULTIMEM, ONE_SHOT, TWO_SHOT, PeerMemory
from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
from phalanx.parallel.collectives.symmetric_memory import INNER, UNFUSED, SymmetricMemoryCollectives

CPU = torch.device("cpu")
NAME = "the group"
PART = 4096  # bytes of each of a buffer's three parts


class FakeHandle:
    """What rendezvous() returns."""

    def __init__(self, buffers: list[torch.Tensor], host: Collectives, multicast: bool) -> None:
        self.rank, self.world_size = host.rank, host.size
        self.multicast_ptr = 2**40 if multicast else 0
        self.buffer_ptrs = [buffer.data_ptr() for buffer in buffers]
        self.barriers: list[tuple[int, int]] = []
        self._host = host

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self.barriers.append((channel, timeout_ms))
        self._host.barrier()


class FakeOperations:
    """torch.ops.symm_mem. `taken` are the names of what was called."""

    def __init__(self, buffers: list[torch.Tensor], host: Collectives) -> None:
        self._buffers, self._host = buffers, host
        self.taken: list[str] = []

    def one_shot_all_reduce_copy_out(
        self, place: torch.Tensor, local: torch.Tensor, operation: str, name: str, out: torch.Tensor
    ) -> torch.Tensor:
        self._check("one_shot", place, operation, name)
        assert local.storage_offset() * local.itemsize % 16 == local.data_ptr() % 16 == 0
        assert local.is_contiguous()
        assert out.is_contiguous()
        assert out.shape == place.shape == local.shape
        place.copy_(local)
        self._host.barrier()
        result = self._sum(place)
        self._host.barrier()
        return out.copy_(result)

    def two_shot_all_reduce_(self, place: torch.Tensor, operation: str, name: str) -> torch.Tensor:
        self._check("two_shot", place, operation, name)
        return self._in_place(place)

    def multimem_all_reduce_(self, place: torch.Tensor, operation: str, name: str) -> torch.Tensor:
        self._check("multimem", place, operation, name)
        return self._in_place(place)

    def _in_place(self, place: torch.Tensor) -> torch.Tensor:
        self._host.barrier()
        result = self._sum(place)
        self._host.barrier()
        place.copy_(result)
        self._host.barrier()
        return place

    def _check(self, taken: str, place: torch.Tensor, operation: str, name: str) -> None:
        self.taken.append(taken)
        assert (operation, name) == ("sum", NAME)
        assert place.dtype in (torch.bfloat16, torch.float32), "no other dtype is dispatched"
        assert place.is_contiguous()
        assert place.nbytes % 16 == place.storage_offset() * place.itemsize % 16 == 0
        assert self._offset(place) + place.nbytes <= self._buffers[0].numel()

    def _offset(self, place: torch.Tensor) -> int:
        offset = place.data_ptr() - self._buffers[self._host.rank].data_ptr()
        assert offset >= 0
        return offset

    def _sum(self, place: torch.Tensor) -> torch.Tensor:
        offset = self._offset(place)
        parts = [buffer[offset:][: place.nbytes].view(place.dtype) for buffer in self._buffers]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total


def _records() -> list[str]:
    """What this process logs from now on."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("phalanx").addHandler(handler)
    return records


class Rank:
    """One rank's collectives over the stand-in."""

    def __init__(self, rank: int, size: int, folder: str, *, multicast: bool = True, fused: bool = True) -> None:
        world = dist.group.WORLD
        assert world is not None
        cuda.interpret(fused)
        self.host = ProcessGroupCollectives(world, CPU)
        paths = [Path(folder) / str(r) for r in range(size)]
        paths[rank].write_bytes(bytes(3 * PART))
        self.host.barrier()
        buffers = [torch.from_file(str(path), shared=True, size=3 * PART, dtype=torch.uint8) for path in paths]
        self.handle = FakeHandle(buffers, self.host, multicast)
        self.operations = FakeOperations(buffers, self.host)
        self.memory = PeerMemory(buffers[rank], self.handle, NAME, 60.0, self.operations)
        self.collectives = SymmetricMemoryCollectives(ProcessGroupCollectives(world, CPU), self.host, self.memory)

    def taken(self) -> list[str]:
        """What was called since the last time."""
        names = self.operations.taken + ["fused"] * len(self.handle.barriers)
        self.operations.taken, self.handle.barriers = [], []
        return names


def sums(rank: int, size: int, folder: str) -> None:
    """Messages go as the table says, sum up, and none disturbs another; what the memory cannot do goes elsewhere."""
    ranks = Rank(rank, size, folder)
    collectives = ranks.collectives
    table = (Threshold(64, ONE_SHOT), Threshold(512, TWO_SHOT), Threshold(1024, INNER), Threshold(2**20, MULTIMEM))
    ways: list[tuple[torch.dtype, int, list[str]]] = [
        (torch.float32, 16, ["one_shot"]),
        (torch.bfloat16, 32, ["one_shot"]),
        (torch.bfloat16, 256, ["two_shot"]),
        (torch.float32, 256, []),
        (torch.bfloat16, 2048, ["multimem"]),
        (torch.bfloat16, 2056, []),  # more than a part holds
        (torch.float32, 5, []),  # not a multiple of 16 bytes
        (torch.float16, 32, []),  # a dtype that torch's operations do not know
        (torch.float32, 0, []),
    ]
    kept = []
    for tuned in (False, True):
        collectives.use(table if tuned else (), ())
        for dtype, length, names in ways:
            x = (torch.arange(length) % 7 + rank).to(dtype)
            expected = (torch.arange(length) % 7 * size + sum(range(size))).to(dtype)
            total = torch.ones(length)
            kept.append((collectives.all_reduce(x.clone()), expected))
            collectives.add_reduced(x, total)
            assert torch.equal(total, expected.float() + 1)
            assert ranks.taken() == (names * 2 if tuned else []), (dtype, length)
    for result, expected in kept:
        assert torch.equal(result, expected), "a later message has overwritten a result"
    misplaced = (torch.zeros(20) + rank)[1:17]
    assert torch.equal(collectives.all_reduce(misplaced), torch.full((16,), float(sum(range(size)))))
    strided = torch.full((4, 4), float(rank)).T
    assert torch.equal(collectives.all_reduce(strided[:, :]), torch.full((4, 4), float(sum(range(size)))))
    assert ranks.taken() == ["one_shot", "one_shot"]
    others(collectives)
    collectives.close()


def others(collectives: Collectives) -> None:
    """Gather and broadcast."""
    rank, size = collectives.rank, collectives.size
    gathered = collectives.gather(torch.tensor([rank]), dst=size - 1)
    assert [part.tolist() for part in gathered or []] == ([[r] for r in range(size)] if rank == size - 1 else [])
    assert collectives.broadcast(torch.tensor([rank]), src=1).tolist() == [1]
    collectives.barrier()


def fused(rank: int, size: int, folder: str) -> None:
    """Fused and unfused calls, in an order all know and with pauses of each rank's own, against the definition."""
    ranks = Rank(rank, size, folder)
    collectives = ranks.collectives
    shared, own = random.Random(7), random.Random(rank)
    collectives.use((Threshold(2**20, TWO_SHOT),), (Threshold(64, UNFUSED), Threshold(2**20, FUSED)))
    for step in range(12):
        rows, columns = shared.choice([(1, 16), (3, 64), (1, 1000), (2, 24), (5, 1000)])
        dtype = shared.choice([torch.bfloat16, torch.float16, torch.float32])
        generator = torch.Generator().manual_seed(step)
        # Small whole numbers, which every dtype and every order of sums has exactly.
        parts = torch.randint(-8, 9, (size, rows, columns), generator=generator)
        before, weight = torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator)
        bias = torch.randint(-8, 9, (columns,), generator=generator).to(dtype) if step % 3 else None
        total = before.clone()
        time.sleep(own.random() / 50)
        with torch.inference_mode():
            normed = collectives.add_reduced_norm(parts[rank].to(dtype), bias, total, weight, 1e-6, torch.bfloat16)
        added = parts.sum(0).float() if bias is None else parts.sum(0) + bias.float()
        torch.testing.assert_close(total, before + added)
        expected = torch.nn.functional.rms_norm(before + added, (columns,), weight, 1e-6).to(torch.bfloat16)
        torch.testing.assert_close(normed, expected, rtol=1e-2, atol=1e-2)
        bits = normed.view(torch.int16).int()
        assert all(torch.equal(other, bits) for other in collectives.gather(bits) or [])
        nbytes = parts[rank].to(dtype).nbytes
        assert (ranks.taken() == ["fused"]) == (64 < nbytes <= PART and nbytes % 16 == 0)


def tuned(rank: int, size: int, folder: str) -> tuple[Any, Any, list[str]]:
    """The tables that come of times which each rank has measured for itself; and what rank 0 logged."""
    ranks = Rank(rank, size, folder, multicast=False)
    records = _records()
    logging.getLogger("phalanx").setLevel(logging.INFO)
    costs = {"one_shot": 1.0, "two_shot": 9.0, "inner": 20.0, "fused": 3.0}
    measured: list[str] = []

    def measure(call: Callable[[], object]) -> float:
        call()
        [name] = ranks.taken() or ["inner"]
        measured.append(name)
        slow = rank == 1 and name == "one_shot" and measured.count(name) > 2
        return costs[name] + 50 * slow

    ranks.collectives.tune(64, torch.bfloat16, 1000, measure)
    tables = ranks.collectives._sums, ranks.collectives._norms
    ranks.collectives.tune(2**20, torch.bfloat16, 4, measure)  # not one row fits: nothing to find out
    assert ranks.collectives._sums == ranks.collectives._norms == ()
    told = len(records)

    def broken(call: Callable[[], object]) -> float:
        call()
        raise RuntimeError("no capture here")

    ranks.collectives.tune(64, torch.bfloat16, 1000, broken)
    assert ranks.collectives._sums == ranks.collectives._norms == ()
    assert len(records) - told == (rank == 0)
    if rank == 0:
        assert "could not be measured: rank 0 of 2: no capture here" in records.pop()
    x = torch.ones(4, 64)
    assert torch.equal(ranks.collectives.all_reduce(x), torch.full((4, 64), float(size)))
    return *tables, records


def unavailable(rank: int, size: int) -> dict[str, str]:
    """What every rank is told where symmetric memory cannot be set up: all or none."""
    import torch.distributed._symmetric_memory as symmetric_memory

    world = dist.group.WORLD
    host = ProcessGroupCollectives(world, CPU)
    told = {}

    def refused(case: str) -> None:
        with pytest.raises(CollectivesUnavailable) as caught:
            peer_memory.connect(world, host, CPU, 60.0)
        told[case] = str(caught.value)

    refused("a CPU")
    peer_memory.gpu_identity = lambda device: 100 + rank
    peer_memory._visible = lambda device: {100 + r: r for r in range(size if rank else 1)}
    peer_memory._native_atomics = lambda source, target: False
    refused("a GPU that rank 0 does not see")
    peer_memory._visible = lambda device: {100 + r: r for r in range(size)}
    refused("GPUs on PCIe")
    peer_memory._native_atomics = lambda source, target: True
    refused("no allocator")
    symmetric_memory.empty = torch.empty

    def rendezvous(buffer: torch.Tensor, group: Any) -> Any:
        if rank == size - 1:
            raise RuntimeError("no fabric")
        return SimpleNamespace(rank=rank, buffer_ptrs=[0] * size, multicast_ptr=1)

    symmetric_memory.rendezvous = rendezvous
    refused("one rank's failure")
    peer_memory.boot = lambda: 1 + rank
    refused("two hosts")
    return told


def common_algorithms(rank: int, size: int) -> tuple[str, ...]:
    """What a memory offers where the last rank's GPU has no multicast."""
    import torch.distributed._symmetric_memory as symmetric_memory

    world = dist.group.WORLD
    peer_memory.gpu_identity = lambda device: 100 + rank
    peer_memory._visible = lambda device: {100 + r: r for r in range(size)}
    peer_memory._native_atomics = lambda source, target: True
    symmetric_memory.empty = torch.empty
    symmetric_memory.rendezvous = lambda buffer, group: SimpleNamespace(
        rank=rank, buffer_ptrs=[buffer.data_ptr()] * size, multicast_ptr=int(rank < size - 1)
    )
    memory = peer_memory.connect(world, ProcessGroupCollectives(world, CPU), CPU, 60.0)
    assert not memory.fits(MULTIMEM, torch.Size([8]), torch.bfloat16)
    return memory.algorithms


def fall_back(rank: int, size: int) -> tuple[list[str], str]:
    """What is logged where auto does without symmetric memory, and what is raised where it was asked for by name."""
    world = dist.group.WORLD
    assert world is not None
    host = ProcessGroupCollectives(world, CPU)
    records = _records()
    assert group_module._with_symmetric_memory(world, host, host, "auto", 60.0) is host
    with pytest.raises(CollectivesUnavailable) as caught:
        group_module.adopt_group(world, device=CPU, local_size=size, collectives="symmetric_memory", timeout_s=60.0)
    return records, str(caught.value)


def by_host(rank: int, size: int) -> tuple[list[bool], list[str], list[str]]:
    """Whether ranks on GPUs 5, 5 and so on, or 5, 6 and so on, or without NCCL, send by way of the host; and what is
    logged, and raised where NCCL was asked for.
    """
    world = dist.group.WORLD
    assert world is not None
    host = ProcessGroupCollectives(world, CPU)
    records, answers, raised = _records(), [], []
    for gpu, nccl in ((5, True), (5 + rank, True), (5 + rank, False)):
        group_module.gpu_identity = lambda device, gpu=gpu: gpu
        group_module.has_nccl = lambda group, nccl=nccl: nccl
        answers.append(group_module._not_by_nccl(world, host, CPU, "auto"))
        try:
            group_module._not_by_nccl(world, host, CPU, "nccl")
        except CollectivesUnavailable as error:
            raised.append(str(error))
    return answers, records, raised
