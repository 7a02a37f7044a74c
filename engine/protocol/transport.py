"""How commands reach the coordinator and events leave it: in the same process, or over ZeroMQ with msgspec."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import msgspec
import zmq

from ..errors import ConfigError, EngineStopped, InvalidRequest
from .liveness import EngineWatch
from .messages import Abort, Accepted, Command, Delta, Event, Failed, Ping, Pong, Shutdown
from .secret import check_address, curve_keys

OnCommand = Callable[[bytes, Command], None]
OnEvent = Callable[[Event], None]
OnLost = Callable[[EngineStopped], None]
_OnFrames = Callable[[list[bytes]], None]

_log = logging.getLogger(__name__)

TICK_MS = 500
"""Longest time between two looks at whether the engine lives."""

UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no message; RecursionError for lists nested a thousand deep."""


class Transport(ABC):
    """The coordinator's side. Commands arrive on any thread; send() is called from one thread at a time."""

    is_local = True
    """Whether every client runs on this host, as this user."""

    @abstractmethod
    def start(self, on_command: OnCommand) -> None:
        """Begin to deliver (client, command)."""

    @abstractmethod
    def send(self, client: bytes, *events: Event) -> None:
        """Deliver events to a client, in order; one that has gone loses them, and their requests are aborted."""

    @abstractmethod
    def close(self) -> None:
        """Deliver what was sent, then stop."""


class Connection(ABC):
    """The client's side. send() may be called from any thread; events arrive on a thread of the transport."""

    @abstractmethod
    def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        """Begin to deliver events. `on_lost` hears of requests that the engine does not have any more, and why."""

    @abstractmethod
    def send(self, command: Command) -> None:
        """Send a command to the coordinator. Raises InvalidRequest for what the protocol cannot carry."""

    @abstractmethod
    def close(self) -> None:
        """Stop; nothing arrives afterwards."""


class InProcess:
    """One client in the coordinator's process: a call on one side is a call-back on the other."""

    def __init__(self) -> None:
        self.on_command: OnCommand | None = None
        self.on_event: OnEvent | None = None
        self.transport: Transport = _InProcessTransport(self)
        self.connection: Connection = _InProcessConnection(self)


class _InProcessTransport(Transport):
    def __init__(self, link: InProcess) -> None:
        self._link = link

    def start(self, on_command: OnCommand) -> None:
        self._link.on_command = on_command

    def send(self, client: bytes, *events: Event) -> None:
        for event in events:
            if self._link.on_event is not None:
                self._link.on_event(event)

    def close(self) -> None:
        self._link.on_command = None


class _InProcessConnection(Connection):
    def __init__(self, link: InProcess) -> None:
        self._link = link

    def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        self._link.on_event = on_event

    def send(self, command: Command) -> None:
        if self._link.on_command is not None:
            self._link.on_command(b"", command)

    def close(self) -> None:
        self._link.on_event = None


class _Wire:
    """A thread that owns one ZeroMQ socket: hands on what arrives, sends what other threads queue.

    Every queue is unbounded: a full one would block the thread that empties it, or lose a part of an answer.
    """

    def __init__(self, kind: int, name: str) -> None:
        self._context = context = zmq.Context()
        self.socket = _unbounded(context, kind)

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
        self._on_frames: _OnFrames = lambda frames: None
        self._on_lost: _OnFrames = lambda frames: None
        self._tick: Callable[[], None] | None = None

    def start(
        self,
        on_frames: _OnFrames,
        on_lost: _OnFrames = lambda frames: None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        """Start the thread. `on_lost` gets what a router socket could not send, because its receiver has gone.

        `tick` is called on the wire's thread every TICK_MS milliseconds or more often; it may use the socket.
        """
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._tick = tick
        self._thread.start()

    def send(self, frames: list[bytes]) -> None:
        with self._lock:
            if not self._closed and not self._ended:
                self._push.send_multipart(frames)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not self._ended:
                self._push.send(b"")
        if self._thread.ident is None:
            self._thread.start()  # it closes the sockets, also of a wire that nobody used
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._push.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self._pull, zmq.POLLIN)
        try:
            running = True
            while running:
                ready = dict(poller.poll(None if self._tick is None else TICK_MS))
                if self._tick is not None:
                    self._guard(self._tick)

                # Messages that other threads queued, and the empty one of close().
                if self._pull in ready:
                    frames = self._pull.recv_multipart()
                    if frames == [b""]:
                        running = False
                    else:
                        self._send(frames)

                if self.socket in ready:
                    self._guard(partial(self._on_frames, self.socket.recv_multipart()))
        finally:
            with self._lock:
                self._ended = True
            self._pull.close(linger=0)
            # What was sent last, often the end of a stream, still reaches a client that is there.
            self.socket.close(linger=1000)

    def _guard(self, handle: Callable[[], None]) -> None:
        """Call `handle`, whose failure, by one message, must not end the thread that serves all others."""
        try:
            handle()
        except Exception:
            _log.exception("a message could not be handled; it was dropped")

    def _send(self, frames: list[bytes]) -> None:
        try:
            self.socket.send_multipart(frames)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._guard(partial(self._on_lost, frames))


def _unbounded(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    return socket


class ZmqTransport(Transport):
    """Serves any number of clients at an address such as ipc:///run/engine or tcp://10.0.0.1:5555.

    An ipc:// socket is its owner's alone. Over tcp:// clients need the secret (secret.py), and none of them may end the
    engine. A frame is one command or one event; a message to a client may have several frames.
    """

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        """Bind the socket. Raises ConfigError for an address that others could use, or that cannot be bound."""
        check_address(address, secret)
        self.is_local = self._may_shut_down = address.startswith("ipc://")
        self._wire = _Wire(zmq.ROUTER, "phalanx-transport")
        try:
            # A router drops what it sends to a client that has gone; this makes it say so.
            self._wire.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            if secret is not None:
                self._wire.socket.curve_server = True
                self._wire.socket.curve_secretkey = curve_keys(secret).server_secret
            _bind(self._wire.socket, address)
        except BaseException:
            self._wire.close()
            raise
        self._epoch = uuid.uuid4().hex
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command | Ping] = msgspec.msgpack.Decoder(Command | Ping)

    def start(self, on_command: OnCommand) -> None:
        """Begin to deliver (client, command) on the transport's thread; a client that has gone aborts its requests."""

        def on_frames(frames: list[bytes]) -> None:
            client = frames[0]
            data = frames[-1]
            try:
                command = self._decoder.decode(data)
            except UNDECODABLE as error:
                self._refuse(client, data, error)
                return
            if isinstance(command, Ping):
                self._wire.send([client, self._encoder.encode(Pong(self._epoch, client.hex()))])
                return
            if isinstance(command, Shutdown) and not self._may_shut_down:
                _log.warning("a client asked over tcp to end the engine; it was ignored: stop its processes instead")
                return
            on_command(client, command)

        # What comes back was sent by this transport itself: an answer to a client that had gone.
        decoder: msgspec.msgpack.Decoder[Event | Pong] = msgspec.msgpack.Decoder(Event | Pong)

        def on_lost(frames: list[bytes]) -> None:
            client, *lost = frames
            events = [decoder.decode(data) for data in lost]
            for request_id in {event.id: None for event in events if isinstance(event, Accepted | Delta)}:
                on_command(client, Abort(request_id))

        self._wire.start(on_frames, on_lost)

    def send(self, client: bytes, *events: Event) -> None:
        """Queue events for a client; the transport's thread sends them."""
        # Frames of one message: threads and the client wake up once for all.
        self._wire.send([client, *map(self._encoder.encode, events)])

    def close(self) -> None:
        """Send what is queued, waiting at most a second for a slow client, then close the socket."""
        self._wire.close()

    def _refuse(self, client: bytes, data: bytes, error: Exception) -> None:
        """Answer an ill-formed Submit, whose client waits; other undecodable messages are only logged."""
        try:
            addressed = msgspec.msgpack.decode(data, type=_Addressed)
        except UNDECODABLE:
            _log.warning("a client sent what is no command (%s); it was ignored", error)
            return
        self.send(client, Failed(addressed.id, InvalidRequest.__name__, f"the request is ill-formed: {error}"))


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind; nobody but the owner may connect to an ipc:// socket, from its first moment on. Raises ConfigError."""
    before = os.umask(0o177)
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"address={address!r} cannot be bound: {error.strerror}; choose another") from error
    finally:
        os.umask(before)


class _Addressed(msgspec.Struct, tag="submit"):
    """The only field needed of a Submit whose other fields are wrong."""

    id: str


class ZmqConnection(Connection):
    """A client of a coordinator in another process, which may start later than the client."""

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        """Connect to `address`. Raises ConfigError for an address that needs the engine's `secret` and has none."""
        check_address(address, secret)
        self._wire = _Wire(zmq.DEALER, "phalanx-connection")
        if secret is not None:
            keys = curve_keys(secret)
            self._wire.socket.curve_serverkey = keys.server_public
            self._wire.socket.curve_secretkey = keys.client_secret
            self._wire.socket.curve_publickey = keys.client_public
        self._wire.socket.connect(address)
        self._watch = EngineWatch(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event | Pong] = msgspec.msgpack.Decoder(Event | Pong)

    def start(self, on_event: OnEvent, on_lost: OnLost) -> None:
        def on_frames(frames: list[bytes]) -> None:
            for data in frames:
                try:
                    event = self._decoder.decode(data)
                except UNDECODABLE as error:
                    event = _unreadable(data, error)
                if isinstance(event, Pong):
                    tell(self._watch.heard(event))
                else:
                    on_event(event)

        def tick() -> None:
            if self._watch.should_ask:
                self._wire.socket.send(self._encoder.encode(Ping()))
                self._watch.asked()
            tell(self._watch.silence())

        def tell(why: str | None) -> None:
            if why is not None:
                on_lost(EngineStopped(why))

        self._wire.start(on_frames, tick=tick)

    def send(self, command: Command) -> None:
        """Queue a command, which the connection's thread sends. Raises InvalidRequest for what cannot be encoded."""
        try:
            data = self._encoder.encode(command)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"the request holds a value that cannot be sent: {error}") from error
        self._wire.send([data])

    def close(self) -> None:
        """Send what is queued, then close the socket."""
        self._wire.close()


class _Belonging(msgspec.Struct):
    """The only field needed of an event that cannot be read: its request's id."""

    id: str


def _unreadable(data: bytes, error: Exception) -> Failed:
    """Return the failure for the request of an unreadable event, so that nobody waits for an incomplete answer.

    Raises msgspec.DecodeError, as UNDECODABLE says, for bytes that belong to no request.
    """
    why = f"the engine sent what this client cannot read ({error}); use the same version on both sides"
    return Failed(msgspec.msgpack.decode(data, type=_Belonging).id, EngineStopped.__name__, why)
