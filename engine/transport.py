"""How commands reach the coordinator and events leave it: in the same process, or over ZeroMQ with msgspec."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec
import zmq

from .messages import Command, Event

OnCommand = Callable[[bytes, Command], None]
OnEvent = Callable[[Event], None]

_log = logging.getLogger(__name__)


class Transport(ABC):
    """The coordinator's side. Commands arrive on any thread; send() is called from one thread at a time."""

    @abstractmethod
    def start(self, on_command: OnCommand) -> None:
        """Begin to deliver (client, command)."""

    @abstractmethod
    def send(self, client: bytes, event: Event) -> None:
        """Deliver an event to a client; one that has gone loses it."""

    @abstractmethod
    def close(self) -> None:
        """Deliver what was sent, then stop."""


class Connection(ABC):
    """The client's side. send() may be called from any thread; events arrive on a thread of the transport."""

    @abstractmethod
    def start(self, on_event: OnEvent) -> None:
        """Begin to deliver events."""

    @abstractmethod
    def send(self, command: Command) -> None:
        """Send a command to the coordinator."""

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

    def send(self, client: bytes, event: Event) -> None:
        if self._link.on_event is not None:
            self._link.on_event(event)

    def close(self) -> None:
        self._link.on_command = None


class _InProcessConnection(Connection):
    def __init__(self, link: InProcess) -> None:
        self._link = link

    def start(self, on_event: OnEvent) -> None:
        self._link.on_event = on_event

    def send(self, command: Command) -> None:
        if self._link.on_command is not None:
            self._link.on_command(b"", command)

    def close(self) -> None:
        self._link.on_event = None


class _Wire:
    """A thread that owns one ZeroMQ socket: hands on what arrives, sends what other threads queue."""

    def __init__(self, socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        self._socket, self._context = socket, context
        wake = f"inproc://wake-{id(self)}"
        self._pull = context.socket(zmq.PULL)
        self._pull.bind(wake)
        self._push = context.socket(zmq.PUSH)
        self._push.connect(wake)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._on_frames: Callable[[list[bytes]], None] = lambda frames: None

    def start(self, on_frames: Callable[[list[bytes]], None]) -> None:
        self._on_frames = on_frames
        self._thread.start()

    def send(self, frames: list[bytes]) -> None:
        with self._lock:
            if not self._closed:
                self._push.send_multipart(frames)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._push.send(b"")
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._push.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._pull, zmq.POLLIN)
        running = True
        while running:
            ready = dict(poller.poll())
            if self._pull in ready:
                frames = self._pull.recv_multipart()
                if frames == [b""]:
                    running = False
                else:
                    self._socket.send_multipart(frames)
            if self._socket in ready:
                self._on_frames(self._socket.recv_multipart())
        self._pull.close(linger=0)
        # What was sent last, often the end of a stream, still reaches a client that is there.
        self._socket.close(linger=1000)


class ZmqTransport(Transport):
    """Serves any number of clients at an address such as ipc:///run/engine or tcp://127.0.0.1:5555."""

    def __init__(self, address: str) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.bind(address)
        self._wire = _Wire(socket, context, "phalanx-transport")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)

    def start(self, on_command: OnCommand) -> None:
        def on_frames(frames: list[bytes]) -> None:
            client, data = frames
            try:
                command = self._decoder.decode(data)
            except msgspec.DecodeError as error:
                _log.warning("a client sent what is no command (%s); it was ignored", error)
                return
            on_command(client, command)

        self._wire.start(on_frames)

    def send(self, client: bytes, event: Event) -> None:
        self._wire.send([client, self._encoder.encode(event)])

    def close(self) -> None:
        self._wire.close()


class ZmqConnection(Connection):
    """A client of a coordinator in another process; it may be there later than the client."""

    def __init__(self, address: str) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.connect(address)
        self._wire = _Wire(socket, context, "phalanx-connection")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)

    def start(self, on_event: OnEvent) -> None:
        self._wire.start(lambda frames: on_event(self._decoder.decode(frames[0])))

    def send(self, command: Command) -> None:
        self._wire.send([self._encoder.encode(command)])

    def close(self) -> None:
        self._wire.close()
