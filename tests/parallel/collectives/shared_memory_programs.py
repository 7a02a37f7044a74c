"""What the tests of shared memory run on real ranks."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from phalanx.benchmarks.lab.traces import Traces
from phalanx.parallel.collectives import shared_memory
from phalanx.parallel.collectives.base import CollectiveError, Collectives
from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
from phalanx.parallel.collectives.rendezvous import all_gather_texts, cores_of_all
from phalanx.parallel.collectives.shared_memory import (
    SharedMemoryCollectives,
    SharedMemoryControl,
    SharedMemoryUnavailable,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
# Around vector widths, slices, the one-shot limit and the buffer, and several buffers.
LENGTHS = (0, 1, 7, 64, 1000, 4097, 32_768, 65_537, 131_072, 131_073, 700_001)


def _host() -> Collectives:
    return ProcessGroupCollectives(dist.group.WORLD, torch.device("cpu"))


def _connect(timeout_s: float = 60.0) -> SharedMemoryCollectives:
    return SharedMemoryCollectives.connect(_host(), timeout_s)


def _draw(length: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in INTEGERS:
        info = torch.iinfo(dtype)
        return torch.randint(info.min, info.max, (length,), dtype=dtype, generator=generator)
    return torch.randn(length, dtype=torch.float64, generator=generator).mul(3).to(dtype)


def _sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    wide = parts[0].dtype if parts[0].dtype not in (torch.bfloat16, torch.float16) else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def sums(rank: int, size: int) -> None:
    """all_reduce of every dtype and length against the sum in rank order."""
    collectives = _connect()
    for dtype in FLOATS + INTEGERS:
        view = torch.int16 if dtype in (torch.bfloat16, torch.float16) else dtype
        for length in LENGTHS:
            parts = [_draw(length, dtype, 100 * length + part) for part in range(size)]
            expected = _sum_in_rank_order(parts)
            x = parts[rank]
            assert collectives.all_reduce(x) is x
            assert torch.equal(x.view(view), expected.view(view)), (dtype, length)
    collectives.close()


def reducer(rank: int, size: int) -> None:
    """What the kernels call by address adds the same bits to a total as add_reduced(), which are those of the sum."""
    collectives = _connect()
    address, group = collectives.reducer
    arguments = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, *arguments)(address)
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            parts = [_draw(length, dtype, 100 * length + part) for part in range(size)]
            totals = [torch.arange(float(length)) for _ in range(2)]
            x = parts[rank].clone()
            function(group, x.data_ptr(), length, dtype.itemsize, totals[0].data_ptr())
            collectives.add_reduced(parts[rank].clone(), totals[1])
            assert torch.equal(totals[0], totals[1]), (dtype, length)
            assert torch.equal(totals[0], torch.arange(float(length)) + _sum_in_rank_order(parts).float())
    collectives.close()


def special_values(rank: int, size: int) -> None:
    """Infinities, NaN, subnormal and overflowing 16-bit values round as torch rounds them: all 65,536 of each dtype."""
    collectives = _connect()
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        every = patterns.view(dtype)
        for other in (0.0, 1.0, -1e-7, 65504.0, float("inf")):
            parts = [every, torch.full_like(every, other), torch.zeros_like(every)][:size]
            expected = _sum_in_rank_order(parts)
            result = collectives.all_reduce(parts[rank].clone())
            assert torch.equal(result.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            assert torch.equal(result[numbers].view(torch.int16), expected[numbers].view(torch.int16)), (dtype, other)
    collectives.close()


def shapes(rank: int, size: int) -> None:
    """Every operation on tensors that are strided, empty, of no dimension, of odd dtypes, and larger than a buffer."""
    collectives = _connect()
    strided = torch.arange(12.0).view(3, 4).T + rank
    assert torch.equal(collectives.all_reduce(strided), torch.arange(12.0).view(3, 4).T * size + sum(range(size)))
    assert float(collectives.all_reduce(torch.tensor(1.0))) == size
    for dst in range(size):
        for shape in ((), (0,), (3,), (5, 0, 2), (300_007,), (2, 3)):
            for dtype in (torch.float32, torch.bool, torch.uint8, torch.int64):
                parts = [
                    torch.full(shape, part % 2 if dtype == torch.bool else part, dtype=dtype) for part in range(size)
                ]
                gathered = collectives.gather(parts[rank], dst=dst)
                assert (gathered is None) == (rank != dst)
                for got, expected in zip(gathered or [], parts, strict=False):
                    assert _same_bits(got, expected)
                assert _same_bits(collectives.broadcast(parts[rank].clone(), src=dst), parts[dst])
    broadcast = collectives.broadcast(torch.arange(6).view(2, 3).T + rank, src=1)
    assert torch.equal(broadcast, torch.arange(6).view(2, 3).T + 1)
    with pytest.raises(ValueError, match=r"all_reduce of torch.bool; shared memory sums torch.float32"):
        collectives.all_reduce(torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"dst={size} must be a rank of this group, 0 to {size - 1}"):
        collectives.gather(torch.ones(2), dst=size)
    collectives.warmup([1, 64])
    collectives.barrier()
    collectives.close()
    collectives.close()


def mixed(rank: int, size: int, seed: int, operations: int) -> str:
    """Random operations in an order all ranks know, each checked, with pauses that differ by rank. A digest."""
    collectives = _connect()
    shared, own = random.Random(seed), random.Random(f"{seed} {rank}")
    digest = hashlib.sha256()
    for step in range(operations):
        operation = shared.choice(("all_reduce", "all_reduce", "gather", "broadcast", "barrier"))
        length = shared.choice((1, 5, 100, 2048, shared.randrange(1, 20_000), 0))
        if shared.random() < 0.02:
            length = shared.randrange(200_000)
        dtype, root = shared.choice(FLOATS + INTEGERS), shared.randrange(size)
        if own.random() < 0.1:
            time.sleep(own.choice((0.0, 0.0001, 0.0005)))
        if own.random() < 0.002:
            time.sleep(0.02)
        if operation == "barrier":
            collectives.barrier()
            continue
        parts = [_draw(length, dtype, 1000 * step + part) for part in range(size)]
        x = parts[rank].clone()
        if operation == "all_reduce":
            result, expected = collectives.all_reduce(x), _sum_in_rank_order(parts)
        elif operation == "broadcast":
            result, expected = collectives.broadcast(x, src=root), parts[root]
        else:
            gathered = collectives.gather(x, dst=root)
            result, expected = (torch.cat(gathered), torch.cat(parts)) if gathered else (x, x)
        bits = result.view(torch.uint8).numpy().tobytes()
        assert bits == expected.view(torch.uint8).numpy().tobytes(), (step, operation, length, dtype)
        if operation != "gather":
            digest.update(bits)
    collectives.close()
    return digest.hexdigest()


def hammer(rank: int, size: int, operations: int) -> float:
    """Many small sums without a pause, where a lost wake-up or a buffer written too early would show."""
    collectives = _connect()
    x = torch.zeros(64)
    for step in range(operations):
        x.fill_(step + rank)
        collectives.all_reduce(x)
        assert x[0] == x[63] == step * size + sum(range(size)), step
    collectives.close()
    return float(x[0])


def control(rank: int, size: int, messages: list[bytes]) -> list[bytes]:
    """What each rank heard of the messages that rank 0 sent."""
    channel = SharedMemoryControl.connect(_host(), 60.0)
    if rank == 0:
        for message in messages:
            channel.send(message)
    heard = [channel.receive() for _ in messages] if rank else []
    with pytest.raises(RuntimeError, match="rank 0"):
        channel.receive() if rank == 0 else channel.send(b"")
    dist.barrier()
    channel.close()
    channel.close()
    return heard


def run_ahead(rank: int, size: int, count: int) -> int:
    """Rank 0 sends `count` small messages before any other rank receives one; returns how many arrived in order."""
    channel = SharedMemoryControl.connect(_host(), 60.0)
    if rank == 0:
        for number in range(count):
            channel.send(number.to_bytes(4, "little"))
    dist.barrier()
    heard = [int.from_bytes(channel.receive(), "little") for _ in range(count)] if rank else list(range(count))
    channel.close()
    assert heard == list(range(count))
    return len(heard)


def idle_receiver(rank: int, size: int) -> float:
    """Processor seconds that a rank spends on a second of waiting for a message, with another thread that must run."""
    channel = SharedMemoryControl.connect(_host(), 60.0)
    ticks: list[int] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [ticks.append(0) for _ in iter(lambda: stop.wait(0.05), True)])
    dist.barrier()
    thread.start()
    before = resource.getrusage(resource.RUSAGE_SELF)
    if rank == 0:
        time.sleep(1.0)
        channel.send(b"done")
    else:
        assert channel.receive() == b"done"
        assert len(ticks) > 5
    after = resource.getrusage(resource.RUSAGE_SELF)
    stop.set()
    thread.join()
    channel.close()
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def by_name(rank: int, size: int) -> list[str]:
    """A group whose last rank may not look into /proc of rank 0; the names in /dev/shm that are left of it."""
    real = os.open

    def guarded(path: Any, *args: Any, **keywords: Any) -> int:
        if rank == size - 1 and str(path).startswith("/proc/"):
            raise PermissionError(f"not allowed: {path}")
        return real(path, *args, **keywords)

    os.open = guarded
    traces = Traces()
    collectives = _connect()
    assert float(collectives.all_reduce(torch.ones(1))) == size
    names = sorted(traces.shared_memory())
    collectives.barrier()
    collectives.close()
    return names


def cannot_share(rank: int, size: int) -> list[str]:
    """What every rank is told when the last one has no extension, is on another host, or cannot map the segment."""
    reasons = []

    def connect() -> None:
        try:
            SharedMemoryControl.connect(_host(), 60.0)
        except SharedMemoryUnavailable as reason:
            reasons.append(str(reason))

    last = rank == size - 1
    native, boot = shared_memory._native, shared_memory.boot
    if last:
        shared_memory._native = None
    connect()
    shared_memory._native = native
    if last:
        shared_memory.boot = lambda: 1
    connect()
    shared_memory.boot = boot
    before = resource.getrlimit(resource.RLIMIT_AS)
    if last:
        resource.setrlimit(resource.RLIMIT_AS, (1, before[1]))
    connect()
    resource.setrlimit(resource.RLIMIT_AS, before)
    return reasons


def allocate(rank: int, size: int) -> list[list[tuple[int, int]]]:
    """From where to where this rank allocates memory of the ring's segment and of the collectives'."""
    allocated: list[tuple[int, int]] = []
    allocate = os.posix_fallocate

    def noted(fd: int, offset: int, length: int) -> None:
        allocated.append((offset, offset + length))
        allocate(fd, offset, length)

    segments = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", noted)
        for connect in (SharedMemoryControl.connect, SharedMemoryCollectives.connect):
            connect(_host(), 60.0).close()
            segments.append(allocated[:])
            allocated.clear()
    return segments


def count_cores(rank: int, size: int) -> list[int]:
    """The CPUs of all ranks together: as they are, all on the first, and each on one of its own."""
    allowed = sorted(os.sched_getaffinity(0))
    counts = [cores_of_all(_host())]
    for mine in ({allowed[0]}, {allowed[rank % len(allowed)]}):
        os.sched_setaffinity(0, mine)
        counts.append(cores_of_all(_host()))
    return counts


def say(rank: int, size: int) -> list[str]:
    """Every rank's text."""
    return all_gather_texts(_host(), ["", "zwei Kerne", "ένας κόμβος"][rank])


def misuse(rank: int, size: int) -> list[str]:
    """What a rank is told that calls another operation than its peer, whose peer closed, or that was interrupted."""
    told = []

    def attempt(call: Callable[[], Any]) -> None:
        try:
            call()
        except (CollectiveError, KeyboardInterrupt) as error:
            told.append(f"{type(error).__name__}: {error}")

    first = _connect()
    attempt(lambda: first.all_reduce(torch.ones(10)) if rank else first.all_reduce(torch.ones(11)))
    attempt(first.barrier)
    first.close()
    attempt(first.barrier)
    second = _connect()
    if rank == 0:
        second.close()
    attempt(second.barrier)
    third = _connect(timeout_s=0.5)
    dist.barrier()
    if rank == 0:
        attempt(third.barrier)
    dist.barrier()
    fourth = _connect()
    dist.barrier()
    if rank == 0:
        # A shell's background jobs, and their children, ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        attempt(fourth.barrier)
    dist.barrier()  # until rank 0 has been interrupted, however long its timer takes
    if rank == 1:
        fourth.barrier()  # rank 0 was here
        attempt(fourth.barrier)
    dist.barrier()
    return told


def lose_a_rank(rank: int, size: int, folder: str, victim: int) -> None:
    """Rank `victim` is killed in the middle; the others write what they saw and how long after."""
    collectives = _connect()
    control = SharedMemoryControl.connect(_host(), 60.0)
    note = Path(folder) / str(rank)
    collectives.barrier()
    try:
        for step in range(10**9):
            if rank == victim and step == 300:
                (Path(folder) / "killed").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            collectives.all_reduce(torch.ones(1000))
    except CollectiveError as error:
        note.write_text(f"{time.monotonic()} {error}\n")
    try:
        while True:
            control.send(b"x") if rank == 0 else control.receive()
            time.sleep(0.01)
    except CollectiveError as error:
        with note.open("a") as file:
            file.write(f"{time.monotonic()} {error}\n")
    # The process group cannot be left in order any more, and a rank that waits for rank 0 must find it alive.
    time.sleep(1.5)
    sys.stdout.flush()
    os._exit(0)


def wait_for_death(rank: int, size: int, folder: str) -> None:
    """All ranks run, the last to start says so, and all will be killed."""
    collectives = _connect()
    control = SharedMemoryControl.connect(_host(), 60.0)
    collectives.barrier()
    (Path(folder) / f"ready{rank}").touch()
    while True:
        collectives.all_reduce(torch.ones(100_000))
        control.send(b"x") if rank == 0 else control.receive()


def talk(rank: int, size: int, folder: str) -> None:
    """Rank 0 sends ten messages a second, and the last one when there is a file `end`; nobody waits above 2 seconds."""
    control = SharedMemoryControl.connect(_host(), 2.0)
    (Path(folder) / f"ready{rank}").touch()
    if rank > 0:
        while control.receive() != b"end":
            pass
    else:
        while not (Path(folder) / "end").exists():
            control.send(b"x")
            time.sleep(0.1)
        control.send(b"end")
    (Path(folder) / f"done{rank}").touch()
