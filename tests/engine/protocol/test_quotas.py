"""What one client leaves unread, sends or speaks is bounded, said by name, and no other client's concern."""

from __future__ import annotations

import logging
import queue
import threading
import time
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
from phalanx import EngineStopped, InvalidRequest
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.client.llm import choose_device
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine, EngineThread
from phalanx.engine.protocol import wire
from phalanx.engine.protocol.messages import (
    MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Command,
    Failed,
    Ping,
    Pong,
    StatusRequest,
    Submit,
)
from phalanx.engine.protocol.outbox import UNREAD_BYTES
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport
from phalanx.engine.protocol.wire import Wire
from phalanx.parallel.group import local_group
from phalanx.tests.engine.conftest import CONFIG

PATIENCE_S = 60.0
FILLER = "x" * 100_000


class _Echo:
    """A transport that answers each Abort with a Failed of its id, and notes who has gone."""

    def __init__(self, address: str) -> None:
        self.transport = ZmqTransport(address)
        self.gone: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.broken: queue.SimpleQueue[EngineStopped] = queue.SimpleQueue()
        self.transport.start(self._answer, self.gone.put, self.broken.put)

    def _answer(self, client: bytes, command: Command) -> None:
        if isinstance(command, Abort | Submit):
            self.transport.send(client, Failed(command.id, InvalidRequest.__name__, FILLER))


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/engine"


def _asks(client: Client) -> str:
    """The message with which one request of a client is answered."""
    with pytest.raises(InvalidRequest) as answer:
        next(RequestHandle(client, Submit(id=client.new_id(), token_ids=[1])))
    return str(answer.value)


def test_a_client_that_never_reads_is_dropped_by_name_and_memory_stays_flat(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    echo, client = _Echo(address), Client(ZmqConnection(address))
    assert _asks(client) == FILLER
    before = psutil.Process().memory_info().rss
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf, caplog.at_level(logging.WARNING):
        deaf.linger = 0
        deaf.set(zmq.RCVHWM, 1)
        deaf.set(zmq.RCVBUF, 4096)
        deaf.connect(address)
        for number in range(2_000):  # 200 MB of answers
            deaf.send(msgspec.msgpack.encode(Abort(str(number))))
        name = echo.gone.get(timeout=PATIENCE_S)
        assert _asks(client) == FILLER
        growth = psutil.Process().memory_info().rss - before

        # Once it reads, it learns by another name of its own that its requests are lost, and is served again.
        deaf.send(msgspec.msgpack.encode(Abort("last")))
        pongs, last = [], None
        while last != "last":
            assert deaf.poll(PATIENCE_S * 1000)
            event = msgspec.msgpack.decode(deaf.recv(), type=Pong | Failed)
            if isinstance(event, Pong):
                pongs.append(event.client)
            else:
                last = event.id
        assert pongs[-1].startswith(f"{name.hex()}.")
    assert f"client {name.hex()} is dropped" in caplog.text
    assert f"and {UNREAD_BYTES} may wait for one client; its requests are aborted" in caplog.text
    assert growth < 3 * UNREAD_BYTES
    client.close()
    echo.transport.close()


def test_what_is_read_late_but_within_the_bound_arrives_whole_and_in_order(address: str) -> None:
    echo = _Echo(address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as slow:
        slow.linger = 0
        slow.set(zmq.RCVHWM, 1)
        slow.connect(address)
        for number in range(250):  # 25 MB, far more messages than ZeroMQ holds
            slow.send(msgspec.msgpack.encode(Abort(str(number))))
        assert slow.poll(PATIENCE_S * 1000)
        ids = [msgspec.msgpack.decode(slow.recv(), type=Failed).id for _ in range(250)]
    assert ids == list(map(str, range(250)))
    assert echo.gone.empty()
    echo.transport.close()


def test_closing_does_not_wait_long_for_a_client_that_never_reads(address: str) -> None:
    echo = _Echo(address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.linger = 0
        deaf.set(zmq.RCVHWM, 1)
        deaf.connect(address)
        deaf.send(msgspec.msgpack.encode(Ping()))
        assert deaf.poll(PATIENCE_S * 1000)
        for number in range(300):
            deaf.send(msgspec.msgpack.encode(Abort(str(number))))
        deaf.send(msgspec.msgpack.encode(StatusRequest()))
        echo.transport.close()
    assert not echo.transport._wire._thread.is_alive()


def test_a_message_beyond_the_bound_is_refused_by_name(address: str) -> None:
    echo, client = _Echo(address), Client(ZmqConnection(address))
    with pytest.raises(InvalidRequest, match=f"bytes; a message may have at most {MESSAGE_BYTES}: shorten it"):
        next(RequestHandle(client, Submit(id="a", prompt="x" * MESSAGE_BYTES)))
    assert _asks(client) == FILLER
    client.close()
    echo.transport.close()


def test_a_peer_that_sends_more_than_the_bound_is_cut_off_alone(address: str) -> None:
    echo, client = _Echo(address), Client(ZmqConnection(address))
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        watch = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send(bytes(MESSAGE_BYTES + 1))
        assert watch.poll(PATIENCE_S * 1000)
        socket.disable_monitor()
    assert _asks(client) == FILLER
    client.close()
    echo.transport.close()


def _break(monkeypatch: pytest.MonkeyPatch, of: Wire, method: str, client: Client) -> None:
    """Let a method of a wire's thread fail, and have it called; the call that is under way may still take a message."""
    failed = threading.Event()

    def fails(*_: object) -> None:
        failed.set()
        raise MemoryError("no more")

    monkeypatch.setattr(of, method, fails)
    deadline = time.monotonic() + PATIENCE_S
    client.abort("b")
    while not failed.wait(0.05):
        assert time.monotonic() < deadline
        client.abort("b")


def test_the_end_of_the_transports_thread_is_told_and_closes_its_sockets(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo, client = _Echo(address), Client(ZmqConnection(address))
    assert _asks(client) == FILLER
    _break(monkeypatch, echo.transport._wire, "_take_in_arrived", client)
    assert "the transport's thread ended: MemoryError('no more')" in str(echo.broken.get(timeout=PATIENCE_S))
    assert echo.transport._wire.socket.closed
    client.close()
    echo.transport.close()


def test_the_end_of_the_transports_thread_ends_the_engine_with_that_reason(
    tiny: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.from_dict({"model": str(tiny), **CONFIG})
    transport = ZmqTransport(address)
    engine = Engine(config, local_group(choose_device(config)), transport)
    assert engine.coordinator is not None
    engine.coordinator.start()
    failures: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    thread = EngineThread(engine, failures.put)
    client = Client(ZmqConnection(address))
    assert client.status(PATIENCE_S).ready
    _break(monkeypatch, transport._wire, "_take_in_arrived", client)
    assert "the transport's thread ended: MemoryError('no more')" in str(failures.get(timeout=PATIENCE_S))
    client.close()
    thread.stop()
    engine.close()


def test_the_end_of_a_connections_thread_fails_its_requests_for_good(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = ZmqTransport(address)
    arrived: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport.start(lambda client, command: arrived.put(command))
    connection = ZmqConnection(address)
    client = Client(connection)
    handle = RequestHandle(client, Submit(id="a", token_ids=[1]))
    assert isinstance(arrived.get(timeout=PATIENCE_S), Submit)
    _break(monkeypatch, connection._wire, "_send_queued", client)
    with pytest.raises(EngineStopped, match=r"thread of the connection to .* ended: MemoryError"):
        next(handle)
    with pytest.raises(EngineStopped, match="MemoryError"):
        client.status(PATIENCE_S)
    client.close()
    transport.close()


def test_a_handler_that_never_returns_does_not_keep_close_waiting(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CLOSE_S", 0.2)
    transport, connection = ZmqTransport(address), ZmqConnection(address)
    held: queue.SimpleQueue[None] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def handle(client: bytes, command: Command) -> None:
        arrived.put(command)
        held.get()

    transport.start(handle)
    connection.start(lambda event: None, lambda error: None)
    connection.send(StatusRequest())
    arrived.get(timeout=PATIENCE_S)
    transport.close()
    held.put(None)
    connection.close()
    transport._wire._thread.join(PATIENCE_S)
    assert transport._wire.socket.closed


def test_an_engine_of_another_protocol_version_fails_requests_for_good_naming_both(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as old:
        old.linger = 0
        old.bind(address)
        client = Client(ZmqConnection(address))
        handle = RequestHandle(client, Submit(id="a", token_ids=[1]))
        name, _ = old.recv_multipart()
        old.send_multipart([name, msgspec.msgpack.encode({"type": "pong", "epoch": "e", "client": "c"})])
        words = f"speaks version 1 of the protocol, this client version {PROTOCOL_VERSION}: use the same version"
        with pytest.raises(EngineStopped, match=words):
            next(handle)
        with pytest.raises(EngineStopped, match=words):
            client.status(PATIENCE_S)
        client.close()


def test_a_transport_tells_its_protocol_version(address: str) -> None:
    echo = _Echo(address)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(address)
        socket.send(msgspec.msgpack.encode(Ping()))
        assert socket.poll(PATIENCE_S * 1000)
        assert msgspec.msgpack.decode(socket.recv(), type=Pong).version == PROTOCOL_VERSION
    echo.transport.close()
