"""What comes in: a thread takes clients' commands, makes requests of their text and hands them to the step loop."""

from __future__ import annotations

import logging
import time

from ..errors import InvalidRequest, PhalanxError
from ..protocol.messages import Abort, Command, Shutdown, StatusRequest, Submit
from .egress import Egress
from .input_processor import InputProcessor
from .registry import Owner, RequestRegistry
from .threads import QueueThread, StepLoop

_log = logging.getLogger(__name__)


class Ingress:
    """Owns the intake thread, which encodes text so that no step waits for it. The input processor is used by it alone.

    The transport's threads call receive(); the thread that owns the coordinator calls start() and close().
    """

    def __init__(self, processor: InputProcessor, registry: RequestRegistry, egress: Egress, loop: StepLoop) -> None:
        self._processor = processor
        self._registry = registry
        self._egress = egress
        self._loop = loop
        self._thread = QueueThread("intake", self._handle, loop)

    def start(self) -> None:
        """Begin to handle commands."""
        self._thread.start()

    def receive(self, client: bytes, command: Command) -> None:
        """Take a command from the transport, on any thread. A request's times count from here."""
        self._thread.put((client, command, time.monotonic()))

    def close(self) -> None:
        """Handle the commands received so far, then end the thread; later ones are dropped."""
        self._thread.close()

    # ---- the intake thread

    def _handle(self, received: tuple[bytes, Command, float]) -> None:
        client, command, arrived_at = received
        if isinstance(command, Submit):
            self._submit(client, command, arrived_at)
        elif isinstance(command, Abort):
            self._loop.call_soon(self._loop.abort, Owner(client, command.id).request_id)
        elif isinstance(command, StatusRequest):
            self._loop.call_soon(self._loop.report_status, client)
        else:
            assert isinstance(command, Shutdown)
            self._loop.stop()

    def _submit(self, client: bytes, submit: Submit, arrived_at: float) -> None:
        owner = Owner(client, submit.id)
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
