"""How the coordinator's threads work together: each of them empties a queue that the others fill."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Generic, ParamSpec, Protocol, TypeVar

from ..errors import EngineFault
from ..protocol.messages import Submit
from ..scheduling.request import Request
from .registry import Owner

OUTPUT_CLOSE_S = 10.0
"""Longest time that closing waits for events that are due."""

_log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class StepLoop(Protocol):
    """What the intake and output threads ask of the step loop. add(), abort() and finish() run on its own
    thread."""

    def call_soon(self, action: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have the loop call `action` between two steps; any thread may ask. What it raises ends the loop."""

    def stop(self) -> None:
        """End the loop after the step under way; any thread may ask."""

    def add(self, owner: Owner, request: Request, submit: Submit) -> None:
        """Schedule an accepted request, or fail it if the queue has no room."""

    def abort(self, request_id: str) -> None:
        """End a request early; an unknown one is ignored."""

    def finish(self, request_id: str, index: int, stop: str | None) -> None:
        """End sequence `index` of a request, whose text has reached the stop string `stop`, or is complete."""

    def report_status(self, client: bytes) -> None:
        """Send the engine's Status to a client; any thread may ask."""

    def report_model_info(self, client: bytes) -> None:
        """Send the engine's ModelInfo to a client; any thread may ask."""


class QueueThread(Generic[T]):
    """A thread that handles, in order, what other threads put into its queue.

    A defect in it must leave no request unanswered: what `handle` raises ends the step loop.
    """

    def __init__(self, name: str, handle: Callable[[T], None], loop: StepLoop) -> None:
        self._handle = handle
        self._loop = loop
        self._queue: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self.put: Callable[[T], None] = self._queue.put
        """Have an item handled after everything that is in the queue. Any thread may call it."""
        self._thread = threading.Thread(target=self._run, name=f"phalanx-{name}", daemon=True)

    def start(self) -> None:
        """Begin to handle what is in the queue."""
        self._thread.start()

    def close(self, timeout_s: float = OUTPUT_CLOSE_S) -> None:
        """Handle what is in the queue, then end the thread. Waits `timeout_s` seconds at most."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _log.warning("%s has not ended within %g s; it is left behind", self._thread.name, timeout_s)

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._handle(item)
        except BaseException as error:
            self._loop.call_soon(raise_in_loop, as_exception(error))


class FairThreads(Generic[T]):
    """Several threads that share what others put in: each client's items begin in order, the clients take turns.

    One client never has all threads, however long its items take. The threads start when they are first needed.
    """

    def __init__(self, name: str, handle: Callable[[T], None], loop: StepLoop, threads: int) -> None:
        self._name = name
        self._handle = handle
        self._loop = loop
        self._most_of_a_client = max(1, threads - 1)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._items: dict[bytes, deque[T]] = {}  # by client; whose turn is next comes first
        self._busy: Counter[bytes] = Counter()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"phalanx-{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        self._running = 0  # of the threads, the first ones

    def put(self, client: bytes, item: T) -> None:
        """Have a client's item handled. Any thread may call it; after close() it is dropped.

        Raises EngineFault if the system lets no thread run that could.
        """
        with self._lock:
            if self._closed:
                return
            self._start()
            self._items.setdefault(client, deque()).append(item)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Handle what was put in, then end the threads. Waits `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads[: self._running]:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._items.clear()  # nobody waits for what was not begun by now
        if any(thread.is_alive() for thread in self._threads):
            _log.warning("a request's text still keeps a thread of %s busy; it is left behind", self._name)

    def _start(self) -> None:
        """Start the threads that do not run yet. The lock is held."""
        try:
            for thread in self._threads[self._running :]:
                thread.start()
                self._running += 1
        except RuntimeError as error:  # this user, or this container, has as many as it may
            if not self._running:
                raise EngineFault(
                    f"the engine can start no thread for the request ({error}): let its user have more processes"
                ) from error

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                client, item = taken
                try:
                    self._handle(item)
                finally:
                    self._give_back(client)
        except BaseException as error:
            self._loop.call_soon(raise_in_loop, as_exception(error))

    def _take(self) -> tuple[bytes, T] | None:
        """Wait for an item of the client whose turn it is; None at the end."""
        with self._lock:
            while True:
                for client, items in self._items.items():
                    if self._busy[client] < self._most_of_a_client:
                        self._busy[client] += 1
                        del self._items[client]
                        item = items.popleft()
                        if items:
                            self._items[client] = items  # the others come first
                        return client, item
                if self._closed and not self._items:
                    return None
                self._changed.wait()

    def _give_back(self, client: bytes) -> None:
        with self._lock:
            self._busy[client] -= 1
            if not self._busy[client]:
                del self._busy[client]
            self._changed.notify_all()


def as_exception(error: BaseException) -> Exception:
    """Return `error`, or an Exception for what is none, as a panic of Rust code and SystemExit are.

    What ends a thread of the engine must end nothing else, and must leave nobody waiting for that thread.
    """
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


def raise_in_loop(error: Exception) -> None:
    """Raise `error`: for StepLoop.call_soon, which it ends the loop with."""
    raise error
