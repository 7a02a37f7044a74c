"""How long an all-reduce between processes of one host takes, as called from Python: shared memory against a peer.

    python benchmarks/parts/collectives.py ranks=2 sizes=2048,8192,65536,1048576 peer=gloo

The ranks are processes of their own, each with one thread. For every size they measure both in alternation, batch by
batch: some calls that do not count, a barrier, and calls whose time is divided by their number. The figures are medians
over the batches, of the slowest rank; the last line is JSON.

With model=FOLDER the ranks also load it and compute decode steps of one sequence, every all-reduce of which is timed on
each rank. The rank that comes last waits for nobody, so the shortest of a call's times is what communication takes; the
rest is waiting for ranks that compute a moment longer.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = ("bfloat16", "float32", "float16")
TIMEOUT_S = 120.0


@dataclass
class Options:
    """What to measure."""

    ranks: int = 2
    sizes: str = "2048,8192,65536,1048576"  # bytes of a message, by commas
    peer: str = "gloo"
    dtype: str = "bfloat16"
    repeats: int = 11  # batches of each, in alternation
    batch_s: float = 0.05  # how long a batch should last
    model: str | None = None  # a folder: of its decode steps, the share of all-reduces
    steps: int = 64  # of the model
    pin: bool = False  # rank r to core r, where there are enough
    out: str | None = None  # a file for the JSON line


def measure_steps(options: Options, world: Any) -> dict[str, list[float]]:
    """Seconds of a model's decode steps, one figure a repeat, and of every all-reduce in them, in order."""
    import dataclasses

    import torch
    from phalanx.benchmarks.lab.sequence_logits import sequence_logits
    from phalanx.engine.config import EngineConfig
    from phalanx.engine.execution.worker_factory import build_worker
    from phalanx.engine.models.spec import read_config, spec_from_config
    from phalanx.parallel.collectives.shared_memory import SharedMemoryCollectives
    from phalanx.parallel.group import adopt_group

    group = adopt_group(
        world, device=torch.device("cpu"), local_size=options.ranks, collectives="shared_memory", timeout_s=TIMEOUT_S
    )
    calls: list[float] = []

    class Timed(SharedMemoryCollectives):
        """The same, but without a reducer, so that every sum of a step comes by here."""

        reducer = None

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            started = time.perf_counter()
            result = super().all_reduce(x)
            calls.append(time.perf_counter() - started)
            return result

        def add_reduced(self, x: torch.Tensor, total: torch.Tensor) -> None:
            started = time.perf_counter()
            super().add_reduced(x, total)
            calls.append(time.perf_counter() - started)

    shared = group.collectives
    assert isinstance(shared, SharedMemoryCollectives)
    group = dataclasses.replace(group, collectives=Timed(shared._native, shared.rank, shared.size))
    folder = Path(str(options.model))
    spec = spec_from_config(read_config(folder), folder.name)
    config = EngineConfig(model=str(folder), ranks=options.ranks, threads=1, max_model_len=options.steps + 1)
    worker = build_worker(dataclasses.replace(config, max_num_seqs=1), spec, folder, group)
    tokens = [100 + i % (spec.vocab_size - 100) for i in range(options.steps)]
    sequence_logits(worker, tokens[:2], chunk=1)
    calls.clear()
    steps = []
    for _ in range(options.repeats):
        started = time.perf_counter()
        sequence_logits(worker, tokens, chunk=1)
        steps.append((time.perf_counter() - started) / options.steps)
    group.close()
    return {"step_s": steps, "calls_s": calls}


def measure_rank(rank: int, options: Options, sizes: list[int], store: str) -> dict[str, dict[str, list[float]]]:
    """Microseconds a call, by size, for each of the two: one figure a batch. And measure_steps(), by `steps`."""
    import torch
    import torch.distributed as dist
    from phalanx.parallel.collectives.process_group import ProcessGroupCollectives
    from phalanx.parallel.collectives.shared_memory import SharedMemoryCollectives

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if options.pin and len(cores) >= options.ranks:
        os.sched_setaffinity(0, {cores[rank]})
    dist.init_process_group(options.peer, init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    world = dist.group.WORLD
    assert world is not None
    peer = ProcessGroupCollectives(world, torch.device("cpu"))
    shared = SharedMemoryCollectives.connect(peer, TIMEOUT_S)
    results: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        x = torch.zeros(size, dtype=torch.uint8).view(getattr(torch, options.dtype))

        def batch(collectives: Any, calls: int, x: torch.Tensor = x) -> float:
            for _ in range(calls // 2):
                collectives.all_reduce(x)
            shared.barrier()
            started = time.perf_counter()
            for _ in range(calls):
                collectives.all_reduce(x)
            return (time.perf_counter() - started) / calls * 1e6

        both = {"shared_memory": shared, options.peer: peer}
        # All ranks must do the same number of calls, so rank 0's guess holds for all.
        guesses = torch.tensor([batch(collectives, 20) for collectives in both.values()])
        calls = [max(5, int(options.batch_s * 1e6 / guess)) for guess in shared.broadcast(guesses).tolist()]
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(options.repeats):
            for (name, collectives), count in zip(both.items(), calls, strict=True):
                times[name].append(batch(collectives, count))
        results[str(size)] = times
    if options.model is not None:
        results["steps"] = measure_steps(options, world)
    shared.close()
    dist.destroy_process_group()
    return results


def enter(rank: int, options: Options, sizes: list[int], store: str, results: Any) -> None:
    """A rank's process."""
    try:
        results.put((rank, measure_rank(rank, options, sizes, store), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(options: Options, sizes: list[int], store: str) -> list[dict[str, dict[str, list[float]]]]:
    """Every rank's figures. Raises ConfigError if a rank fails."""
    from phalanx.engine.errors import ConfigError

    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=enter, args=(rank, options, sizes, store, results), daemon=True)
        for rank in range(options.ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    try:
        for _ in processes:
            rank, figures, failure = results.get(timeout=10 * TIMEOUT_S)
            if failure is not None:
                raise ConfigError(f"rank {rank} of {options.ranks} failed:\n{failure}")
            found[rank] = figures
        for process in processes:
            process.join()
    except queue.Empty:
        raise ConfigError(f"the ranks did not finish in {10 * TIMEOUT_S:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(options.ranks)]


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    import tempfile

    sizes = check(options)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(options, sizes, str(Path(folder) / "store"))
    print(f"{'bytes':>9} {'shared memory':>14} {options.peer:>12} {'ratio':>7}   us a call, median of the slowest rank")
    rows = []
    for size in sizes:
        medians = {
            name: max(statistics.median(figures[str(size)][name]) for figures in ranks)
            for name in ("shared_memory", options.peer)
        }
        ours, theirs = medians["shared_memory"], medians[options.peer]
        best = {f"{name}_best_us": round(min(min(f[str(size)][name]) for f in ranks), 2) for name in medians}
        times = {f"{name}_us": round(value, 2) for name, value in medians.items()}
        rows.append({"bytes": size, **times, **best, "ratio": round(theirs / ours, 1)})
        print(f"{size:>9} {ours:>14.2f} {theirs:>12.2f} {theirs / ours:>7.1f}", flush=True)
    steps = [figures["steps"] for figures in ranks if "steps" in figures]
    return {"benchmark": "collectives", "all_reduce": rows} | share_of_steps(steps, options)


def share_of_steps(ranks: list[dict[str, list[float]]], options: Options) -> dict[str, Any]:
    """Milliseconds of a decode step, of communication and, at most on any rank, of that and of waiting."""
    if not ranks:
        return {}
    count = options.steps * options.repeats
    step_ms = 1e3 * max(statistics.mean(figures["step_s"]) for figures in ranks)
    apart = 1e3 * sum(map(min, zip(*(figures["calls_s"] for figures in ranks), strict=True))) / count
    together = 1e3 * max(sum(figures["calls_s"]) for figures in ranks) / count
    print(
        f"a decode step takes {step_ms:.2f} ms, of which {apart:.2f} ms are communication and up to "
        f"{together - apart:.2f} ms waiting for another rank"
    )
    return {
        "step_ms": round(step_ms, 3),
        "communication_ms": round(apart, 3),
        "communication_and_waiting_ms": round(together, 3),
        "communication_share_of_step": round(apart / step_ms, 4),
    }


def check(options: Options) -> list[int]:
    """The sizes, if all options can be used. Raises ConfigError."""
    from phalanx.engine.errors import ConfigError
    from phalanx.parallel.collectives.shared_memory import unavailable

    if (reason := unavailable()) is not None:
        raise ConfigError(f"no shared memory here: {reason}")
    if options.ranks < 2:
        raise ConfigError(f"ranks={options.ranks} must be at least 2")
    for name in ("repeats", "steps"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name}={getattr(options, name)} must be at least 1")
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype={options.dtype!r} must be one of {', '.join(DTYPES)}")
    if options.peer != "gloo":
        raise ConfigError(f"peer={options.peer!r} must be gloo, torch.distributed's backend for tensors on a CPU")
    try:
        sizes = [int(size) for size in options.sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(size < 4 or size % 4 for size in sizes):
        raise ConfigError(f"sizes={options.sizes!r} must be multiples of 4 bytes, by commas")
    return sizes


if __name__ == "__main__":
    from phalanx.benchmarks.lab.common import run

    run(Options, measure)
