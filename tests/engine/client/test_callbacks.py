"""Receivers of events that take long, raise, or close what calls them: each is its own request's concern alone."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, EngineStopped, InvalidRequest, SamplingParams
from phalanx.engine.client import callbacks
from phalanx.engine.client.callbacks import CallbackThreads, Receiver
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.client.resume.connection import ResumingConnection
from phalanx.engine.protocol.messages import Command, Delta, Event, Failed, Submit
from phalanx.engine.protocol.transport import Connection, InProcess, Transport, ZmqConnection, ZmqTransport

PATIENCE_S = 30.0


class _Ends:
    """A client, and a transport that answers each request with a Delta; its Failed is up to the test."""

    def __init__(self, transport: Transport, connection: Connection) -> None:
        self.transport = transport
        self.names: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        transport.start(self._answer)
        self.client = Client(connection)

    def _answer(self, client: bytes, command: Command) -> None:
        if isinstance(command, Submit):
            self.transport.send(client, Delta(command.id, 0, "", []))
            self.names.put(client)

    def finish(self, *ids: str) -> None:
        """End requests, after as many were received."""
        for name in ids:
            self.transport.send(self.names.get(timeout=PATIENCE_S), Failed(name, "InvalidRequest", "the end"))


@pytest.fixture(params=["in process", "ZeroMQ"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Ends]:
    if request.param == "in process":
        link = InProcess()
        ends = _Ends(link.transport, link.connection)
    else:
        address = f"ipc://{tmp_path}/engine"
        ends = _Ends(ZmqTransport(address), ZmqConnection(address))
    yield ends
    ends.client.close()
    ends.transport.close()


def _submit(name: str) -> Submit:
    return Submit(id=name, token_ids=[1])


def test_a_wait_for_a_status_may_be_as_long_as_any_number_and_ends_with_the_engine(ends: _Ends) -> None:
    with ThreadPoolExecutor() as threads:
        waits = [threads.submit(ends.client.status, wait_s) for wait_s in (None, math.inf, 1e300, 1e11)]
        assert not wait(waits, timeout=0.2).done
        ends.client.fail_all(EngineStopped("it has ended"))
        for each in waits:
            with pytest.raises(EngineStopped, match="it has ended"):
                each.result(PATIENCE_S)


@pytest.mark.parametrize("sampling", [None, SamplingParams, {"n": 1}, 5])
def test_a_request_without_sampling_parameters_fails_before_anything_looks_into_it(sampling: Any) -> None:
    link = InProcess()
    client = Client(ResumingConnection(link.connection))
    with pytest.raises(InvalidRequest, match="the request is ill-typed: sampling="):
        list(RequestHandle(client, Submit(id="a", token_ids=[1], sampling=sampling)))


def test_a_wait_for_another_engine_may_be_as_long_as_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    def resuming(_: object, wait_s: float) -> None:
        waits.append(wait_s)
        raise EngineStopped("enough")

    monkeypatch.setattr("phalanx.engine.client.llm.ResumingConnection", resuming)
    monkeypatch.setattr("phalanx.engine.client.llm.ZmqConnection", lambda *_: None)
    for wait_s in (5.0, math.inf, 1e300):
        with pytest.raises(EngineStopped, match="enough"):
            LLM.connect("ipc://nowhere", restart_wait_s=wait_s)
    assert waits == [5.0, threading.TIMEOUT_MAX, threading.TIMEOUT_MAX]


def test_a_receiver_that_blocks_holds_up_its_own_request_alone(ends: _Ends) -> None:
    go_on, events = threading.Event(), queue.SimpleQueue()  # type: ignore[var-annotated]

    def slow(event: Event) -> None:
        assert go_on.wait(PATIENCE_S)
        events.put(event)

    for number in range(3):
        ends.client.submit(_submit(f"slow {number}"), slow)
    others: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ends.client.submit(_submit("other"), others.put)
    handle = RequestHandle(ends.client, _submit("handle"))
    assert isinstance(others.get(timeout=PATIENCE_S), Delta)
    assert isinstance(next(handle), Delta)
    ends.finish("slow 0", "slow 1", "slow 2", "other", "handle")
    assert isinstance(others.get(timeout=PATIENCE_S), Failed)
    assert events.empty()
    go_on.set()
    received = [events.get(timeout=PATIENCE_S) for _ in range(6)]
    for number in range(3):  # each one's own in order
        mine = [type(event) for event in received if event.id == f"slow {number}"]
        assert mine == [Delta, Failed]


def test_an_engine_is_not_taken_for_gone_while_a_receiver_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.engine.protocol.liveness.PING_S", 0.2)
    monkeypatch.setattr("phalanx.engine.protocol.liveness.SILENCE_S", 1.7)
    address = f"ipc://{tmp_path}/engine"
    ends = _Ends(ZmqTransport(address), ZmqConnection(address))
    go_on = threading.Event()
    ends.client.submit(_submit("slow"), lambda event: (go_on.wait(PATIENCE_S), None)[1])
    handle = RequestHandle(ends.client, _submit("handle"))
    assert isinstance(next(handle), Delta)
    time.sleep(2 * 1.7)
    ends.finish("slow", "handle")
    with pytest.raises(ValueError, match="the end"):
        next(handle)
    go_on.set()
    ends.client.close()
    ends.transport.close()


def test_a_receiver_may_close_the_client(ends: _Ends) -> None:
    closed: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def closing(event: Event) -> None:
        ends.client.close()
        closed.put(event)

    handle = RequestHandle(ends.client, _submit("handle"))
    assert isinstance(next(handle), Delta)
    ends.client.submit(_submit("closing"), closing)
    assert isinstance(closed.get(timeout=PATIENCE_S), Delta)
    assert isinstance(closed.get(timeout=PATIENCE_S), Failed)  # its own request's last event
    with pytest.raises(EngineStopped, match="was closed"):
        next(handle)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_receiver_that_raises_gets_nothing_more_and_ends_nothing(
    ends: _Ends, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    calls: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def raising(event: Event) -> None:
        calls.put(event)
        raise error

    ends.client.submit(_submit("raising"), raising)
    calls.get(timeout=PATIENCE_S)
    handle = RequestHandle(ends.client, _submit("handle"))
    ends.finish("raising", "handle")
    with pytest.raises(ValueError, match="the end"):
        list(handle)
    assert calls.empty()


def test_closing_waits_for_receivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.client.client.CALLBACKS_CLOSE_S", PATIENCE_S)
    link = InProcess()
    ends = _Ends(link.transport, link.connection)
    received: list[Event] = []
    ends.client.submit(_submit("a"), lambda event: (time.sleep(0.2), received.append(event))[0])
    ends.client.close()
    assert [type(event) for event in received] == [Delta, Failed]


def test_closing_does_not_wait_for_a_receiver_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.engine.client.client.CALLBACKS_CLOSE_S", 0.2)
    link = InProcess()
    ends = _Ends(link.transport, link.connection)
    begun, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        begun.set()
        go_on.wait(PATIENCE_S)

    ends.client.submit(_submit("slow"), slow)
    assert begun.wait(PATIENCE_S)
    ends.client.close()
    go_on.set()


def test_threads_are_bounded_and_end_when_they_are_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "IDLE_S", 0.05)
    before = set(threading.enumerate())  # some of other tests', which may end meanwhile
    threads, go_on = CallbackThreads(), threading.Event()
    done: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def slow(event: Event) -> bool:
        go_on.wait(PATIENCE_S)
        done.put(event)
        return True

    def own() -> int:
        return sum(each.name == "phalanx-callbacks" for each in threading.enumerate() if each not in before)

    try:
        for number in range(3 * callbacks.MOST_THREADS):
            Receiver(threads, slow).put(Failed(str(number), "", ""))
        assert own() == callbacks.MOST_THREADS
    finally:
        go_on.set()
    assert len({done.get(timeout=PATIENCE_S).id for _ in range(3 * callbacks.MOST_THREADS)}) == 48  # type: ignore[union-attr]
    deadline = time.monotonic() + PATIENCE_S
    while own() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not own()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_receiver_may_close_the_engine(tiny: Path, ranks: int) -> None:
    llm = LLM(str(tiny), ranks=ranks, max_model_len=256)
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def closing(event: Event) -> None:
        _note(outcome, llm.close)

    endless = SamplingParams(max_tokens=200, ignore_eos=True)
    llm.submit(Submit(id="closing", token_ids=[5], sampling=endless), closing)
    assert outcome.get(timeout=PATIENCE_S) is None
    for call in (llm.status, lambda: llm.generate([[1]])):
        with pytest.raises(EngineStopped, match="was closed"):
            call()


def _note(outcome: queue.SimpleQueue[Any], call: Callable[[], None]) -> None:
    try:
        outcome.put(call())
    except BaseException as error:
        outcome.put(error)
        raise
