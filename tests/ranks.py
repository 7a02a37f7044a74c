"""Run a function on N real ranks: processes joined by gloo, as torchrun would start them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

TIMEOUT_S = 300
PRELOADED = ["pytest", "torch.distributed", "phalanx.tests.engine.programs"]
"""What most ranks import, which takes seconds: they are forked from one process that has done so and nothing else."""


@contextlib.contextmanager
def rank_processes() -> Iterator[Any]:
    """The multiprocessing context to start ranks from, within the block: each is a process as new as a spawned one."""
    # A process that is forked cannot use CUDA if anything that was imported has looked for it.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload(PRELOADED)
        yield context
    finally:
        if saved is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = saved


def run_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(rank, count, *args)` in `count` processes whose default process group is gloo.

    `function` must live in an importable module (phalanx.tests....). Returns the results in rank order; the first
    failure is raised with its rank and traceback.
    """
    with rank_processes() as context:
        processes, results = start_ranks(context, count, function, *args)
    collected: dict[int, Any] = {}
    try:
        while len(collected) < count:
            rank, failure, value = results.get(timeout=TIMEOUT_S)
            if failure is not None:
                raise AssertionError(f"rank {rank} of {count} failed:\n{failure}")
            collected[rank] = value
        for process in processes:
            process.join(TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()  # none stays behind, a zombie, for a later test to find among this process's children
    return [collected[rank] for rank in range(count)]


def start_ranks(context: Any, count: int, function: Callable[..., Any], *args: Any) -> tuple[list[Any], Any]:
    """Start the processes. Returns them, and a queue that each puts (rank, its failure or None, its result) into."""
    import torch.distributed as dist

    results = context.Queue()
    # This process listens, as torchrun does: a port that a rank binds later may be taken by then.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = (store.port, dict(os.environ), results, function, args)
    processes = [context.Process(target=_enter, args=(rank, count, *given), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    processes[0].store = store  # it answers for as long as somebody has the processes
    return processes, results


def _enter(
    rank: int,
    count: int,
    port: int,
    environment: dict[str, str],
    results: Any,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    try:
        import torch.distributed as dist

        # What it was forked from has the environment of the first test.
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        value = function(rank, count, *args)
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
