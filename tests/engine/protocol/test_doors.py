"""Who gets in over ZeroMQ: the owner through ipc, whoever knows the secret over tcp, nobody else."""

from __future__ import annotations

import logging
import queue
import stat
from pathlib import Path

import msgspec
import pytest
import zmq
from phalanx import ConfigError
from phalanx.engine.protocol.messages import Command, Delta, Event, Failed, Shutdown, StatusRequest
from phalanx.engine.protocol.secret import curve_keys, read_secret
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport

PATIENCE_S = 20.0
SECRET = b"k" * 32


def _lost(error: Exception) -> None:
    raise AssertionError(error)


def _free_port() -> int:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        return int(socket.bind_to_random_port("tcp://127.0.0.1"))


@pytest.fixture
def address() -> str:
    return f"tcp://127.0.0.1:{_free_port()}"


def test_tcp_without_a_secret_is_refused_on_both_sides(address: str) -> None:
    for end in (ZmqTransport, ZmqConnection):
        with pytest.raises(ConfigError, match=r"lets everybody in who reaches it: set secret_file"):
            end(address)


@pytest.mark.parametrize("address", ["inproc://engine", "udp://127.0.0.1:5", "engine", ""])
def test_an_address_of_another_kind_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"must be ipc://PATH or tcp://HOST:PORT"):
        ZmqTransport(address, SECRET)


def test_an_address_that_is_taken_is_named(address: str) -> None:
    first = ZmqTransport(address, SECRET)
    with pytest.raises(ConfigError, match="cannot be bound"):
        ZmqTransport(address, SECRET)
    first.close()


def test_over_tcp_whoever_knows_the_secret_is_served_and_others_are_not(address: str) -> None:
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address, SECRET)
    transport.start(lambda client, command: commands.put(command))
    ends = [ZmqConnection(address, secret) for secret in (b"g" * 32, SECRET)]
    with zmq.Context() as context, context.socket(zmq.DEALER) as bare:
        bare.set(zmq.LINGER, 0)
        bare.connect(address)
        bare.send(msgspec.msgpack.encode(StatusRequest()))
        for end in ends:
            end.start(lambda event: None, _lost)
            end.send(StatusRequest())
        assert isinstance(commands.get(timeout=PATIENCE_S), StatusRequest)
        with pytest.raises(queue.Empty):
            commands.get(timeout=0.5)
    for end in (*ends, transport):
        end.close()


def test_nobody_ends_an_engine_over_tcp(address: str, caplog: pytest.LogCaptureFixture) -> None:
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport, connection = ZmqTransport(address, SECRET), ZmqConnection(address, SECRET)
    transport.start(lambda client, command: commands.put(command))
    connection.start(lambda event: None, _lost)
    with caplog.at_level(logging.WARNING):
        connection.send(Shutdown())
        connection.send(StatusRequest())
        assert isinstance(commands.get(timeout=PATIENCE_S), StatusRequest)
    assert "asked over tcp to end the engine" in caplog.text
    connection.close()
    transport.close()


def test_an_ipc_socket_is_its_owners_alone(tmp_path: Path) -> None:
    transport = ZmqTransport(f"ipc://{tmp_path}/engine")
    assert stat.S_IMODE((tmp_path / "engine").stat().st_mode) == 0o600
    transport.close()


def test_an_event_that_cannot_be_read_fails_its_request_and_no_other(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    connection = ZmqConnection(address)
    connection.start(events.put, _lost)
    connection.send(StatusRequest())
    with zmq.Context() as context, context.socket(zmq.ROUTER) as engine:
        engine.bind(address)
        client, _ = engine.recv_multipart()
        good = Delta("b", 0, "text", [])
        for data in (b"\xc1", msgspec.msgpack.encode({"type": "delta", "id": "a", "index": "?"})):
            engine.send_multipart([client, data])
        engine.send_multipart([client, msgspec.msgpack.encode(good)])
        failed = events.get(timeout=PATIENCE_S)
        assert isinstance(failed, Failed)
        assert (failed.id, failed.error) == ("a", "EngineFault")
        assert "use the same version on both sides" in failed.message
        assert events.get(timeout=PATIENCE_S) == good
        connection.close()


def test_a_secret_is_read_from_a_file_that_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*chmod 600"):
        read_secret(file)
    file.write_text("0123456789abcdef" * 2 + "\n")
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="by others than its owner: chmod 600"):
        read_secret(file)
    file.chmod(0o600)
    assert read_secret(file) == b"0123456789abcdef" * 2
    file.write_text("short")
    with pytest.raises(ConfigError, match="holds 5 bytes; a secret has at least 32"):
        read_secret(file)


def test_keys_are_the_same_wherever_they_are_made_and_differ_by_secret_and_role() -> None:
    keys, others = curve_keys(SECRET), curve_keys(b"l" * 32)
    assert keys == curve_keys(SECRET)
    parts = [keys.server_secret, keys.server_public, keys.client_secret, keys.client_public, others.server_public]
    assert len(set(parts)) == len(parts)
    assert zmq.curve_public(keys.server_secret) == keys.server_public
