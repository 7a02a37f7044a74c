"""The threads of a process and the CPUs they may run on, as Linux says."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

POOL = "phalanx-pool"
"""The name of the threads that the kernels' pool starts."""


def thread_cpus(process: int | str = "self") -> list[tuple[str, str]]:
    """Name and Cpus_allowed_list of every thread, sorted."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = (task / "status").read_text().splitlines()
            status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            found.append((status["Name"], status["Cpus_allowed_list"]))
    return sorted(found)


def pool_cpus(expected: list[str], process: int | str = "self") -> list[str]:
    """CPUs of the pool's threads. A thread has its name only once it runs, and may be listed for a moment after it has
    ended: for a while, what is `expected` is waited for.
    """
    deadline = time.monotonic() + 30
    while True:
        cpus = [cpus for name, cpus in thread_cpus(process) if name == POOL]
        if cpus == expected or time.monotonic() > deadline:
            return cpus


def other_cpus(process: int | str = "self") -> set[str]:
    """CPUs of all threads but the pool's."""
    return {cpus for name, cpus in thread_cpus(process) if name != POOL}
