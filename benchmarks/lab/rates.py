"""How fast this machine reads memory and caches and multiplies matrices: measured, with how far the repeats were apart.

A rate is the best of its repeats, for nothing makes a machine faster than it is; the median says how much something
else slowed it down meanwhile. The C++ kernels' own loops find the limits, without an engine: see
kernels/cpu/runtime/rates.h. torch's operations stand beside them, and serve where the kernels are not built.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from phalanx.kernels.cpu import native

SHAPES = ((1024, 2048, 2048), (2048, 4864, 896))  # rows, outputs and inputs of torch's multiplications
SHORT = 0.2  # of the seconds of a measurement, where much fits into little time
MULTIPLY_STEPS, TILE_STEPS = 50_000, 10_000  # about a millisecond of a thread
NOW_GIB, NOW_S = 0.5, 0.1
BUSY_ABOVE = 0.1
"""If the median is so far below the best repeat, something else uses the machine."""

ONE_THREAD = "_one_thread"


@dataclass(frozen=True)
class Rate:
    """A measurement: its best repeat, how far below that the median is as a share of it, and how many there were."""

    best: float
    apart: float
    repeats: int

    def __str__(self) -> str:
        return f"{self.best} ({self.repeats} repeats, {self.apart:.0%} apart)"


@dataclass(frozen=True)
class Limits:
    """Rates of this machine, of all threads and of one; None where it has no such thing.

    GB/s are 10^9 bytes a second, GFLOP/s count a multiply-add as two.
    """

    read_gb_s: float
    read_gb_s_one_thread: float
    l1_read_gb_s: float | None  # of what each thread finds in its first cache, all together
    l1_read_gb_s_one_thread: float | None
    l2_read_gb_s: float | None
    l2_read_gb_s_one_thread: float | None
    bf16_gflops: float  # the best of the next three: what this machine can do
    bf16_gflops_one_thread: float
    vectors_bf16_gflops: float | None  # in registers
    vectors_bf16_gflops_one_thread: float | None
    tiles_bf16_gflops: float | None  # AMX, operands from the first cache
    tiles_bf16_gflops_one_thread: float | None
    bf16_matmul_gflops: float | None  # torch's, of a large matrix multiplication
    bf16_matmul_gflops_one_thread: float | None
    int8_gflops: float | None  # the best of the next two
    int8_gflops_one_thread: float | None
    tiles_int8_gflops: float | None
    tiles_int8_gflops_one_thread: float | None
    int8_matmul_gflops: float | None
    int8_matmul_gflops_one_thread: float | None
    threads: int
    cpu_share: float  # of the cores' time, what this process got of it while all threads multiplied
    apart: dict[str, float]  # by the name of what was measured, see Rate
    repeats: dict[str, int]

    def gflops(self, int8: bool) -> float:
        """The most it multiplies in bf16, or in either where both operands have 8 bits."""
        return max(self.bf16_gflops, (self.int8_gflops or 0.0) if int8 else 0.0)

    @property
    def unsteady(self) -> list[str]:
        """What was measured while something else used the machine."""
        return [name for name, apart in self.apart.items() if apart > BUSY_ABOVE]

    def lines(self) -> list[str]:
        """Lines for people: every rate, and whether to believe it."""
        found = []
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in self.apart:
                value = Rate(value, self.apart[name], self.repeats[name])
            if not isinstance(value, dict):
                found.append(f"{name}: {value}")
        if self.cpu_share < 1 - BUSY_ABOVE:
            found.append(f"the machine is busy: others took {1 - self.cpu_share:.0%} of the cores' time")
        if self.unsteady:
            found.append(
                f"the machine is busy: medians are more than {BUSY_ABOVE:.0%} below the best repeats of "
                f"{', '.join(self.unsteady)}; measure again when it is idle"
            )
        return found


def rate_of(rates: Sequence[float], digits: int = 1) -> Rate | None:
    """A Rate, in 10^9 units a second, of repeats in units a second; None without repeats."""
    if not rates:
        return None
    best = max(rates)
    return Rate(round(best / 1e9, digits), round(1 - statistics.median(rates) / best, 3), len(rates))


def better(*rates: Rate | None) -> float | None:
    """The highest of several rates; None if there is none."""
    return max((rate.best for rate in rates if rate is not None), default=None)


def limits_from(measured: dict[str, Rate | None], threads: int, cpu_share: float) -> Limits:
    """The Limits that follow from measurements by their names; raises ValueError if nothing multiplied or read."""
    values: dict[str, float | None] = {name: rate.best if rate else None for name, rate in measured.items()}
    for suffix in ("", ONE_THREAD):
        kinds = {"bf16": ("vectors_bf16", "tiles_bf16", "bf16_matmul"), "int8": ("tiles_int8", "int8_matmul")}
        for kind, names in kinds.items():
            values[f"{kind}_gflops{suffix}"] = better(*(measured[f"{name}_gflops{suffix}"] for name in names))
        if values[f"bf16_gflops{suffix}"] is None or values[f"read_gb_s{suffix}"] is None:
            raise ValueError("neither the C++ kernels nor torch can multiply bf16 and read memory here")
    found = {name: rate for name, rate in measured.items() if rate is not None}
    return Limits(
        **values,  # type: ignore[arg-type]
        threads=threads,
        cpu_share=cpu_share,
        apart={name: rate.apart for name, rate in found.items()},
        repeats={name: rate.repeats for name, rate in found.items()},
    )


def measure_limits(seconds: float = 0.5, gib: float = 1.0) -> Limits:
    """Takes about ten times `seconds`, and the machine for itself. Restores torch's number of threads."""
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    measured: dict[str, Rate | None] = {}
    try:
        for suffix, count in ((ONE_THREAD, 1), ("", cores)):
            torch.set_num_threads(count)
            short = SHORT * seconds
            measured["read_gb_s" + suffix] = read_rate(seconds, gib, count)
            for level in (1, 2):
                measured[f"l{level}_read_gb_s{suffix}"] = rate_of(native_rates("cache_rate", count, level, short))
            measured["vectors_bf16_gflops" + suffix], cpu_share = vector_rate(short, count)
            for kind in ("bf16", "int8"):
                measured[f"tiles_{kind}_gflops{suffix}"] = tile_rate(kind, short, count)
                measured[f"{kind}_matmul_gflops{suffix}"] = matmul_rate(kind, seconds)
    finally:
        torch.set_num_threads(threads)
    return limits_from(measured, cores, cpu_share)


def measure_now() -> dict[str, float]:
    """The rates of all threads just now, within a second: read_gb_s, where there are tiles theirs, and cpu_share.

    Empty without the C++ kernels.
    """
    cores = len(os.sched_getaffinity(0))
    vectors, cpu_share = vector_rate(NOW_S, cores)
    if vectors is None:
        return {}
    found = {"read_gb_s": _best_pattern(native_rates("read_rate", cores, int(NOW_GIB * 2**30), 0.0))}
    found |= {f"{kind}_gflops": tile_rate(kind, NOW_S, cores) for kind in ("bf16", "int8")}
    return {name: rate.best for name, rate in found.items() if rate is not None} | {"cpu_share": cpu_share}


def read_rate(seconds: float, gib: float, threads: int) -> Rate | None:
    """GB/s at which the C++ kernels' threads stream through memory; torch's where those are not built."""
    if native is not None:
        return _best_pattern(native_rates("read_rate", threads, int(gib * 2**30), seconds))
    buffer = torch.empty(int(gib * 2**27), dtype=torch.int64).random_()  # a host may share equal pages
    size = buffer.numel() * buffer.element_size()
    works = (buffer.sum, buffer.view(torch.int32).amax)
    runs = [[size / spent for spent in times_s(work, seconds / len(works))] for work in works]
    return rate_of(max(runs, key=max), 2)


def vector_rate(seconds: float, threads: int) -> tuple[Rate | None, float]:
    """GFLOP/s of bf16 in registers, None without the kernels; and the share of the threads' time that they ran.

    Where a thread does not run although there is work for it, something else uses its core.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    rate = rate_of(native_rates("multiply_rate", threads, MULTIPLY_STEPS, seconds))
    ran = (time.process_time() - cpu) / (time.perf_counter() - wall) / threads
    return rate, round(min(1.0, ran), 3) if rate else 1.0


def tile_rate(kind: str, seconds: float, threads: int) -> Rate | None:
    """GFLOP/s of tiles of `kind` bf16 or int8; None where there are none."""
    return rate_of(native_rates("tile_rate", threads, kind == "int8", TILE_STEPS, seconds))


def matmul_rate(kind: str, seconds: float) -> Rate | None:
    """GFLOP/s of torch's best large multiplication of `kind` bf16 or int8; None if it has none on this processor."""
    runs = []
    for m, n, k in SHAPES:
        for name, prepare in _multiplications(kind, m, n, k).items():
            try:
                times = times_s(prepare(), seconds / (2 * len(SHAPES)))
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                reason = str(error).partition("\n")[0]
                print(f"{kind} multiplication by {name} is left out, torch cannot do it here: {reason}", flush=True)
                continue
            runs.append([2.0 * m * n * k / spent for spent in times])
    return rate_of(max(runs, key=max)) if runs else None


def times_s(work: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of the runs of `work` that fit into some seconds; at least two, after one that does not count."""
    work()
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return times


def native_rates(name: str, threads: int, *arguments: float) -> Any:
    """What the C++ kernels measure on so many threads; nothing where they are not built or lack it."""
    if not hasattr(native, name):
        return []
    before = native.threads()
    native.set_threads(threads)
    try:
        return getattr(native, name)(*arguments)
    finally:
        native.set_threads(before)


def _best_pattern(rates: dict[str, list[float]]) -> Rate | None:
    """The rate of reading in the pattern that was fastest once."""
    return rate_of(max(rates.values(), key=max), 2) if rates else None


def _multiplications(kind: str, m: int, n: int, k: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name, functions that prepare a multiplication and return it, for those that torch has."""
    if kind == "bf16":
        a, b = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
        return {"linear": lambda: lambda: torch.nn.functional.linear(a, b)}
    x, w = (torch.randint(-127, 127, (rows, k), dtype=torch.int8) for rows in (m, n))

    def onednn() -> Callable[[], Any]:
        packed = torch.ops.onednn.qlinear_prepack(w, [m, k])
        unsigned = x.view(torch.uint8)
        scales = torch.full((n,), 0.01)
        zeros = torch.zeros(n, dtype=torch.int64)
        linear = torch.ops.onednn.qlinear_pointwise
        options: tuple[Any, ...] = (None, 1.0, 0, torch.float32, "none", [], "")
        return lambda: linear(unsigned, 0.01, 0, packed, scales, zeros, *options)

    return {"_int_mm": lambda: lambda: torch._int_mm(x, w.T), "onednn.qlinear_pointwise": onednn}
