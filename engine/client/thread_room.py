"""Whether the system lets this user start the threads and processes of an engine: asked before the first of them.

Without it a library ends the process (OpenMP, ZeroMQ), or a tokenizer is called unreadable, wherever the limit happens
to be met. Limits are a user's (ulimit -u) or a container's (pids.max), and what others have started counts too.
"""

from __future__ import annotations

import os
import threading

from ..config import MOST_THREADS, EngineConfig
from ..errors import ConfigError

OWN_THREADS = 18
"""Threads of the process that decides, besides those that compute and those that encode texts."""
GROUP_THREADS = 16
"""Threads and processes of a group's client and supervisor."""


def threads_of(config: EngineConfig) -> int:
    """Threads and processes that an engine of this configuration starts, for the most part as it starts itself."""
    cpus = len(os.sched_getaffinity(0))
    threads = config.threads or min(MOST_THREADS, max(1, cpus // config.ranks))
    # Of these CPUs each has a thread that encodes texts.
    alone = OWN_THREADS + threads + cpus
    return alone if config.ranks == 1 else alone + GROUP_THREADS + config.ranks + (config.ranks - 1) * (1 + threads)


def check_thread_room(config: EngineConfig) -> None:
    """Raise ConfigError unless as many threads as the engine needs can be started: it starts them, and ends them."""
    needed = threads_of(config)
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
