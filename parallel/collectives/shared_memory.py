"""Collectives and the control channel in memory that the CPU ranks of one host share; the work is done in C++.

Each rank writes to buffers of its own and raises a flag; the others read them. A rank that waits spins for a moment and
then sleeps. The segment has no name, so nothing of it outlives the last rank, however that ends.
"""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...kernels.norm import rms_norm
from ..control import ControlChannel
from .base import CollectiveError, Collectives, CollectivesUnavailable
from .rendezvous import all_gather_ints, attempt, boot, cores_of_all, first_problem, other_host

try:
    _native: Any = importlib.import_module("._native", __package__)
    _missing = ""
except ImportError as error:
    _native = None
    _missing = str(error)
else:
    _native.raise_as(CollectiveError)

_BUFFER_BYTES = 256 * 1024  # bytes of one rank's buffer; a longer message goes in pieces
_RING = 1024 * 1024  # bytes that rank 0 may have sent and others not yet received; a power of two
_SPIN_US = 2  # how long a waiting rank keeps its core to itself, if there is one for every rank
_NONCE_BYTES = 8
# The order is that of Dtype in sum.h.
_DTYPES = {
    dtype: code
    for code, dtype in enumerate(
        (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)
    )
}

T = TypeVar("T")


class SharedMemoryUnavailable(CollectivesUnavailable):
    """These ranks cannot share memory."""


def unavailable() -> str | None:
    """Why this process could not share memory with any other, or None if it can."""
    if _native is None:
        return f"the extension phalanx.parallel.collectives._native cannot be imported ({_missing})"
    return None if hasattr(os, "memfd_create") else "this system has no memfd_create"


class SharedMemoryCollectives(Collectives):
    """Collectives between the ranks of one host, for CPU tensors. Operations may be mixed in any order.

    all_reduce adds in rank order, 16-bit floats in fp32, and rounds once: the same bits on every rank and in every run.
    One thread at a time may call. When a rank dies the others' operations raise CollectiveError naming it.
    """

    def __init__(self, native: Any, rank: int, size: int, segment: int | None = None) -> None:
        self._native = native
        self.rank = rank
        self.size = size
        self._segment = segment

    @classmethod
    def connect(cls, host: Collectives, timeout_s: float) -> SharedMemoryCollectives:
        """Called by all ranks of `host`, which then share one segment. No operation waits longer than timeout_s.

        Raises SharedMemoryUnavailable, on all ranks, if they are not all on one host.
        """
        rank = host.rank
        size = host.size

        def attach(fd: int, spin: int) -> SharedMemoryCollectives:
            native = _native.Collectives(fd, rank, size, _BUFFER_BYTES, _one_shot_bytes(size), timeout_s, spin)
            return cls(native, rank, size, fd)

        return _connect(host, lambda: _native.Collectives.part_ends(size, _BUFFER_BYTES), attach)

    @property
    def segment(self) -> int | None:
        """The file descriptor of the segment: at FLAGS_AT in it are the ranks' flags (engine/execution/heartbeat.py).

        Good until close().
        """
        return self._segment

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def reducer(self) -> tuple[int, int]:
        """As Collectives.reducer: addresses of the extension's function and of this rank's end of the segment."""
        function, group = self._native.reducer()
        return function, group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, of float32, bfloat16, float16, float64, int32 or int64. In place where `x` is contiguous."""
        return self._all_reduce(x, 0)

    def add_reduced(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add all_reduce(x) to `total`, in one call where `total` is contiguous float32 and `x` of floats."""
        if total.dtype != torch.float32 or not total.is_contiguous() or not x.is_floating_point():
            super().add_reduced(x, total)
        else:
            self._all_reduce(x, total.data_ptr())

    def add_reduced_norm(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """As Collectives.add_reduced_norm. The sum is added to `total` while it is read, so only the norm is left."""
        self.add_reduced(x, total)
        if bias is not None:
            total.add_(bias)
        return rms_norm(total, weight, eps, dtype)

    def _all_reduce(self, x: torch.Tensor, total: int) -> torch.Tensor:
        code = _DTYPES.get(x.dtype)
        if code is None:
            raise ValueError(
                f"all_reduce of {x.dtype}; shared memory sums {', '.join(str(dtype) for dtype in _DTYPES)}"
            )
        x = _contiguous(x)
        self._native.all_reduce(x.data_ptr(), x.numel(), code, total)
        return x

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x` on rank `dst`, None on the others. Raises ValueError if `dst` is no rank."""
        x = _contiguous(x)
        self._check_rank("dst", dst)
        parts = x.new_empty((self.size, *x.shape)) if self.rank == dst else None
        self._native.gather(x.data_ptr(), x.nbytes, 0 if parts is None else parts.data_ptr(), dst)
        return None if parts is None else list(parts.unbind(0))

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, in each rank's own where it is contiguous. Raises ValueError if `src` is no rank."""
        x = _contiguous(x)
        self._check_rank("src", src)
        self._native.broadcast(x.data_ptr(), x.nbytes, src)
        return x

    def barrier(self) -> None:
        """Return once every rank is here."""
        self._native.barrier()

    @property
    def waited_s(self) -> list[float]:
        """As Collectives.waited_s, of each rank up to the last operation that it has entered."""
        return [float(seconds) for seconds in self._native.waited()]

    def close(self) -> None:
        """Leave the group: the others' operations that still need this rank raise. Closing again does nothing."""
        self._native.close()

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"{name}={rank} must be a rank of this group, 0 to {self.size - 1}")


class SharedMemoryControl(ControlChannel):
    """Control messages through a ring in shared memory: rank 0 may be 1 MiB ahead; ranks that wait sleep."""

    def __init__(self, native: Any, rank: int) -> None:
        self._native = native
        self._rank = rank

    @classmethod
    def connect(cls, host: Collectives, timeout_s: float) -> SharedMemoryControl:
        """Called by all ranks of `host`. Raises SharedMemoryUnavailable, on all, if they are not all on one host."""
        rank = host.rank
        size = host.size

        def attach(fd: int, spin: int) -> Any:
            return _native.Ring(fd, rank, size, _RING, timeout_s, spin)

        return cls(_connect(host, lambda: _native.Ring.part_ends(size, _RING), attach), rank)

    def send(self, data: bytes) -> None:
        """Send to all other ranks; waits while one is 1 MiB behind. Raises RuntimeError on another rank than 0."""
        if self._rank != 0:
            raise RuntimeError(f"rank {self._rank} cannot send control messages; rank 0 does")
        self._native.send(data)

    def receive(self) -> bytes:
        """Wait for the next message. Raises RuntimeError on rank 0."""
        if self._rank == 0:
            raise RuntimeError("rank 0 sends control messages; it receives none")
        return bytes(self._native.receive())

    def close(self) -> None:
        """Leave: messages not yet received are lost to this rank only. Closing again does nothing."""
        self._native.close()


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cpu:
        raise ValueError(f"a tensor on {x.device}; shared memory carries tensors on cpu")
    return x.contiguous()


def _one_shot_bytes(size: int) -> int:
    """Bytes up to which every rank sums a whole message by itself, instead of one slice of it."""
    return _BUFFER_BYTES if size == 2 else _BUFFER_BYTES // 4


def _connect(host: Collectives, part_ends: Callable[[], list[int]], attach: Callable[[int, int], T]) -> T:
    """Attach every rank to one new segment. part_ends() gives the offset in it where each rank's part ends.

    `attach` takes the segment's file descriptor and the microseconds to spin; its result owns the descriptor.
    """
    _agree(host, unavailable() or "")
    ends = [0, *part_ends()]
    fd = open_segment(host, ends[-1])
    try:
        # Memory stands on the NUMA node of the rank that allocates it: each does so for what it writes to.
        _, problem = attempt(lambda: _allocate(fd, ends[host.rank], ends[host.rank + 1]))
        _agree(host, problem)
        spin = _SPIN_US if host.size <= cores_of_all(host) else 0
        attached, problem = attempt(lambda: attach(fd, spin))
        _agree(host, problem)
    except BaseException:
        os.close(fd)
        raise

    assert attached is not None
    return attached


def open_segment(host: Collectives, length: int) -> int:
    """Open one file of zeros in the memory of all ranks' host; no folder names it once all have it.

    Its first bytes are no longer zeros. Raises SharedMemoryUnavailable, on all ranks, if they cannot share memory.
    """
    process = os.stat("/proc/self/ns/pid").st_ino << 22 | os.getpid()  # a pid has at most 22 bits
    rows = all_gather_ints(host, [boot(), process, os.getpid(), secrets.randbits(62)])
    elsewhere = other_host([row[0] for row in rows])
    if elsewhere is not None:
        raise SharedMemoryUnavailable(elsewhere)
    if len({row[1] for row in rows}) < host.size:
        raise SharedMemoryUnavailable("several ranks are threads of one process")

    _, _, pid, nonce = rows[0]
    fd = _open_by_process(host, length, pid, nonce)
    return _open_by_name(host, length, nonce) if fd is None else fd


def _open_by_process(host: Collectives, length: int, pid: int, nonce: int) -> int | None:
    """A nameless file that rank 0 holds and the others take from /proc; None if one may not, as in some containers."""
    fd, problem = attempt(lambda: _fill(os.memfd_create("phalanx"), length, nonce)) if host.rank == 0 else (None, "")
    _agree(host, problem)
    [number], *_ = all_gather_ints(host, [fd or 0])
    if host.rank != 0:
        fd, problem = attempt(lambda: _recognise(os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR), nonce))
    refused = any(row[0] for row in all_gather_ints(host, [int(bool(problem))]))
    if refused and fd is not None:
        os.close(fd)
    return None if refused else fd


def _open_by_name(host: Collectives, length: int, nonce: int) -> int:
    """A file in /dev/shm, whose name goes as soon as every rank has opened it."""
    path = f"/dev/shm/phalanx-{nonce:016x}"  # nosec B108 # a random name, made with O_EXCL, for its owner alone
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd, problem = attempt(lambda: _fill(os.open(path, flags, 0o600), length, nonce)) if host.rank == 0 else (None, "")

    try:
        _agree(host, problem)
        if host.rank != 0:
            fd, problem = attempt(lambda: _recognise(os.open(path, os.O_RDWR), nonce))
        _agree(host, problem)
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise
    finally:
        if host.rank == 0:
            Path(path).unlink(missing_ok=True)

    assert fd is not None
    return fd


def _allocate(fd: int, first: int, last: int) -> None:
    # Memory that is lacking is an error here, not a SIGBUS later.
    if first < last:
        os.posix_fallocate(fd, first, last - first)


def _fill(fd: int, length: int, nonce: int) -> int:
    try:
        os.ftruncate(fd, length)
        os.pwrite(fd, nonce.to_bytes(_NONCE_BYTES, "little"), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _recognise(fd: int, nonce: int) -> int:
    if os.pread(fd, _NONCE_BYTES, 0) != nonce.to_bytes(_NONCE_BYTES, "little"):
        os.close(fd)
        raise OSError("the file opened is not rank 0's segment")
    return fd


def _agree(host: Collectives, problem: str) -> None:
    """Raises SharedMemoryUnavailable on every rank if any has a problem, naming the first."""
    first = first_problem(host, problem)
    if first is not None:
        raise SharedMemoryUnavailable(first)
