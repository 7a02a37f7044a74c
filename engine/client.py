"""A client's requests: who waits for which events, over any connection."""

from __future__ import annotations

import itertools
import queue
import threading
import uuid
from collections.abc import Callable, Iterator

from .errors import ERRORS_BY_NAME, EngineStopped, PhalanxError, Timeout
from .messages import Abort, Command, Event, Failed, Finished, Shutdown, Status, StatusRequest, Submit
from .transport import Connection

OnEvent = Callable[[Event], None]


class Client:
    """Sends commands and hands each event to the request it belongs to. Safe to use from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._sinks: dict[str, OnEvent] = {}
        self._status: queue.SimpleQueue[Status | None] = queue.SimpleQueue()
        self._stopped: PhalanxError | None = None
        self._prefix, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        connection.start(self._on_event)

    def new_id(self) -> str:
        """A request id that this client has not used."""
        return f"{self._prefix}-{next(self._numbers)}"

    def submit(self, submit: Submit, on_event: OnEvent) -> None:
        """Send a request; `on_event` gets its events on another thread, the last one a Finished or Failed.

        Raises EngineStopped if the engine has stopped.
        """
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            if submit.id in self._sinks:
                raise ValueError(f"request id {submit.id!r} is in use by a request that is not finished")
            self._sinks[submit.id] = on_event
        self._connection.send(submit)

    def abort(self, request_id: str) -> None:
        """Ask to end a request; its Finished still comes."""
        self._connection.send(Abort(request_id))

    def shutdown(self) -> None:
        """Ask the engine group to end."""
        self._connection.send(Shutdown())

    def send(self, command: Command) -> None:
        """Send any other command."""
        self._connection.send(command)

    def status(self, timeout_s: float | None) -> Status:
        """The engine's Status; Timeout if none comes in time (None waits), EngineStopped if the engine has stopped."""
        if self._stopped is not None:
            raise self._stopped
        self._connection.send(StatusRequest())
        try:
            status = self._status.get(timeout=timeout_s)
        except queue.Empty:
            raise Timeout(f"the engine sent no status within {timeout_s} s") from None
        if status is None:
            assert self._stopped is not None
            raise self._stopped
        return status

    def fail_all(self, error: PhalanxError) -> None:
        """The engine is gone: end every request with `error`, and refuse new ones."""
        with self._lock:
            if self._stopped is not None:
                return
            self._stopped = error
            sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(Failed(request_id, type(error).__name__, str(error)))
        self._status.put(None)

    def close(self) -> None:
        """End what is outstanding with EngineStopped, and the connection."""
        self.fail_all(EngineStopped("the engine was closed"))
        self._connection.close()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Status):
            self._status.put(event)
            return
        with self._lock:
            last = isinstance(event, Finished | Failed)
            sink = self._sinks.pop(event.id, None) if last else self._sinks.get(event.id)
        if sink is not None:
            sink(event)


class RequestHandle:
    """One request under way: iterate over its events (Delta..., Finished). A Failed is raised as its error."""

    def __init__(self, client: Client, submit: Submit) -> None:
        self.id = submit.id
        self._client = client
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = False
        client.submit(submit, self._events.put)

    def abort(self) -> None:
        """End the request early; iteration goes on to its Finished."""
        self._client.abort(self.id)

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._ended:
                event = self._events.get()
                if isinstance(event, Failed):
                    self._ended = True
                    raise to_error(event)
                self._ended = isinstance(event, Finished)
                yield event
        finally:
            if not self._ended:
                self.abort()


def to_error(failed: Failed) -> PhalanxError:
    """The exception a Failed stands for."""
    return ERRORS_BY_NAME.get(failed.error, PhalanxError)(failed.message)
