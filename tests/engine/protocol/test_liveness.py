"""An engine that dies, is replaced, is cut off or falls silent: its client hears of it and goes on with the next."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq
from phalanx import EngineStopped, SamplingParams
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.client.resume.connection import ResumingConnection
from phalanx.engine.protocol.liveness import LOOK_S, PING_S, SILENCE_S, EngineWatch
from phalanx.engine.protocol.messages import Command, Delta, Event, Failed, Ping, Pong, StatusRequest, Submit
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport

PATIENCE_S = 60.0
FIRST = Pong("epoch one", "client one")


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> EngineWatch:
    return EngineWatch("ipc:///run/engine", clock)


def test_an_engine_that_never_answered_is_asked_seldom_and_never_given_up(watch: EngineWatch, clock: Clock) -> None:
    assert watch.should_ask
    watch.asked()
    for second in range(1, 100):
        clock.now = float(second)
        assert watch.should_ask == (second % SILENCE_S == 0)
        if watch.should_ask:
            watch.asked()
        assert watch.silence() is None


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_sent_may_be_missed_by_an_engine_that_answers_only_when_asked_again(
    watch: EngineWatch, times: int
) -> None:
    for _ in range(times):
        watch.asked()
    assert watch.missed() is None
    assert watch.heard(FIRST) is None
    assert (watch.missed() is not None) == (times > 1)
    watch.asked()
    watch.heard(FIRST)
    assert watch.missed() is None


def test_an_engine_that_answers_is_asked_again_after_a_while(watch: EngineWatch, clock: Clock) -> None:
    watch.asked()
    assert watch.heard(FIRST) is None
    assert not watch.should_ask
    clock.now += PING_S
    assert watch.should_ask
    watch.asked()
    assert not watch.should_ask
    assert watch.heard(FIRST) is None


def test_another_epoch_and_another_name_are_losses(watch: EngineWatch) -> None:
    assert watch.heard(FIRST) is None
    assert "was replaced by another" in str(watch.heard(Pong("epoch two", "client one")))
    assert watch.heard(Pong("epoch two", "client one")) is None
    assert "lost and made again" in str(watch.heard(Pong("epoch two", "client two")))


def test_silence_is_told_once_and_again_after_an_answer(watch: EngineWatch, clock: Clock) -> None:
    for _ in range(2):
        watch.heard(FIRST)
        clock.now += PING_S
        watch.asked()
        for _ in range(round(SILENCE_S) - 1):
            assert watch.silence() is None
            clock.now += LOOK_S
        assert "has not answered for 15 s" in str(watch.silence())
        assert watch.silence() is None


def test_a_client_that_was_held_up_itself_takes_no_engine_for_silent(watch: EngineWatch, clock: Clock) -> None:
    watch.heard(FIRST)
    clock.now += PING_S
    watch.asked()
    assert watch.silence() is None
    clock.now += 10 * SILENCE_S  # in which nobody could have heard it
    assert watch.silence() is None
    assert not watch.is_silent


def test_a_new_connection_is_asked_at_once(watch: EngineWatch, clock: Clock) -> None:
    watch.asked()
    watch.connected()
    assert not watch.should_ask  # the first Ping reaches the first engine
    watch.heard(FIRST)
    watch.asked()
    clock.now += 10 * SILENCE_S
    watch.asked()
    assert not watch.should_ask
    watch.connected()  # what that Ping went to has ended
    assert watch.should_ask


def test_a_closed_connection_is_told_at_once_and_once(watch: EngineWatch, clock: Clock) -> None:
    assert watch.closed() is None  # nothing answered before: there is nothing to lose
    watch.heard(FIRST)
    assert "was closed" in str(watch.closed())
    assert watch.is_silent
    assert watch.closed() is None
    assert "was replaced by another" in str(watch.heard(Pong("epoch two", "client one")))
    assert not watch.is_silent
    assert "was closed" in str(watch.closed())


def test_what_a_replaced_engine_had_fails_and_the_next_one_serves(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    first: queue.SimpleQueue[tuple[bytes, Command]] = queue.SimpleQueue()
    transport = ZmqTransport(address)
    transport.start(lambda client, command: first.put((client, command)))
    connection = ZmqConnection(address)
    client = Client(connection)
    handle = RequestHandle(client, Submit(id="a", token_ids=[1]))
    assert isinstance(first.get(timeout=PATIENCE_S)[1], Submit)
    _until(lambda: connection.epoch != "")
    transport.close()

    second: queue.SimpleQueue[tuple[bytes, Command]] = queue.SimpleQueue()
    transport = ZmqTransport(address)
    transport.start(lambda client, command: second.put((client, command)))
    with pytest.raises(EngineStopped, match="was closed: its process has ended"):
        next(handle)
    _until(lambda: not connection.silent)
    again = RequestHandle(client, Submit(id="b", token_ids=[1]))
    name, command = second.get(timeout=PATIENCE_S)
    while not isinstance(command, Submit):  # the Abort of the request that was lost
        name, command = second.get(timeout=PATIENCE_S)
    transport.send(name, Failed("b", "InvalidRequest", "heard"))
    with pytest.raises(Exception, match="heard"):
        next(again)
    client.close()
    transport.close()


def test_what_an_engine_had_that_ended_before_it_answered_is_sent_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A new connection is asked at once, however seldom one that does not answer is.
    monkeypatch.setattr("phalanx.engine.protocol.liveness.SILENCE_S", 1000.0)
    address = f"ipc://{tmp_path}/engine"
    loading = ZmqTransport(address)  # bound, as while a model is loaded, and not started
    client = Client(ResumingConnection(ZmqConnection(address)))
    status: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.ask(StatusRequest(), status.put)
    client.submit(Submit(id="a", token_ids=[1]), lambda event: None, quick=True)
    received = [loading._wire.socket.recv_multipart()[-1] for _ in range(3)]
    assert sum(b"submit" in data for data in received) == 1
    loading.close()

    second: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address)
    transport.start(lambda client, command: second.put(command))
    wanted = {StatusRequest, Submit}
    while wanted:
        wanted.discard(type(second.get(timeout=PATIENCE_S)))
    client.close()
    transport.close()


def test_a_killed_worker_leaves_nobody_waiting(tiny: Path, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    program = [
        sys.executable,
        "-m",
        "phalanx.launch.worker",
        f"model={tiny}",
        f"address={address}",
        "max_model_len=256",
    ]
    endless = SamplingParams(max_tokens=200, ignore_eos=True)
    client = Client(ZmqConnection(address))
    for name in ("a", "b"):  # the second engine serves the client of the first
        worker = subprocess.Popen(program)
        try:
            assert client.status(PATIENCE_S).ready
            handle = RequestHandle(client, Submit(id=name, prompt="on and on", sampling=endless))
            next(handle)
        finally:
            worker.kill()
            worker.wait()
        with pytest.raises(EngineStopped, match="was closed: its process has ended"):
            list(handle)
    client.close()


def test_what_an_engine_sent_before_it_ended_comes_before_the_news_of_its_end(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    transport = ZmqTransport(address)
    clients: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    transport.start(lambda client, command: clients.put(client))
    heard: list[Event | EngineStopped] = []
    ended = threading.Event()

    def lost(error: EngineStopped) -> None:
        heard.append(error)
        ended.set()

    connection = ZmqConnection(address)
    connection.start(heard.append, lost)
    connection.send(Submit(id="a", token_ids=[1]))
    client = clients.get(timeout=PATIENCE_S)
    _until(lambda: connection.epoch != "")
    for number in range(200):
        transport.send(client, Delta("a", 0, "", [number]))
    transport.close()
    assert ended.wait(PATIENCE_S)
    assert [each.token_ids for each in heard[:-1] if isinstance(each, Delta)] == [[number] for number in range(200)]
    assert "was closed" in str(heard[-1])
    connection.close()


def test_what_is_sent_to_an_engine_that_has_ended_fails_at_once_or_waits_for_the_next(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    transport = ZmqTransport(address)
    transport.start(lambda client, command: None)
    connections = [ZmqConnection(address) for _ in range(3)]
    clients = [
        Client(connections[0]),
        Client(ResumingConnection(connections[1], wait_s=0.1)),
        Client(ResumingConnection(connections[2])),
    ]
    _until(lambda: all(each.epoch for each in connections))
    transport.close()
    _until(lambda: all(each.silent for each in connections))
    time.sleep(0.3)  # the second one's wait has passed, with nothing that waited
    handles = [RequestHandle(each, Submit(id="a", token_ids=[1])) for each in clients]
    for handle in handles[:2]:
        with pytest.raises(EngineStopped, match="does not answer any more"):
            next(handle)
    received: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address)
    transport.start(lambda client, command: received.put(command))
    # What was sent while there was none arrives too, and is aborted.
    sent = Submit(id="a~1", token_ids=[1])
    while received.get(timeout=PATIENCE_S) != sent:
        pass
    for each in clients:
        each.close()
    transport.close()


def test_a_supervised_engine_s_end_is_told_by_its_supervisor(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    lost: queue.SimpleQueue[EngineStopped] = queue.SimpleQueue()
    connection = ZmqConnection(address, supervised=True)
    connection.start(lambda event: None, lost.put)
    transport = ZmqTransport(address)
    transport.start(lambda client, command: None)
    _until(lambda: connection.epoch != "")
    transport.close()
    with pytest.raises(queue.Empty):
        lost.get(timeout=0.3)
    connection.close()


@pytest.mark.parametrize("command", [Ping(), StatusRequest()])
def test_an_answer_to_a_client_that_has_gone_ends_nothing(tmp_path: Path, command: Command | Ping) -> None:
    address = f"ipc://{tmp_path}/engine"
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address)

    def answer(client: bytes, received: Command) -> None:
        commands.put(received)
        transport.send(client, Failed("a", "InvalidRequest", ""))

    transport.start(answer)
    for _ in range(50):
        with zmq.Context() as context, context.socket(zmq.DEALER) as passer_by:
            passer_by.connect(address)
            passer_by.send(msgspec.msgpack.encode(command))
            passer_by.close(linger=1000)
    client = Client(ZmqConnection(address))
    client.send(StatusRequest())
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and not isinstance(commands.get(timeout=PATIENCE_S), StatusRequest):
        pass
    client.close()
    transport.close()


def test_a_defect_in_a_callback_ends_no_wire_and_closing_never_hangs(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/engine"
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    transport = ZmqTransport(address)

    def defect(client: bytes, command: Command) -> None:
        commands.put(command)
        raise RuntimeError("a defect")

    transport.start(defect)
    client = Client(ZmqConnection(address))
    for _ in range(3):
        client.send(StatusRequest())
        assert isinstance(commands.get(timeout=PATIENCE_S), StatusRequest)
    transport.close()
    client.close()
