"""Threads that call receivers of events, which may take as long as they like: each holds up its own request alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..protocol.messages import Event

MOST_THREADS = 16
"""Receivers that run at once; when so many do not return, the others wait."""
IDLE_S = 10.0
"""Seconds until a thread with nothing to do ends."""

OnEvent = Callable[[Event], None]


class CallbackThreads:
    """Calls receivers, each one's events in order and one at a time. Threads start as they are needed, and end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # for the threads
        self._done = threading.Condition(self._lock)  # for close()
        self._ready: deque[Receiver] = deque()
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._running: dict[threading.Thread, Receiver] = {}
        self._closed = False

    def schedule(self, receiver: Receiver) -> None:
        """Have a receiver called on some thread: the caller's own where no other can be started."""
        alone = False
        with self._lock:
            self._ready.append(receiver)
            if self._idle < len(self._ready) and len(self._threads) < MOST_THREADS:
                thread = threading.Thread(target=self._run, name="phalanx-callbacks", daemon=True)
                try:
                    thread.start()
                    self._threads.add(thread)
                except RuntimeError:  # this user, or this container, has as many as it may: those that run do it
                    alone = not self._threads
            if alone:
                self._ready.remove(receiver)
            self._work.notify()
        if alone:
            receiver.deliver()

    def close(self, timeout_s: float) -> None:
        """Call what is due, for `timeout_s` seconds at most. A receiver that calls this is not waited for."""
        own = threading.current_thread()
        with self._lock:
            self._closed = True
            self._work.notify_all()
            self._done.wait_for(lambda: not self._ready and self._running.keys() <= {own}, timeout_s)

    def _run(self) -> None:
        own = threading.current_thread()
        while (receiver := self._take(own)) is not None:
            receiver.deliver()
            with self._lock:
                del self._running[own]
                self._done.notify_all()

    def _take(self, own: threading.Thread) -> Receiver | None:
        with self._lock:
            self._idle += 1
            self._work.wait_for(lambda: self._ready or self._closed, IDLE_S)
            self._idle -= 1
            if not self._ready:
                self._threads.discard(own)
                return None
            receiver = self._running[own] = self._ready.popleft()
            return receiver


class Receiver:
    """One request's receiver, and the events that it has not taken yet: no more than the request asked for."""

    def __init__(self, threads: CallbackThreads, hand_on: Callable[[Event], bool]) -> None:
        """`hand_on` calls the receiver and says whether it wants more."""
        self._threads = threads
        self._hand_on = hand_on
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._scheduled = False
        self._failed = False

    def put(self, event: Event) -> None:
        """Have the receiver called with an event, after those before it."""
        with self._lock:
            self._events.append(event)
            first, self._scheduled = not self._scheduled, True
        if first:
            self._threads.schedule(self)

    def deliver(self) -> None:
        """Call the receiver with what has come by now. One thread calls this at a time."""
        while (event := self._next()) is not None:
            if not self._failed:
                self._failed = not self._hand_on(event)

    def _next(self) -> Event | None:
        with self._lock:
            if not self._events:
                self._scheduled = False
                return None
            return self._events.popleft()
