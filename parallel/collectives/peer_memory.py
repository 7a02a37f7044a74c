"""Memory of GPUs of one host that all of them read and write: torch's symmetric memory, and sums made in it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...kernels import cuda
from .base import Collectives, CollectivesUnavailable
from .rendezvous import all_gather_ints, attempt, boot, first_problem, other_host

CAPACITY = 8 * 2**20
"""Bytes of the largest message."""
ONE_SHOT = "one_shot"
TWO_SHOT = "two_shot"
MULTIMEM = "multimem"
SUMS = (ONE_SHOT, TWO_SHOT, MULTIMEM)
FUSED = "fused"
_ALIGNMENT = 16  # bytes: of a message and of where it stands, so that torch's operations move 16 at a time
# torch's operations signal through the first words of the memory's signal pad, one group for each of up to 32 blocks.
# The barrier has the group behind them: some versions count arrivals in words where others set flags.
_BARRIER_CHANNEL = 32
_NATIVE_ATOMICS = 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED of the CUDA driver API


class SymmetricMemoryUnavailable(CollectivesUnavailable):
    """These ranks cannot read and write each other's GPU memory."""


class PeerMemory:
    """This rank's view of the memory. All ranks call the same methods in the same order, each on one stream.

    Every method may be captured in a CUDA graph. Sums have the same bits on all ranks:
    * one_shot: each rank adds all numbers, in rank order and in the message's dtype;
    * two_shot: one rank adds each number, in rank order and in the message's dtype, and hands it to the others;
    * multimem: one rank has each number added in the switch, in float32 and an order of its own, and hands it on;
    * fused: each rank adds all numbers, in rank order and in float32 (kernels/cuda/all_reduce.py).
    """

    def __init__(self, buffer: torch.Tensor, handle: Any, group_name: str, timeout_s: float, operations: Any) -> None:
        """`buffer` is uint8 in symmetric memory, known to the others through `handle`, on which all have met.

        `operations` are those of torch.ops.symm_mem.
        """
        self._buffer = buffer
        self._handle = handle
        self._name = group_name
        self._operations = operations
        self._timeout_ms = int(timeout_s * 1000)

        self.capacity = buffer.numel() // 3 // _ALIGNMENT * _ALIGNMENT
        self.algorithms = tuple(name for name in (*SUMS, FUSED) if self._offers(name))
        """The algorithms that this rank has; connect() leaves those that all have."""

        # The first two parts of the buffer are the halves that fused sums take in turn, the third is for the others.
        self._peers: Any = self._meet() if FUSED in self.algorithms else None

    def fits(self, algorithm: str, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Whether the algorithm can sum such a message. Every rank's answer is the same."""
        size = shape.numel() * dtype.itemsize
        dtypes = [torch.bfloat16, torch.float32, *([torch.float16] if algorithm == FUSED else [])]
        return algorithm in self.algorithms and dtype in dtypes and size <= self.capacity and size % _ALIGNMENT == 0

    def sum(self, algorithm: str, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, which may be overwritten, by one of SUMS: good until the next call."""
        flat = _aligned(x)
        shared = self._buffer[2 * self.capacity :][: x.nbytes].view(x.dtype)
        if algorithm == ONE_SHOT:
            # It copies x to `shared` before it waits for the others, so x may take the result.
            self._operations.one_shot_all_reduce_copy_out(shared, flat, "sum", self._name, flat)
            return flat.view(x.shape)

        # It ends with a barrier, and nobody writes to `shared` again before this rank has joined the next.
        shared.copy_(flat)
        run = self._operations.two_shot_all_reduce_ if algorithm == TWO_SHOT else self._operations.multimem_all_reduce_
        run(shared, "sum", self._name)
        return shared.view(x.shape)

    def add_norm(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Collectives.add_reduced_norm, fused."""
        from ...kernels.cuda import all_reduce

        all_reduce.send_rows(x.contiguous(), self._peers)
        self._handle.barrier(_BARRIER_CHANNEL, self._timeout_ms)
        return all_reduce.receive_add_norm(x.dtype, bias, total, weight, eps, dtype, self._peers)

    def _offers(self, algorithm: str) -> bool:
        if algorithm == FUSED:
            return cuda.usable(self._buffer.device)
        name = {ONE_SHOT: "one_shot_all_reduce_copy_out"}.get(algorithm, f"{algorithm}_all_reduce_")
        return hasattr(self._operations, name) and (algorithm != MULTIMEM or self._handle.multicast_ptr != 0)

    def _meet(self) -> Any:
        from ...kernels.cuda.all_reduce import Peers

        addresses = list(self._handle.buffer_ptrs)
        # They are of the allocated memory, in which the buffer has the same offset on every rank.
        offset = self._buffer.data_ptr() - addresses[self._handle.rank]
        device = self._buffer.device
        return Peers(
            torch.tensor([address + offset for address in addresses], device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            self._handle.rank,
            self.capacity,
        )


def connect(process_group: Any, host: Collectives, device: torch.device, timeout_s: float) -> PeerMemory:
    """Set up memory that all ranks' GPUs reach. All ranks call it.

    `host` are CPU collectives of the same ranks as the registered `process_group`; timeout_s bounds a fused sum's wait.

    Raises SymmetricMemoryUnavailable, on all ranks, if they are on several hosts or their GPUs do not reach each other.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory

    def agreed(action: Callable[[], Any]) -> Any:
        result, problem = attempt(action)
        first = first_problem(host, problem)
        if first is not None:
            raise SymmetricMemoryUnavailable(first)
        return result

    # Every step may fail on some ranks alone; agreed() raises on all of them, so that none waits for one that left.
    rows = all_gather_ints(host, agreed(lambda: [boot(), gpu_identity(device)]))
    elsewhere = other_host([row[0] for row in rows])
    if elsewhere is not None:
        raise SymmetricMemoryUnavailable(elsewhere)
    agreed(lambda: check_reach([row[1] for row in rows], host.rank, _visible(device), _native_atomics))
    buffer = agreed(lambda: symmetric_memory.empty(3 * CAPACITY, dtype=torch.uint8, device=device))
    handle = agreed(lambda: symmetric_memory.rendezvous(buffer, process_group))
    name = process_group.group_name
    operations = torch.ops.symm_mem
    memory: PeerMemory = agreed(lambda: PeerMemory(buffer, handle, name, timeout_s, operations))

    # An algorithm is used only if every rank has it.
    every = all_gather_ints(host, [int(algorithm in memory.algorithms) for algorithm in (*SUMS, FUSED)])
    shared = zip((*SUMS, FUSED), zip(*every, strict=True), strict=True)
    memory.algorithms = tuple(algorithm for algorithm, flags in shared if all(flags))
    return memory


def check_reach(
    identities: Sequence[int], rank: int, visible: Mapping[int, int], reaches: Callable[[int, int], bool]
) -> None:
    """Raises RuntimeError if this rank's GPU cannot reach another rank's, in a way that barriers need.

    `identities` are the GPUs of all ranks; `visible` has this process's number of each, and `reaches` returns whether
    one can do atomic operations in the other's memory. Over PCIe most cannot, and would wait for ever.
    """
    own = visible[identities[rank]]
    for other, identity in enumerate(identities):
        if identity not in visible:
            raise RuntimeError(f"the GPU of rank {other} is not visible to it (CUDA_VISIBLE_DEVICES)")
        if visible[identity] != own and not reaches(own, visible[identity]):
            raise RuntimeError(
                f"GPU {own} has no native atomic operations in the memory of GPU {visible[identity]}, as over NVLink"
            )


def gpu_identity(device: torch.device) -> int:
    """60 bits of what names this GPU, or part of one."""
    if device.type != "cuda":
        raise RuntimeError(f"symmetric memory is of GPUs, not of {device}")
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    return int(uuid.replace("-", "")[:15], 16)


def _visible(device: torch.device) -> dict[int, int]:
    return {gpu_identity(torch.device(device.type, i)): i for i in range(torch.cuda.device_count())}


def _native_atomics(source: int, target: int) -> bool:
    """cuDeviceGetP2PAttribute of the CUDA driver API, which torch lacks, by torch's numbers of the devices."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int()
    devices = []
    for number in (source, target):
        found = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(found), number):
            raise RuntimeError(f"the CUDA driver knows no GPU {number}")
        devices.append(found)

    if driver.cuDeviceGetP2PAttribute(ctypes.byref(value), _NATIVE_ATOMICS, *devices):
        raise RuntimeError(f"the CUDA driver does not say whether GPU {source} reaches GPU {target}")
    return value.value == 1


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x in one dimension, or a copy, whose address and offset in its storage are aligned as torch's operations need."""
    flat = x.contiguous().view(-1)
    offsets = flat.data_ptr(), flat.storage_offset() * flat.itemsize
    return flat.clone() if any(offset % _ALIGNMENT for offset in offsets) else flat
