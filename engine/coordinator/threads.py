"""How the coordinator's three threads work together: each of them empties a queue that the others fill."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, Protocol, TypeVar

from ..protocol.messages import Submit
from ..scheduling.request import Request
from .registry import Owner

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

    def finish(self, request_id: str, index: int, stop: str) -> None:
        """End sequence `index` of a request, whose text has reached the stop string `stop`."""

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

    def close(self) -> None:
        """Handle what is in the queue, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._handle(item)
        except Exception as error:
            self._loop.call_soon(_raise, error)


def _raise(error: Exception) -> None:
    raise error
