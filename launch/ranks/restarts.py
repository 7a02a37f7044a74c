"""How often, and how soon, a group that has died is started again. Pure: the caller waits and starts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from ...engine.errors import CheckpointError, ConfigError, InvalidRequest

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LASTING = (ConfigError.__name__, CheckpointError.__name__, InvalidRequest.__name__)
"""Errors that the next start would meet too."""


class Restarts:
    """Allows `most` restarts within `window_s` seconds."""

    def __init__(self, most: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        """Restarts since the beginning."""
        self._most = most
        self._window_s = window_s
        self._clock = clock
        self._recent: deque[float] = deque()

    def pause_s(self, error: str, was_ready: bool) -> float | None:
        """Return the seconds until the next start after a death by `error`, or None if there is none.

        The first restart comes at once, and so does any after a quiet window; then pauses double. A group that was
        never ready is not started again: what kept it from starting would do so again, and its user waits to be told.
        """
        now = self._clock()
        while self._recent and now - self._recent[0] > self._window_s:
            self._recent.popleft()
        if not was_ready and not self.count:
            return None
        if error in LASTING or len(self._recent) >= self._most:
            return None

        earlier = len(self._recent)
        self._recent.append(now)
        self.count += 1
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (earlier - 1)) if earlier else 0.0
