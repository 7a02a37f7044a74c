"""Whether the system lets this user start the threads and processes of an engine: asked before the first of them.

Without it a library ends the process (OpenMP, ZeroMQ), or a tokenizer is called unreadable, wherever the limit happens
to be met. Limits are a user's (ulimit -u) or a container's (pids.max), and what others have started counts too.
"""

from __future__ import annotations

import os
import resource
import threading

from ..config import MOST_THREADS, EngineConfig
from ..errors import ConfigError

OWN_THREADS = 18
"""Threads of the process that decides, besides those that compute and those that encode texts."""
CLIENT_THREADS = 10
"""Threads of a group's client."""
SUPERVISOR_THREADS = 6
"""Threads and processes of what starts and watches a group."""


def threads_of(config: EngineConfig) -> int:
    """Threads and processes that an engine of this configuration starts, for the most part as it starts itself."""
    cpus = len(os.sched_getaffinity(0))
    threads = config.threads or min(MOST_THREADS, max(1, cpus // config.ranks))
    # Of these CPUs each has a thread that encodes texts.
    alone = OWN_THREADS + threads + cpus
    if config.ranks == 1:
        return alone
    return alone + CLIENT_THREADS + SUPERVISOR_THREADS + config.ranks + (config.ranks - 1) * (1 + threads)


def check_thread_room(config: EngineConfig) -> None:
    """Raise ConfigError unless as many threads as the engine needs can be started: it starts them, and ends them."""
    needed = threads_of(config)
    # Of a group most belong to other processes, whose stacks take none of the addresses that this one may have.
    if config.ranks > 1 and resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        needed = CLIENT_THREADS
    leave = threading.Event()
    started: list[threading.Thread] = []
    try:
        while len(started) < needed:
            thread = threading.Thread(target=leave.wait, name="phalanx-room", daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise ConfigError(
            f"the system starts {len(started)} more threads and processes for this user, and ranks={config.ranks} "
            f"needs {needed}: raise the limit (ulimit -u, ulimit -v, or the container's pids.max), or set fewer ranks "
            f"or threads"
        ) from error
    finally:
        leave.set()
        for thread in started:
            thread.join()
