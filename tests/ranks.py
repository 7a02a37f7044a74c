"""Run a function on N real ranks: processes joined by gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT_S = 300


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(rank, count, *args)` in `count` processes whose default process group is gloo.

    `function` must live in an importable module (phalanx.tests....). Returns the results in rank order; the first
    failure is raised with its rank and traceback.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = free_port()
    saved = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = [
        context.Process(target=_enter, args=(rank, count, port, results, function, args), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    if saved is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = saved
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


def _enter(rank: int, count: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=count)
        value = function(rank, count, *args)
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
