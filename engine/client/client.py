"""A client's requests: who waits for which events, over any connection."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import queue
import threading
import time
import uuid

from ...parallel.loading.json_files import shown
from ..errors import ERRORS_BY_NAME, EngineStopped, InvalidRequest, PhalanxError, Timeout
from ..protocol.messages import (
    Abort,
    Accepted,
    Command,
    Detokenize,
    Detokenized,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Shutdown,
    Status,
    StatusRequest,
    Submit,
    Tokenize,
    Tokenized,
)
from ..protocol.sampling_params import SamplingParams
from ..protocol.transport import Connection
from .callbacks import CallbackThreads, OnEvent, Receiver
from .lifetime import interrupts_call, takes_locks

Question = Tokenize | Detokenize | StatusRequest | ModelInfoRequest

# Tuples: a union would be made anew for each event.
_LAST_EVENTS = (Finished, Failed, Tokenized, Detokenized)
_ANSWERS_WITHOUT_ID = (Status, ModelInfo)

CALLBACKS_CLOSE_S = 2.0
"""Longest time that closing waits for receivers of events."""

_log = logging.getLogger(__name__)


class ReceiverGone(Exception):
    """Raised by a receiver of events that nobody waits for any more: no fault, and the request is aborted."""


class Client:
    """Sends commands and hands each event to the request it belongs to. Safe to use from any thread."""

    def __init__(self, connection: Connection, *, supervised: bool = False) -> None:
        """With `supervised` somebody calls fail_all() once the engine has ended, and knows better why than the engine
        itself, which may only have been told to end."""
        self._connection = connection
        self._supervised = supervised
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._sinks: dict[str, OnEvent] = {}
        self._callbacks = CallbackThreads()
        self._dropped: collections.deque[str] = collections.deque()
        self._waiting: dict[type[Event], list[OnEvent]] = {Status: [], ModelInfo: []}  # answers that have no id
        self._stopped: PhalanxError | None = None
        self._prefix, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        connection.start(self._arrived, self._on_lost, self.fail_all)

    @property
    def epoch(self) -> str:
        """The engine's that answered last; empty before one has, and within one process."""
        return self._connection.epoch

    @property
    def silent(self) -> bool:
        """Whether the engine has gone, or does not answer, and requests do not wait for another."""
        return self._connection.silent

    def new_id(self) -> str:
        """A request id that this client has not used."""
        return f"{self._prefix}-{next(self._numbers)}"

    def submit(self, submit: Submit, on_event: OnEvent, *, quick: bool = False) -> None:
        """Send a request; `on_event` gets its events on another thread, the last one a Finished or Failed.

        However long it takes, it holds up its own request alone (callbacks.MOST_THREADS of them may run at once), and
        it may call anything of this client, close() too. A `quick` one, which only puts the event into a queue, is
        called without a change of threads; it must not wait for anything.

        A request that cannot be sent fails in the same way, at once. Raises InvalidRequest for an id in use, and
        EngineStopped if the engine has stopped.
        """
        self._send_for(submit, on_event if quick else self._receiver(submit.id, on_event).put)

    @takes_locks
    def ask(self, question: Question, on_answer: OnEvent) -> None:
        """Send a question; `on_answer`, a quick one, gets its answer or a Failed. Raises what submit() raises.

        The answer to a StatusRequest or a ModelInfoRequest goes to all who wait for one, so who gives up waiting calls
        forget().
        """
        if isinstance(question, Tokenize | Detokenize):
            self._send_for(question, on_answer)
            return
        self._check_process()
        with self._lock:
            self._check_stopped()
            self._waiting[_answer_to(question)].append(on_answer)
        self._connection.send(question)

    @takes_locks
    def forget(self, question: Question, on_answer: OnEvent) -> None:
        """Wait for the answer to a question no more."""
        if isinstance(question, Tokenize | Detokenize):
            self._forget(question.id)
            return
        with self._lock, contextlib.suppress(ValueError):
            self._waiting[_answer_to(question)].remove(on_answer)

    @takes_locks
    def _send_for(self, command: Submit | Tokenize | Detokenize, on_event: OnEvent) -> None:
        """Send a command whose events bear its id."""
        _check_id(command.id)
        self._check_process()
        self._abort_dropped()
        with self._lock:
            self._check_stopped()
            if command.id in self._sinks:
                raise InvalidRequest(
                    f"id={shown(command.id)} is in use by a request that is not finished; choose another"
                )
            self._sinks[command.id] = on_event
        try:
            if isinstance(command, Submit) and not isinstance(command.sampling, SamplingParams):
                # A connection that keeps requests looks into it before any engine does.
                raise InvalidRequest(f"the request is ill-typed: sampling={shown(command.sampling)}")
            self._connection.send(command)
        except InvalidRequest as error:
            self._on_event(Failed(command.id, type(error).__name__, str(error)))
        except BaseException:
            self._forget(command.id)
            raise
        # That it was silent was told before this request was there: nobody would tell of it again.
        if self._connection.silent:
            self._abort(command.id)
            why = "the engine does not answer any more; another may at its address"
            self._on_event(Failed(command.id, EngineStopped.__name__, why))

    def abort(self, request_id: str) -> None:
        """Ask to end a request; its Finished still comes. A signal handler may call this within any line."""
        if interrupts_call(self):
            self.abort_soon(request_id)
        else:
            self._abort(request_id)

    @takes_locks
    def _abort(self, request_id: str) -> None:
        self._connection.send(Abort(request_id))

    def abort_soon(self, request_id: str) -> None:
        """The same from where no lock may be taken, such as the garbage collector: with the next event or request."""
        self._dropped.append(request_id)

    def shutdown(self) -> None:
        """Ask the engine group to end."""
        self._connection.send(Shutdown())

    def send(self, command: Command) -> None:
        """Send any other command."""
        self._connection.send(command)

    def status(self, timeout_s: float | None) -> Status:
        """The engine's Status; Timeout if none comes in time (None waits), EngineStopped if the engine has stopped."""
        # A wait for longer than the system can wait has no end.
        wait_s = None if timeout_s is None or timeout_s > threading.TIMEOUT_MAX else timeout_s
        deadline = None if wait_s is None else time.monotonic() + wait_s
        answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
        while True:
            self.ask(StatusRequest(), answers.put)
            try:
                answer = answers.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.forget(StatusRequest(), answers.put)
                raise Timeout(f"the engine sent no status within {timeout_s} s") from None
            # The question may have been lost with the engine, or the connection, that it went to.
            if isinstance(answer, Status):
                return answer

    def check_open(self) -> None:
        """Raise the error with which this client refuses everything: it was closed, or its engine has stopped."""
        self._check_stopped()

    def fail_all(self, error: PhalanxError) -> None:
        """The engine is gone: end every request with `error`, and refuse new ones."""
        self._stop(error)

    def close(self) -> None:
        """End what is outstanding with EngineStopped, and the connection. Receivers may close it too."""
        self.fail_all(EngineStopped("the engine was closed"))
        self._connection.close()
        self._callbacks.close(CALLBACKS_CLOSE_S)

    def leave(self, error: PhalanxError) -> None:
        """End every request with `error`, also at the engine, which goes on, and the connection."""
        for request_id in self._stop(error):
            self._abort(request_id)
        self._connection.close()
        self._callbacks.close(CALLBACKS_CLOSE_S)

    def _stop(self, error: PhalanxError) -> list[str]:
        """End every request with `error`, and refuse new ones. Returns the requests' ids."""
        with self._lock:
            if self._stopped is not None:
                return []
            self._stopped = error
        return self._fail_outstanding(error)

    def _on_lost(self, error: EngineStopped) -> None:
        """The engine does not have this client's requests any more; another may answer at its address."""
        for request_id in self._fail_outstanding(error):
            # If it has them after all, nobody waits for them.
            self._abort(request_id)

    def _fail_outstanding(self, error: PhalanxError) -> list[str]:
        """End every request, and a wait for a Status, with `error`. Returns the requests' ids."""
        with self._lock:
            sinks, self._sinks = self._sinks, {}
            waiting = [sink for kind in self._waiting for sink in self._take_waiting(kind)]
        for request_id, sink in [*sinks.items(), *(("", sink) for sink in waiting)]:
            self._hand_on(sink, Failed(request_id, type(error).__name__, str(error)))
        return list(sinks)

    def _abort_dropped(self) -> None:
        while self._dropped:
            # Another thread may have been faster.
            with contextlib.suppress(IndexError):
                self._abort(self._dropped.popleft())

    def _arrived(self, event: Event) -> None:
        """An event of the engine. Its own word of its end is left out where somebody else tells of that."""
        if not (self._supervised and isinstance(event, Failed) and event.error == EngineStopped.__name__):
            self._on_event(event)

    def _on_event(self, event: Event) -> None:
        if self._dropped:
            self._abort_dropped()
        if isinstance(event, _ANSWERS_WITHOUT_ID):
            with self._lock:
                waiting = self._take_waiting(type(event))
            for answer_to in waiting:
                self._hand_on(answer_to, event)
            return
        with self._lock:
            last = isinstance(event, _LAST_EVENTS)
            sink = self._sinks.pop(event.id, None) if last else self._sinks.get(event.id)
        if sink is not None and not self._hand_on(sink, event) and not last:
            self._forget(event.id)
            self._abort(event.id)

    def _receiver(self, request_id: str, on_event: OnEvent) -> Receiver:
        def hand_on(event: Event) -> bool:
            taken = self._hand_on(on_event, event)
            if not taken and not isinstance(event, Finished | Failed):
                self._forget(request_id)
                self._abort(request_id)
            return taken

        return Receiver(self._callbacks, hand_on)

    def _hand_on(self, sink: OnEvent, event: Event) -> bool:
        """Whether the receiver took the event. One that raises, be it SystemExit, must not end the thread that serves
        all others."""
        try:
            sink(event)
        except ReceiverGone:
            return False
        except BaseException:
            _log.exception("the receiver of a request's events failed")
            return False
        return True

    def _take_waiting(self, kind: type[Event]) -> list[OnEvent]:
        """Return who waits for an answer of this kind, and let nobody wait any more. The lock is held."""
        waiting, self._waiting[kind] = self._waiting[kind], []
        return waiting

    def _forget(self, request_id: str) -> None:
        with self._lock:
            self._sinks.pop(request_id, None)

    def _check_process(self) -> None:
        """Raise EngineStopped in a forked process: the threads that answer are the parent's, and so are held locks."""
        if os.getpid() != self._process:
            raise EngineStopped(
                f"this engine belongs to process {self._process}, from which this one ({os.getpid()}) was forked: make "
                f"an engine here, or start processes by spawn"
            )

    def _check_stopped(self) -> None:
        if self._stopped is not None:
            # A new exception each time: one that is raised again and again would grow its traceback.
            raise type(self._stopped)(*self._stopped.args)


def _check_id(request_id: object) -> None:
    """Raise InvalidRequest for an id that no wire carries: nobody could be told of its failure."""
    try:
        if isinstance(request_id, str) and request_id.encode() is not None:
            return
    except UnicodeEncodeError:
        pass  # half of a surrogate pair
    raise InvalidRequest(f"id={shown(request_id)} must be a text of valid Unicode")


def _answer_to(question: StatusRequest | ModelInfoRequest) -> type[Event]:
    return Status if isinstance(question, StatusRequest) else ModelInfo


class RequestHandle:
    """One request under way: an iterator over its events (Delta..., Finished). A Failed is raised as its error.

    Whoever stops early closes it, which aborts the request; dropping the last reference does the same.
    """

    _ended = True  # also of one that could not be made

    def __init__(self, client: Client, submit: Submit, owner: object = None) -> None:
        """`owner` is what must not be dropped while somebody iterates: the LLM, with which its engine would end."""
        self.id = submit.id
        self._client = client
        self._owner = owner
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        client.submit(submit, self._events.put, quick=True)
        self._ended = False

    def abort(self) -> None:
        """End the request early; iteration goes on to its Finished."""
        self._client.abort(self.id)

    def close(self) -> None:
        """End the request, if it has not ended, and the iteration."""
        if not self._ended:
            self._ended = True
            self.abort()

    def __iter__(self) -> RequestHandle:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self._events.get()
        while isinstance(event, Accepted):  # nothing that its user sees
            event = self._events.get()
        self._ended = isinstance(event, Finished | Failed)
        if isinstance(event, Failed):
            raise to_error(event)
        return event

    def __del__(self) -> None:
        # The garbage collector may call this within any line of any thread, also one that holds the client's lock.
        if not self._ended:
            self._ended = True
            self._client.abort_soon(self.id)


def to_error(failed: Failed) -> PhalanxError:
    """The exception a Failed stands for."""
    return ERRORS_BY_NAME.get(failed.error, PhalanxError)(failed.message)
