"""From the threads that events arrive on to the event loop, which is woken once for a batch of them."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Callable

from ....engine.protocol.messages import Event

Sink = Callable[[Event], None]

_log = logging.getLogger(__name__)


class EventBridge:
    """Hands events to their sinks on the event loop, in the order in which they arrived."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: collections.deque[tuple[Sink, Event]] = collections.deque()
        self._woken = False

    def deliver(self, sink: Sink, event: Event) -> None:
        """Have `sink(event)` called on the event loop. Called from any thread; never raises."""
        self._events.append((sink, event))
        if not self._woken:
            # Two threads may both get here: the loop is woken twice then, and finds nothing the second time.
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._drain)
            except RuntimeError:  # the loop was closed: nobody waits for events any more
                self._events.clear()

    def _drain(self) -> None:
        # Before the events are taken: one that arrives from now on wakes the loop again.
        self._woken = False
        while self._events:
            sink, event = self._events.popleft()
            try:
                sink(event)
            except Exception:
                _log.exception("the receiver of a request's events failed")
