"""A thread that owns one ZeroMQ socket, so that other threads can use it, and what bounds what arrives there."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import ConfigError
from .messages import MESSAGE_BYTES
from .outbox import Outboxes

OnFrames = Callable[[list[bytes]], None]

TICK_MS = 500
"""Longest time between two looks at whether the engine lives."""
UNHANDLED_MESSAGES = 64
"""Messages of one client that ZeroMQ takes in ahead of the wire's thread."""
CLOSE_S = 4.0
"""Longest time that close() waits for the thread, which a handler may hold up."""
LINGER_S = 1.0
"""Longest time that closing waits for a receiver that takes nothing."""
QUEUED_AT_ONCE, ARRIVED_AT_ONCE = 256, 16
"""Messages handled before a look at the other side. What others queue comes first: each message that arrives may add
to it, and it must not grow without end."""

_log = logging.getLogger(__name__)


class Wire:
    """A thread that owns one ZeroMQ socket: hands on what arrives, sends what other threads queue.

    A router's messages go through `outboxes`, which wait for no client. What a dealer sends may wait without bound: it
    is its own process's.
    """

    def __init__(self, kind: int, name: str) -> None:
        """`kind` is zmq.ROUTER or zmq.DEALER."""
        self._context = context = zmq.Context()
        self.socket = _unbounded(context, kind)
        self._monitor: zmq.Socket[bytes] | None = None
        if kind == zmq.ROUTER:
            self.socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES)
            self.socket.setsockopt(zmq.RCVHWM, UNHANDLED_MESSAGES)
        self.outboxes: Outboxes | None = None

        if kind == zmq.DEALER:  # before it is connected
            self._monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

        # A ZeroMQ socket belongs to one thread: other threads queue frames here, which the poll sees too.
        wake = f"inproc://wake-{id(self)}"
        self._pull = _unbounded(context, zmq.PULL)
        self._pull.bind(wake)
        self._push = _unbounded(context, zmq.PUSH)
        self._push.connect(wake)

        self._lock = threading.Lock()
        self._closed = False
        self._ended = False  # the thread, which alone empties what others queue
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._on_frames: OnFrames = lambda frames: None
        self._on_broken: Callable[[BaseException], None] = lambda error: None
        self._tick: Callable[[], None] | None = None
        self._on_link: Callable[[bool], None] | None = None

    def bind(self, address: str) -> None:
        """Bind; nobody but the owner may connect to an ipc:// socket, from its first moment on. Raises ConfigError."""
        before = os.umask(0o177)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"address={address!r} cannot be bound: {error.strerror}; choose another") from error
        finally:
            os.umask(before)

    def start(
        self,
        on_frames: OnFrames,
        tick: Callable[[], None] | None = None,
        on_broken: Callable[[BaseException], None] | None = None,
        on_link: Callable[[bool], None] | None = None,
    ) -> None:
        """Start the thread, on which all of these are called; they may use the socket.

        `tick` is called every TICK_MS milliseconds or more often. `on_link` hears, of a dealer, that its connection was
        made (True), and that it was closed, after all that came over it; the next one is made by itself. `on_broken`
        hears of the error that ended the thread before close() did; nothing is sent or received any more.
        """
        self._on_frames = on_frames
        self._tick = tick
        self._on_broken = on_broken or self._on_broken
        self._on_link = on_link
        self._thread.start()

    def send(self, frames: list[bytes]) -> None:
        """Queue a message; after the end it is dropped. Any thread may call it."""
        with self._lock:
            if not self._closed and not self._ended:
                self._push.send_multipart(frames)

    def close(self) -> None:
        """Send what is queued, and close the sockets. Returns within CLOSE_S; on the wire's own thread, at once."""
        with self._lock:
            first, self._closed = not self._closed, True
            if first and not self._ended:
                self._push.send(b"")
        if first and self._thread.ident is None:
            self._thread.start()  # it closes the sockets, also of a wire that nobody used
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                _log.warning("%s is held up by a handler; its sockets close when that returns", self._thread.name)

    def _run(self) -> None:
        broken: BaseException | None = None
        try:
            self._serve()
        except BaseException as error:
            _log.exception("%s ended by an error", self._thread.name)
            broken = error
        finally:
            with self._lock:
                self._ended = True
                self._push.close(linger=0)
            self._pull.close(linger=0)
            if self._monitor is not None:
                self.socket.disable_monitor()
                self._monitor.close(linger=0)
            # What was sent last, often the end of a stream, still reaches a client that is there.
            self.socket.close(linger=round(LINGER_S * 1000))
        if broken is not None:
            self._on_broken(broken)
        self._context.term()

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._pull, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        running = True
        while running:
            ready = dict(poller.poll(self._patience_ms()))
            if self.outboxes is not None and self.outboxes.pause_s is not None:
                self.outboxes.retry()

            if self._pull in ready:
                running = self._send_queued()
            if self.socket in ready:
                self._take_in_arrived()
            # What has arrived comes before the questions whether anything does, and whether anything more can.
            if self._tick is not None:
                self._guard(self._tick)
            if self._monitor is not None and self._monitor in ready and self.socket not in ready:
                self._tell_link(self._monitor)
        self._flush()

    def _tell_link(self, monitor: zmq.Socket[bytes]) -> None:
        made = recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if self._on_link is not None:
            self._guard(partial(self._on_link, made))

    def _patience_ms(self) -> int | None:
        pause_s = None if self.outboxes is None else self.outboxes.pause_s
        if pause_s is not None:
            return max(1, round(1000 * pause_s))
        return None if self._tick is None else TICK_MS

    def _send_queued(self) -> bool:
        """Send messages that other threads queued. False for the empty one of close()."""
        for _ in range(QUEUED_AT_ONCE):
            try:
                frames = self._pull.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            if frames == [b""]:
                return False
            if self.outboxes is not None:
                self.outboxes.send(frames)
            else:
                self.socket.send_multipart(frames)
        return True

    def _take_in_arrived(self) -> None:
        for _ in range(ARRIVED_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._guard(partial(self._on_frames, frames))

    def _flush(self) -> None:
        """Hand ZeroMQ what waits for clients that read; those that do not have LINGER_S."""
        deadline = time.monotonic() + LINGER_S
        while self.outboxes is not None and (pause_s := self.outboxes.pause_s) and time.monotonic() < deadline:
            time.sleep(pause_s)
            self.outboxes.retry()

    def _guard(self, handle: Callable[[], None]) -> None:
        """Call `handle`, whose failure, by one message, must not end the thread that serves all others."""
        try:
            handle()
        except Exception:
            _log.exception("a message could not be handled; it was dropped")


def _unbounded(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    return socket
