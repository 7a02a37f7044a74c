"""Work that somebody else's text may make long, or deep: on a thread whose stack is large and whose time is watched."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from ..errors import CapacityExceeded, EngineFault, InvalidRequest

T = TypeVar("T")

STACK_BYTES = 1 << 26
"""The library follows references by recursion: this is four times what the deepest schema that is let in needs."""
CPU_S = 2.0
"""Seconds of a processor's time that one grammar may take to compile."""
ABANDONED = 2
"""Threads that may still run although nobody waits for them: with as many, nothing new is begun."""
POLL_S = 0.02
NICENESS = 10
"""How much such a thread gives way to others of its process: what it takes of a busy machine it takes from steps."""

_lock = threading.Lock()
_abandoned: list[threading.Thread] = []


class _Work(threading.Thread, Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(name="phalanx-grammar", daemon=True)
        self._function = function
        self.result: T | None = None
        self.error: BaseException | None = None
        self._clock: int | None = None
        self._began_at: float | None = None

    @property
    def spent(self) -> float:
        """Seconds of a processor's time that it has taken; where that is not told, seconds since it began."""
        if self._began_at is None:  # on a busy machine it may wait for long
            return 0.0
        if self._clock is None:
            return time.monotonic() - self._began_at
        try:
            return time.clock_gettime(self._clock)
        except OSError:  # it has just ended
            return 0.0

    def run(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._began_at = time.monotonic()
        give_way(NICENESS)
        try:
            self.result = self._function()
        except BaseException as error:  # whoever waits raises it
            self.error = error


def give_way(niceness: int) -> None:
    """Have the calling thread give way to the others of its process, where the system has priorities of threads."""
    if sys.platform == "linux":
        this = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, this, min(19, os.getpriority(os.PRIO_PROCESS, this) + niceness))


def run_bounded(function: Callable[[], T], what: str) -> T:
    """Return what `function` returns, or raise what it raises.

    Raises InvalidRequest, naming `what`, if it takes more than CPU_S, CapacityExceeded while ABANDONED others that did
    are not done, and EngineFault where the system lets no thread run that could do it.
    """
    work = _Work(function)
    with _lock:
        _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
        if len(_abandoned) >= ABANDONED:
            raise CapacityExceeded(f"{what} cannot be compiled now: {ABANDONED} that took too long still run; retry")
        before = threading.stack_size(STACK_BYTES)
        try:
            work.start()
        except RuntimeError as error:  # this user, or this container, has as many as it may
            raise EngineFault(
                f"the engine can start no thread for {what} ({error}): let its user have more processes"
            ) from error
        finally:
            threading.stack_size(before)

    while work.is_alive():
        work.join(POLL_S)
        if work.is_alive() and work.spent > CPU_S:
            with _lock:
                _abandoned.append(work)
            raise InvalidRequest(f"{what} is too complex: it takes more than {CPU_S:g} s to compile")
    if work.error is not None:
        raise work.error
    return cast(T, work.result)
