"""How commands reach the coordinator and events leave it: in the same process, or over ZeroMQ with msgspec."""

from __future__ import annotations

import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable

import msgspec
import zmq

from ...parallel.loading.json_files import shown
from ..errors import ConfigError, EngineFault, EngineStopped, InvalidRequest
from .liveness import EngineWatch, version_mismatch
from .messages import (
    ENCODER,
    PROTOCOL_VERSION,
    UNDECODABLE,
    Command,
    Detokenize,
    Event,
    Failed,
    Ping,
    Pong,
    Shutdown,
    Submit,
    Tokenize,
    as_received,
    encode_command,
)
from .outbox import Outboxes
from .secret import check_address, curve_keys
from .wire import Wire

SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket, on Linux."""

OnCommand = Callable[[bytes, Command], None]
OnEvent = Callable[[Event], None]
OnGone = Callable[[bytes], None]
OnBroken = Callable[[EngineStopped], None]
OnLost = Callable[[EngineStopped], None]

_log = logging.getLogger(__name__)


def _ignore(_: object) -> None:
    return


class CannotEncode(Exception):
    """An event holds what no message can carry, such as half a character."""


class Transport(ABC):
    """The coordinator's side. Commands arrive on any thread; send() is called from one thread at a time."""

    is_local = True
    """Whether every client runs on this host, as this user."""

    @abstractmethod
    def start(self, on_command: OnCommand, on_gone: OnGone = _ignore, on_broken: OnBroken = _ignore) -> None:
        """Begin to deliver (client, command).

        `on_gone` hears of a client that has disconnected or was dropped, whose requests are of no use any more;
        `on_broken` of an error after which nothing is delivered any more, to anybody.
        """

    @abstractmethod
    def send(self, client: bytes, *events: Event) -> None:
        """Deliver events to a client, in order; one that has gone loses them.

        Raises CannotEncode if one of them cannot be; none is sent then.
        """

    @abstractmethod
    def close(self) -> None:
        """Deliver what was sent, then stop."""


class Connection(ABC):
    """The client's side. send() may be called from any thread; events arrive on a thread of the transport."""

    @property
    def epoch(self) -> str:
        """That of the engine that answered last (see Pong); empty before one has, and within one process."""
        return ""

    @property
    def silent(self) -> bool:
        """Whether the engine, which has answered before, does not any more, so that what is sent is lost."""
        return False

    @abstractmethod
    def start(
        self, on_event: OnEvent, on_lost: OnLost, on_broken: OnBroken = _ignore, on_silent: OnLost | None = None
    ) -> None:
        """Begin to deliver events.

        `on_lost` hears of requests that the engine does not have any more, and why; `on_broken` of what keeps this
        connection from ever being of use again. An engine that falls silent may have gone with its requests:
        `on_silent` hears of that, or else `on_lost`.
        """

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

    def start(self, on_command: OnCommand, on_gone: OnGone = _ignore, on_broken: OnBroken = _ignore) -> None:
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

    def start(
        self, on_event: OnEvent, on_lost: OnLost, on_broken: OnBroken = _ignore, on_silent: OnLost | None = None
    ) -> None:
        self._link.on_event = on_event

    def send(self, command: Command) -> None:
        if self._link.on_command is not None:
            self._link.on_command(b"", as_received(command))

    def close(self) -> None:
        self._link.on_event = None


class ZmqTransport(Transport):
    """Serves any number of clients at an address such as ipc:///run/engine or tcp://10.0.0.1:5555.

    An ipc:// socket is its owner's alone. Over tcp:// clients need the secret (secret.py), and none of them may end the
    engine. A frame is one command or one event; a message to a client may have several frames.

    A command has at most MESSAGE_BYTES. A client that leaves more than UNREAD_BYTES of events unread is dropped: its
    requests are aborted, and it gets a new name, by which it learns that they are lost if it ever reads again.
    """

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        """Bind the socket. Raises ConfigError for an address that others could use, or that cannot be bound."""
        check_address(address, secret)
        self.is_local = self._may_shut_down = address.startswith("ipc://")
        self._epoch = uuid.uuid4().hex
        self._times_dropped: dict[bytes, int] = {}
        self._warned: set[bytes] = set()
        self._decoder: msgspec.msgpack.Decoder[Command | Ping] = msgspec.msgpack.Decoder(Command | Ping)
        self._on_gone: OnGone = _ignore

        self._wire = Wire(zmq.ROUTER, "phalanx-transport")
        self._outboxes = self._wire.outboxes = Outboxes(self._wire.socket, self._gone, self._renamed)
        try:
            if secret is not None:
                self._wire.socket.curve_server = True
                self._wire.socket.curve_secretkey = curve_keys(secret).server_secret
            self._wire.bind(address)
        except BaseException:
            self._wire.close()
            raise

    def start(self, on_command: OnCommand, on_gone: OnGone = _ignore, on_broken: OnBroken = _ignore) -> None:
        """Begin to deliver, on the transport's thread."""
        self._on_gone = on_gone

        def on_frames(frames: list[bytes]) -> None:
            client = frames[0]
            data = frames[-1]
            try:
                command = self._decoder.decode(data)
            except UNDECODABLE as error:
                self._refuse(client, data, error)
                return
            if isinstance(command, Ping):
                self._outboxes.send([client, self._pong(client)])
                return
            if isinstance(command, Shutdown) and not self._may_shut_down:
                _log.warning("a client asked over tcp to end the engine; it was ignored: stop its processes instead")
                return
            try:
                on_command(client, command)
            except Exception as error:
                # Who sent it waits for an answer; the thread serves all others too.
                _log.exception("a command could not be handled")
                if isinstance(command, Submit | Tokenize | Detokenize):
                    self.send(client, Failed(command.id, EngineFault.__name__, f"the engine failed: {error!r}"))

        self._wire.start(
            on_frames, on_broken=lambda error: on_broken(EngineStopped(f"the transport's thread ended: {error!r}"))
        )

    def send(self, client: bytes, *events: Event) -> None:
        """Queue events for a client; the transport's thread sends them."""
        # Frames of one message: threads and the client wake up once for all.
        try:
            frames = [client, *map(ENCODER.encode, events)]
        except (TypeError, ValueError, OverflowError) as error:
            raise CannotEncode(str(error)) from error
        self._wire.send(frames)

    def close(self) -> None:
        """Send what is queued, waiting at most a second for a slow client, then close the socket."""
        self._wire.close()

    def _gone(self, client: bytes) -> None:
        self._on_gone(client)

    def _renamed(self, client: bytes) -> list[bytes]:
        """Give a dropped client another name. Returns the frames that tell it."""
        self._times_dropped[client] = self._times_dropped.get(client, 0) + 1
        return [self._pong(client)]

    def _pong(self, client: bytes) -> bytes:
        times = self._times_dropped.get(client, 0)
        name = f"{client.hex()}.{times}" if times else client.hex()
        return ENCODER.encode(Pong(self._epoch, name, PROTOCOL_VERSION))

    def _refuse(self, client: bytes, data: bytes, error: Exception) -> None:
        """Answer an ill-formed Submit, whose client waits; other undecodable messages are only logged."""
        try:
            addressed = msgspec.msgpack.decode(data, type=_Addressed)
        except UNDECODABLE:
            if client not in self._warned:
                self._warned.add(client)
                _log.warning(
                    "client %s sent what is no command (%s); it is ignored, and what else of the kind it sends",
                    client.hex(),
                    error,
                )
            return
        failed = Failed(addressed.id, InvalidRequest.__name__, f"the request is ill-typed: {error}")
        self._outboxes.send([client, ENCODER.encode(failed)])


class _Addressed(msgspec.Struct, tag="submit"):
    """The only field needed of a Submit whose other fields are wrong."""

    id: str


class NeverHeard(EngineStopped):
    """What was sent before any engine answered may have gone to one that ended; none has died of it."""


class ZmqConnection(Connection):
    """A client of a coordinator in another process, which may start later than the client."""

    def __init__(self, address: str, secret: bytes | None = None, *, supervised: bool = False) -> None:
        """Connect to `address`. Of an engine that is `supervised` somebody else tells, and knows better, why it ended.

        Raises ConfigError for an address that is none, or needs the engine's `secret` and has none.
        """
        check_address(address, secret)
        self._address = address
        self._supervised = supervised
        self._wire = Wire(zmq.DEALER, "phalanx-connection")
        if secret is not None:
            keys = curve_keys(secret)
            self._wire.socket.curve_serverkey = keys.server_public
            self._wire.socket.curve_secretkey = keys.client_secret
            self._wire.socket.curve_publickey = keys.client_public
        try:
            self._wire.socket.connect(address)
        except (zmq.ZMQError, ValueError) as error:
            self._wire.close()
            why = error.strerror if isinstance(error, zmq.ZMQError) else error
            raise ConfigError(
                f"address={shown(address)} cannot be used: {why}; it must be tcp://HOST:PORT, or ipc://PATH with a "
                f"path of at most {SOCKET_PATH_BYTES} bytes"
            ) from error
        self._watch = EngineWatch(address)
        self._decoder: msgspec.msgpack.Decoder[Event | Pong] = msgspec.msgpack.Decoder(Event | Pong)

    @property
    def epoch(self) -> str:
        """That of the engine that answered last."""
        return self._watch.epoch

    @property
    def silent(self) -> bool:
        """Whether the engine, which has answered before, has closed the connection, or has not for SILENCE_S."""
        return self._watch.is_silent

    def start(
        self, on_event: OnEvent, on_lost: OnLost, on_broken: OnBroken = _ignore, on_silent: OnLost | None = None
    ) -> None:
        """Begin to deliver events, on the connection's thread. An engine of another protocol version breaks it."""

        def on_frames(frames: list[bytes]) -> None:
            for data in frames:
                try:
                    event = self._decoder.decode(data)
                except UNDECODABLE as error:
                    event = _unreadable(data, error)
                if isinstance(event, Pong):
                    mismatch = version_mismatch(self._address, event)
                    if mismatch is not None:
                        on_broken(EngineStopped(mismatch))
                    tell(self._watch.heard(event), on_lost)
                    missed = self._watch.missed()
                    # Whoever outlives a silence sends again what it is told is lost; for others it may not be so.
                    if missed is not None and on_silent is not None:
                        on_lost(NeverHeard(missed))
                else:
                    on_event(event)

        def tick() -> None:
            if self._watch.should_ask:
                self._wire.socket.send(ENCODER.encode(Ping()))
                self._watch.asked()
            tell(self._watch.silence(), on_silent or on_lost)

        def link(made: bool) -> None:
            if made:
                self._watch.connected()
                tick()
            elif not self._supervised:
                tell(self._watch.closed(), on_silent or on_lost)

        def tell(why: str | None, hears: OnLost) -> None:
            if why is not None:
                hears(EngineStopped(why))

        def broken(error: BaseException) -> None:
            on_broken(EngineStopped(f"the thread of the connection to {self._address} ended: {error!r}"))

        self._wire.start(on_frames, tick=tick, on_broken=broken, on_link=link)

    def send(self, command: Command) -> None:
        """Queue a command, which the connection's thread sends.

        Raises InvalidRequest for what cannot be encoded or has more than MESSAGE_BYTES.
        """
        self._wire.send([encode_command(command)])

    def close(self) -> None:
        """Send what is queued, then close the socket."""
        self._wire.close()


class _Belonging(msgspec.Struct):
    """The only field needed of an event that cannot be read: its request's id."""

    id: str


def _unreadable(data: bytes, error: Exception) -> Failed:
    """Return the failure for an unreadable event's request. Raises UNDECODABLE for bytes that belong to none."""
    why = f"the engine sent what this client cannot read ({error}); use the same version on both sides"
    # No EngineStopped, on which the request would wait for another engine: this one goes on.
    return Failed(msgspec.msgpack.decode(data, type=_Belonging).id, EngineFault.__name__, why)
