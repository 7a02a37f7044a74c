"""What is done later: by one thread, however many requests wait for something."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CLOSE_S = 4.0
"""Longest time that close() waits for an action that has begun."""

_log = logging.getLogger(__name__)


@dataclass(order=True, frozen=True)
class Timer:
    """An action that is due at a time of time.monotonic(); of those due at once, the first one made comes first."""

    due: float
    number: int
    action: Callable[[], None] = field(compare=False)


class Timers:
    """A thread that calls what is due. It is started at first, for later the system may let no more threads start."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Timer] = []  # a heap
        self._numbers = itertools.count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def after(self, seconds: float, action: Callable[[], None]) -> Timer:
        """Have the thread call `action` once so many seconds have passed. Any thread may call this."""
        timer = Timer(time.monotonic() + seconds, next(self._numbers), action)
        with self._changed:
            heapq.heappush(self._waiting, timer)
            self._changed.notify()
        return timer

    def cancel(self, timer: Timer) -> None:
        """Forget an action, unless it has begun."""
        with self._changed:
            if timer in self._waiting:
                self._waiting.remove(timer)
                heapq.heapify(self._waiting)

    def close(self) -> None:
        """Begin no more actions, and wait for one that has begun, unless it is this one's caller."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (timer := self._next()) is not None:
            try:
                timer.action()
            except Exception:
                _log.exception("what was due could not be done; the rest goes on")

    def _next(self) -> Timer | None:
        """Wait for one that is due; None once this is closed."""
        with self._changed:
            while not self._closed:
                patience = self._waiting[0].due - time.monotonic() if self._waiting else None
                if patience is not None and patience <= 0:
                    return heapq.heappop(self._waiting)
                self._changed.wait(None if patience is None else min(patience, threading.TIMEOUT_MAX))
        return None
