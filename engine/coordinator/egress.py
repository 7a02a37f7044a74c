"""What goes out: a thread turns sampled tokens into events and sends each client its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from ..errors import EngineFault, EngineStopped, PhalanxError
from ..protocol.messages import Event, Failed, Submit
from ..protocol.transport import CannotEncode, Transport
from ..scheduling.request import Request, SequenceUpdate
from .output_processor import OutputProcessor
from .registry import Owner, RequestRegistry
from .threads import QueueThread, StepLoop
from .tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class Egress:
    """Owns the output thread, and through it the text of every running request and the events not sent yet.

    Any thread may call begin(), deliver(), send(), refuse() and fail(); their work is done on the output thread, in
    the order of the calls. The thread that owns the coordinator calls start(), fail_all() and close().
    """

    def __init__(
        self, transport: Transport, tokenizer: Tokenizer | None, registry: RequestRegistry, loop: StepLoop
    ) -> None:
        self._transport = transport
        self._registry = registry
        self._loop = loop
        self._processor = OutputProcessor(tokenizer, self._emit, self._stop_found)
        self._events: dict[bytes, list[Event]] = {}  # by client
        self._thread: QueueThread[Callable[[], None]] = QueueThread("output", self._handle, loop)

    def start(self) -> None:
        """Begin to send events."""
        self._thread.start()

    def begin(self, owner: Owner, submit: Submit, request: Request) -> None:
        """Tell the client that the scheduler took its request, and expect updates of it."""
        self._thread.put(partial(self._begin, owner, submit, request))

    def deliver(self, updates: list[SequenceUpdate]) -> None:
        """Send what a step, an abort or a stop string brought."""
        self._thread.put(partial(self._deliver, updates))

    def send(self, client: bytes, event: Event) -> None:
        """Send an event that is no request's."""
        self._thread.put(partial(self._emit, client, event))

    def refuse(self, owner: Owner, error: PhalanxError) -> None:
        """Answer a request that was never accepted; one of the same id that was is left alone."""
        self._thread.put(partial(self._emit_failed, owner, error))

    def fail(self, request_id: str, error: PhalanxError) -> None:
        """End an accepted request with an error, after its events that are due; one that has ended is left alone.

        The caller has taken the request from the scheduler.
        """
        self._thread.put(partial(self._fail, request_id, error))

    def fail_all(self, error: EngineStopped) -> None:
        """End every accepted request with an error, after all events that are due. The registry is closed by then."""
        self._thread.put(partial(self._fail_all, error))

    def close(self) -> None:
        """Send what is due, then end the thread."""
        self._thread.close()

    # ---- the output thread

    def _handle(self, action: Callable[[], None]) -> None:
        action()
        # What a step brought a client goes as one message: each costs two threads and the client a wake-up.
        outgoing, self._events = self._events, {}
        for client, events in outgoing.items():
            try:
                self._transport.send(client, *events)
            except CannotEncode:
                self._send_singly(client, events)

    def _send_singly(self, client: bytes, events: list[Event]) -> None:
        """Send what can be encoded. A request with an event that cannot fails, and gets no event after that."""
        failed: set[str] = set()
        for event in events:
            name = getattr(event, "id", "")
            if name in failed:
                continue
            try:
                self._transport.send(client, event)
            except CannotEncode as error:
                _log.exception("an event of a request could not be sent")
                failed.add(name)
                owner = Owner(client, name)
                self._processor.forget(owner.request_id)
                self._registry.remove(owner.request_id)
                self._loop.call_soon(self._loop.abort, owner.request_id)
                fault = EngineFault(f"the answer could not be sent: {error!r}")
                self._transport.send(client, Failed(name, type(fault).__name__, str(fault)))

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            try:
                self._processor.update(update)
            except Exception as error:
                self._fail_answer(update.request.id, error)
            if update.request_finished:
                self._registry.remove(update.request.id)

    def _begin(self, owner: Owner, submit: Submit, request: Request) -> None:
        try:
            self._processor.start(owner.client, submit, request)
        except Exception as error:
            self._fail_answer(request.id, error)

    def _fail_answer(self, request_id: str, error: Exception) -> None:
        """What goes wrong with a request's text is its own affair: it fails, and no other."""
        _log.error("the answer of a request could not be made", exc_info=error)
        self._fail(request_id, EngineFault(f"the answer could not be made: {error!r}"))
        self._loop.call_soon(self._loop.abort, request_id)

    def _stop_found(self, request_id: str, index: int, stop: str) -> None:
        self._loop.call_soon(self._loop.finish, request_id, index, stop)

    def _fail(self, request_id: str, error: PhalanxError) -> None:
        owner = self._registry.remove(request_id)
        if owner is not None:
            self._processor.forget(request_id)
            self._emit_failed(owner, error)

    def _fail_all(self, error: EngineStopped) -> None:
        for request_id in self._registry.unfinished():
            self._fail(request_id, error)

    def _emit_failed(self, owner: Owner, error: PhalanxError) -> None:
        self._emit(owner.client, Failed(owner.external_id, type(error).__name__, str(error)))

    def _emit(self, client: bytes, event: Event) -> None:
        self._events.setdefault(client, []).append(event)
