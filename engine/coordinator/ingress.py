"""What comes in: a thread makes requests of clients' text and hands them to the step loop; all else goes past it."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import InvalidRequest, PhalanxError
from ..protocol.messages import (
    Abort,
    Command,
    Completion,
    Detokenize,
    Finished,
    ModelInfoRequest,
    Shutdown,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Usage,
)
from .egress import Egress
from .input_processor import InputProcessor
from .registry import Owner, RequestRegistry
from .threads import QueueThread, StepLoop

_log = logging.getLogger(__name__)


class Ingress:
    """Owns the intake thread, which encodes text so that no step waits for it. The input processor is used by it alone.

    Aborts, questions for the status and the end of the engine wait for no text: they go past it. The
    transport's threads call receive(); the thread that owns the coordinator calls start() and close().
    """

    def __init__(self, processor: InputProcessor, registry: RequestRegistry, egress: Egress, loop: StepLoop) -> None:
        self._processor = processor
        self._registry = registry
        self._egress = egress
        self._loop = loop
        # Requests that wait for the intake thread, or are in its hands, and those of them that were aborted meanwhile.
        self._lock = threading.Lock()
        self._waiting: set[Owner] = set()
        self._aborted: set[Owner] = set()
        self._thread = QueueThread("intake", self._submit, loop)

    def start(self) -> None:
        """Begin to take in requests."""
        self._thread.start()

    def receive(self, client: bytes, command: Command) -> None:
        """Take a command from the transport, on any thread. A request's times count from here."""
        if isinstance(command, Submit):
            owner = Owner(client, command.id)
            with self._lock:
                self._waiting.add(owner)
            self._thread.put((owner, command, time.monotonic()))
        elif isinstance(command, Abort):
            self._abort(Owner(client, command.id))
        elif isinstance(command, Tokenize | Detokenize):
            self._thread.put((Owner(client, command.id), command, time.monotonic()))
        elif isinstance(command, StatusRequest):
            self._loop.report_status(client)
        elif isinstance(command, ModelInfoRequest):
            self._loop.report_model_info(client)
        else:
            assert isinstance(command, Shutdown)
            self._loop.stop()

    def close(self) -> None:
        """Take in the requests received so far, then end the thread; later ones are dropped."""
        self._thread.close()

    def _abort(self, owner: Owner) -> None:
        with self._lock:
            if owner in self._waiting:
                self._aborted.add(owner)
        self._loop.call_soon(self._loop.abort, owner.request_id)

    # ---- the intake thread

    def _submit(self, received: tuple[Owner, Submit | Tokenize | Detokenize, float]) -> None:
        owner, submit, arrived_at = received
        if not isinstance(submit, Submit):
            self._answer(owner, submit)
            return

        with self._lock:
            aborted = owner in self._aborted
        if aborted:
            self._egress.send(owner.client, _never_begun(submit, time.monotonic() - arrived_at))
        else:
            self._process(owner, submit, arrived_at)

        with self._lock:
            self._waiting.discard(owner)
            aborted_meanwhile = owner in self._aborted and not aborted
            self._aborted.discard(owner)
        if aborted_meanwhile:
            self._loop.call_soon(self._loop.abort, owner.request_id)

    def _answer(self, owner: Owner, question: Tokenize | Detokenize) -> None:
        try:
            self._egress.send(owner.client, self._processor.answer(question))
        except PhalanxError as error:
            self._egress.refuse(owner, error)
        except Exception as error:
            _log.exception("a question could not be answered")
            self._egress.refuse(owner, InvalidRequest(f"the question was refused: {error!r}"))

    def _process(self, owner: Owner, submit: Submit, arrived_at: float) -> None:
        try:
            self._registry.check_unused(owner)
            request = self._processor.process(submit, owner.request_id, arrived_at)
            self._registry.add(owner)
        except PhalanxError as error:
            self._egress.refuse(owner, error)
        except Exception as error:
            # Whatever a request brings about while it is taken in, it brings about for itself alone.
            _log.exception("a request could not be taken in")
            self._egress.refuse(owner, InvalidRequest(f"the request was refused: {error!r}"))
        else:
            self._loop.call_soon(self._loop.add, owner, request, submit)


def _never_begun(submit: Submit, waited_s: float) -> Finished:
    """Return the end of a request that was aborted before its text was looked at."""
    completions = [Completion(index, "abort") for index in range(submit.sampling.n)]
    return Finished(submit.id, completions, Usage(0, 0), Timings(waited_s, waited_s, 0.0, waited_s))
