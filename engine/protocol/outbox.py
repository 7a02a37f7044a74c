"""What a router socket could not send yet, because a receiver does not read: in order, and bounded for each."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import zmq

UNREAD_BYTES = 32 * 2**20
"""Most bytes that wait for one client, besides what ZeroMQ and the system hold; one message may be larger."""
UNREAD_MESSAGES = 128
"""Messages to one client that ZeroMQ holds: it counts no bytes."""
FRAME_OVERHEAD = 100
"""Bytes that a waiting frame takes besides its own, so that empty ones count too."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.1

_log = logging.getLogger(__name__)


@dataclass
class _Outbox:
    messages: deque[list[bytes]] = field(default_factory=deque)
    size: int = 0


class Outboxes:
    """Sends to many clients and waits for none of them. Used by one thread, which owns the socket.

    A client that leaves more than UNREAD_BYTES unread is dropped: what waits for it is thrown away, and `on_dropped`
    says what it reads first if it ever reads again. `on_gone` hears of it, as of a client that has disconnected.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_gone: Callable[[bytes], None],
        on_dropped: Callable[[bytes], list[bytes]],
    ) -> None:
        """`socket` is a ROUTER; clients are named by their routing ids."""
        # With these a full pipe and a client that has gone are errors, not a wait and not silence.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, UNREAD_MESSAGES)
        self._socket = socket
        self._on_gone = on_gone
        self._on_dropped = on_dropped
        self._waiting: dict[bytes, _Outbox] = {}
        self._pause_s = FIRST_PAUSE_S

    @property
    def pause_s(self) -> float | None:
        """Seconds until the next retry(); None if nothing waits. POLLOUT cannot tell: one client that reads sets it."""
        return self._pause_s if self._waiting else None

    def send(self, frames: list[bytes]) -> None:
        """Send a message to the client that its first frame names, or keep it until the client reads."""
        client = frames[0]
        outbox = self._waiting.get(client)
        if outbox is None:
            outcome = self._try(frames)
            if outcome == "gone":
                self._on_gone(client)
            if outcome != "full":
                return
            outbox = self._waiting[client] = _Outbox()
            self._pause_s = FIRST_PAUSE_S

        size = _size(frames)
        if outbox.messages and outbox.size + size > UNREAD_BYTES:
            self._drop(client, outbox)
            return
        outbox.messages.append(frames)
        outbox.size += size

    def retry(self) -> None:
        """Send what can be sent by now."""
        progress = False
        for client, outbox in list(self._waiting.items()):
            outcome = "sent"
            while outbox.messages and (outcome := self._try(outbox.messages[0])) == "sent":
                outbox.size -= _size(outbox.messages.popleft())
                progress = True
            if outcome != "full":
                del self._waiting[client]
            if outcome == "gone":
                self._on_gone(client)
        self._pause_s = FIRST_PAUSE_S if progress else min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _try(self, frames: list[bytes]) -> Literal["sent", "full", "gone"]:
        try:
            self._socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno == errno.EAGAIN:
                return "full"
            if error.errno == zmq.EHOSTUNREACH:
                return "gone"
            raise
        return "sent"

    def _drop(self, client: bytes, outbox: _Outbox) -> None:
        _log.warning(
            "client %s is dropped: it leaves %d bytes unread, and %d may wait for one client; its requests are aborted",
            client.hex(),
            outbox.size,
            UNREAD_BYTES,
        )
        first = [client, *self._on_dropped(client)]
        outbox.messages = deque([first])
        outbox.size = _size(first)
        self._on_gone(client)


def _size(frames: list[bytes]) -> int:
    return sum(len(frame) + FRAME_OVERHEAD for frame in frames)
