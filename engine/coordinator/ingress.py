"""What comes in: threads make requests of clients' text and hand them to the step loop; all else goes past them."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from ..errors import CapacityExceeded, EngineFault, EngineStopped, InvalidRequest, PhalanxError
from ..protocol.messages import (
    Abort,
    Command,
    Completion,
    Detokenize,
    Finished,
    ModelInfoRequest,
    Prompt,
    Shutdown,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Usage,
)
from .egress import Egress
from .input_processor import InputProcessor
from .registry import Owner, RequestRegistry, id_in_use
from .threads import FairThreads, QueueThread, StepLoop, raise_in_loop

LONG_BYTES = 64 * 2**10
"""Text of more bytes is encoded beside the short texts, so that these never wait for it."""
CHAT_THREADS, LONG_THREADS, GRAMMAR_THREADS = 4, 2, 4
WAITING_BYTES = 64 * 2**20
"""Most bytes of one client's requests that wait to be encoded; one request may have more."""
CLOSE_S = 2.0
"""Longest time that closing waits for texts that are being encoded."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Received:
    owner: Owner
    submit: Submit | Tokenize | Detokenize
    arrived_at: float
    size: int
    """Bytes of what it begins with."""
    seed: int | None
    """What its draws depend on, if it says nothing itself."""


class Ingress:
    """Owns the intake threads, which encode text so that no step waits for it.

    Short prompts and token ids are taken in one after the other. A conversation goes through the model's own template,
    a long text takes long to encode, and a grammar to compile: each kind has threads of its own, which the clients
    share fairly.

    Aborts, questions for the state and the end of the engine wait for no text: they go past it. The transport's threads
    call receive(), abandon() and fail(); the thread that owns the coordinator start() and close().
    """

    def __init__(self, processor: InputProcessor, registry: RequestRegistry, egress: Egress, loop: StepLoop) -> None:
        self._processor = processor
        self._registry = registry
        self._egress = egress
        self._loop = loop
        # Requests that wait for an intake thread, or are in its hands, and those of them that were aborted meanwhile.
        self._lock = threading.Lock()
        self._waiting: dict[Owner, _Received] = {}
        self._waiting_bytes: dict[bytes, int] = {}  # by client
        self._aborted: set[Owner] = set()
        self._closed = False

        self._short = QueueThread("intake", self._take_in, loop)
        self._chats = FairThreads("intake-chats", self._take_in, loop, CHAT_THREADS)
        self._long = FairThreads("intake-long", self._take_in, loop, LONG_THREADS)
        self._grammars = FairThreads("intake-grammars", self._take_in, loop, GRAMMAR_THREADS)

    def start(self) -> None:
        """Begin to take in requests."""
        self._short.start()

    def prepare(self) -> None:
        """Make ready what the first conversation or the first grammar would wait for; on any thread."""
        try:
            self._processor.prepare()
        except PhalanxError as error:
            _log.warning("%s", error)  # requests with a grammar are refused for the same reason

    def receive(self, client: bytes, command: Command) -> None:
        """Take a command from the transport, on any thread. A request's times count from here."""
        if isinstance(command, Submit | Tokenize | Detokenize):
            owner = Owner(client, command.id)
            try:
                self._receive(owner, command)
            except Exception as error:
                # It is the transport's thread, which all clients share.
                _log.exception("a request could not be received")
                self._egress.refuse(owner, InvalidRequest(f"the request was refused: {error!r}"))
        elif isinstance(command, Abort):
            self._abort(Owner(client, command.id))
        elif isinstance(command, StatusRequest):
            self._loop.report_status(client)
        elif isinstance(command, ModelInfoRequest):
            self._loop.report_model_info(client)
        else:
            assert isinstance(command, Shutdown)
            self._loop.stop()

    def abandon(self, client: bytes) -> None:
        """Abort everything of a client that has gone, or was dropped."""
        with self._lock:
            self._aborted.update(owner for owner in self._waiting if owner.client == client)
        for request_id in self._registry.of_client(client):
            self._loop.call_soon(self._loop.abort, request_id)

    def fail(self, error: EngineStopped) -> None:
        """End the engine: nothing arrives any more."""
        self._loop.call_soon(raise_in_loop, error)

    def close(self) -> None:
        """Take in the requests received so far, then end the threads; later ones are dropped.

        What is not encoded within CLOSE_S is refused.
        """
        deadline = time.monotonic() + CLOSE_S
        for threads in (self._short, self._chats, self._long, self._grammars):
            threads.close(max(0.0, deadline - time.monotonic()))
        self._processor.close()
        with self._lock:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
        for owner in left:
            self._egress.refuse(owner, EngineStopped("the engine was closed"))

    def _receive(self, owner: Owner, submit: Submit | Tokenize | Detokenize) -> None:
        prompt = Prompt(token_ids=submit.token_ids) if isinstance(submit, Detokenize) else submit
        size = _bytes_of(prompt, WAITING_BYTES)
        seed = self._processor.next_seed(submit) if isinstance(submit, Submit) else None
        received = _Received(owner, submit, time.monotonic(), size, seed)

        with self._lock:
            if self._closed:
                return
            refusal = self._refusal(received)
            if refusal is None:
                self._waiting[owner] = received
                self._waiting_bytes[owner.client] = self._waiting_bytes.get(owner.client, 0) + size
        if refusal is not None:
            self._egress.refuse(owner, refusal)
            return
        try:
            self._hand_on(received)
        except EngineFault as error:
            self._refuse(received, error)

    def _hand_on(self, received: _Received) -> None:
        """Put a request into the hands of the threads for its kind."""
        owner, submit, size = received.owner, received.submit, received.size
        prompt = Prompt(token_ids=submit.token_ids) if isinstance(submit, Detokenize) else submit
        if isinstance(submit, Submit) and submit.structured is not None:
            self._grammars.put(owner.client, received)
        elif size > LONG_BYTES and (prompt.token_ids is None or not isinstance(submit, Submit)):
            self._long.put(owner.client, received)
        elif prompt.messages is not None:
            self._chats.put(owner.client, received)
        else:
            self._short.put(received)

    def _refusal(self, received: _Received) -> PhalanxError | None:
        """Why a request is refused unseen. The lock is held."""
        owner = received.owner
        size = received.size
        if owner in self._waiting:
            return id_in_use(owner)
        waiting = self._waiting_bytes.get(owner.client, 0)
        if waiting and waiting + size > WAITING_BYTES:
            return CapacityExceeded(
                f"{waiting} bytes of this client's requests wait to be encoded, and at most {WAITING_BYTES} may; send "
                f"the request again later"
            )
        try:
            if isinstance(received.submit, Submit):
                self._processor.check_bytes(received.submit, size)
        except InvalidRequest as error:
            return error
        return None

    def _abort(self, owner: Owner) -> None:
        with self._lock:
            if owner in self._waiting:
                self._aborted.add(owner)
        self._loop.call_soon(self._loop.abort, owner.request_id)

    # ---- the intake threads

    def _take_in(self, received: _Received) -> None:
        owner = received.owner
        submit = received.submit
        with self._lock:
            if owner not in self._waiting:
                return  # refused when the engine was closed
            aborted = owner in self._aborted
        if not isinstance(submit, Submit):
            self._answer(received, submit)
            return
        if aborted:
            self._leave(received)
            self._egress.send(owner.client, _never_begun(submit, time.monotonic() - received.arrived_at))
            return

        try:
            self._registry.check_unused(owner)
            request = self._processor.process(submit, owner.request_id, received.arrived_at, received.seed)
            # Under the lock, an abort is either noted before or reaches the step loop after the request.
            with self._lock:
                if owner not in self._waiting:
                    return
                self._registry.add(owner)
                self._loop.call_soon(self._loop.add, owner, request, submit)
                if owner in self._aborted:
                    self._loop.call_soon(self._loop.abort, owner.request_id)
                self._forget(received)  # before the client can have its answer, and use the id again
        except PhalanxError as error:
            self._refuse(received, error)
        except BaseException as error:  # a panic of the tokenizer's Rust is no Exception
            # Whatever a request brings about while it is taken in, it brings about for itself alone.
            _log.exception("a request could not be taken in")
            self._refuse(received, InvalidRequest(f"the request was refused: {error!r}"))

    def _answer(self, received: _Received, question: Tokenize | Detokenize) -> None:
        try:
            answer = self._processor.answer(question)
        except PhalanxError as error:
            self._refuse(received, error)
        except BaseException as error:
            _log.exception("a question could not be answered")
            self._refuse(received, InvalidRequest(f"the question was refused: {error!r}"))
        else:
            if self._leave(received):
                self._egress.send(received.owner.client, answer)

    def _refuse(self, received: _Received, error: PhalanxError) -> None:
        # The id is free again before the client hears of it.
        if self._leave(received):
            self._egress.refuse(received.owner, error)

    def _leave(self, received: _Received) -> bool:
        """Whether a request that does not wait any more did so until now."""
        with self._lock:
            return self._forget(received)

    def _forget(self, received: _Received) -> bool:
        """The same; the lock is held."""
        owner = received.owner
        self._aborted.discard(owner)
        left = self._waiting_bytes.pop(owner.client, 0) - received.size
        if left > 0:
            self._waiting_bytes[owner.client] = left
        return self._waiting.pop(owner, None) is not None


def _bytes_of(prompt: Prompt, most: int) -> int:
    """The bytes of what a request begins with, token ids at 8 each; above `most` it may be any number above that."""
    size = 8 * len(prompt.token_ids or ())
    left: list[object] = [prompt.prompt, prompt.messages, prompt.tools, prompt.chat_template_kwargs]
    while left and size <= most:
        value = left.pop()
        if isinstance(value, str):
            size += len(value) if value.isascii() else len(value.encode("utf-8", "replace"))
        elif isinstance(value, dict):
            left += [*value.keys(), *value.values()]
            size += 8
        elif isinstance(value, list):
            left += value
            size += 8
        elif value is not None:
            size += 8
    return size


def _never_begun(submit: Submit, waited_s: float) -> Finished:
    """Return the end of a request that was aborted before its text was looked at."""
    completions = [Completion(index, "abort") for index in range(submit.sampling.n)]
    return Finished(submit.id, completions, Usage(0, 0), Timings(waited_s, waited_s, 0.0, waited_s))
