"""A client whose engine is replaced: nothing is lost or comes twice, and one request that kills engines fails alone."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import pytest
from phalanx import EngineFault, SamplingParams
from phalanx.engine.client.client import Client, to_error
from phalanx.engine.client.resume.connection import ResumingConnection
from phalanx.engine.client.resume.suspects import Suspects
from phalanx.engine.errors import CapacityExceeded, EngineStopped, InvalidRequest
from phalanx.engine.protocol.messages import (
    Abort,
    Accepted,
    Command,
    Completion,
    Delta,
    Event,
    Failed,
    Finished,
    Status,
    StatusRequest,
    Submit,
    Timings,
    Tokenize,
    Tokenized,
    Usage,
)
from phalanx.engine.protocol.transport import Connection, OnBroken, OnEvent, OnLost

PATIENCE_S = 20.0
STOPPED = EngineStopped("the engine was replaced")


class _Engines(Connection):
    """Engines one after the other: keeps what they are sent, and says what the test has them say."""

    def __init__(self) -> None:
        self.number = 1
        self.is_silent = False
        self.too_long = ""
        self.sent: list[Command] = []
        self.say: OnEvent = lambda event: None
        self.lost: OnLost = lambda error: None
        self.hear_silence: OnLost | None = None

    @property
    def epoch(self) -> str:
        return str(self.number)

    @property
    def silent(self) -> bool:
        return self.is_silent

    def start(
        self,
        on_event: OnEvent,
        on_lost: OnLost,
        on_broken: OnBroken = lambda error: None,
        on_silent: OnLost | None = None,
    ) -> None:
        self.say, self.lost, self.hear_silence = on_event, on_lost, on_silent

    def send(self, command: Command) -> None:
        if isinstance(command, Submit) and command.id.startswith(f"{self.too_long}~"):
            raise InvalidRequest("too long")
        self.sent.append(command)

    def close(self) -> None:
        return

    def replace(self) -> None:
        """Another engine answers."""
        self.number += 1
        self.sent = []
        self.lost(STOPPED)

    @property
    def submits(self) -> list[Submit]:
        return [command for command in self.sent if isinstance(command, Submit)]

    def accept(self, request_id: str) -> None:
        self.say(Accepted(id=request_id, prompt_tokens=1, seed=5, max_tokens=9))

    def delta(self, request_id: str, *tokens: int, position: int) -> None:
        self.say(Delta(request_id, 0, "x" * len(tokens), list(tokens), None, position))

    def finish(self, request_id: str) -> None:
        self.say(Finished(request_id, [Completion(0, "length")], Usage(1, 3), Timings(0, 0, 0, 0)))


@pytest.fixture
def engines() -> _Engines:
    return _Engines()


def _client(engines: _Engines, wait_s: float | None = None) -> Client:
    return Client(ResumingConnection(engines, wait_s))


def _submit(client: Client, *names: str) -> dict[str, queue.SimpleQueue[Event]]:
    events: dict[str, queue.SimpleQueue[Event]] = {name: queue.SimpleQueue() for name in names}
    for name in names:
        client.submit(
            Submit(id=name, token_ids=[1], sampling=SamplingParams(max_tokens=9)), events[name].put, quick=True
        )
    return events


def _all(events: queue.SimpleQueue[Event]) -> list[Event]:
    found = []
    while not events.empty():
        found.append(events.get())
    return found


def test_a_request_goes_on_at_the_next_engine_and_no_event_comes_twice(engines: _Engines) -> None:
    client = _client(engines)
    events = _submit(client, "a")["a"]
    engines.accept("a")
    engines.delta("a", 7, 8, position=0)
    engines.say(Failed("a", "EngineStopped", "rank 0 failed: of whatever"))
    assert [type(event) for event in _all(events)] == [Accepted, Delta]

    engines.replace()
    [again] = engines.submits
    assert again.resume is not None
    assert [each.token_ids for each in again.resume.completions] == [[7, 8]]
    assert again.sampling.seed == 5
    engines.delta("a", 7, 8, 9, position=0)  # of the engine that has gone
    engines.accept(again.id)
    engines.delta(again.id, 9, position=2)
    engines.finish(again.id)
    delta, finished = _all(events)
    assert isinstance(delta, Delta)
    assert (delta.id, delta.token_ids, delta.position) == ("a", [9], 2)
    assert isinstance(finished, Finished)
    assert finished.id == "a"
    engines.replace()
    assert engines.submits == []


def test_what_was_not_accepted_is_a_new_request_there_and_questions_are_asked_again(engines: _Engines) -> None:
    client = _client(engines)
    _submit(client, "a")
    answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.ask(Tokenize(id="t", prompt="p"), answers.put)
    client.ask(StatusRequest(), answers.put)
    engines.replace()
    [again] = engines.submits
    assert again.resume is None
    assert again.sampling.seed is None
    assert StatusRequest() in engines.sent
    [question] = [command for command in engines.sent if isinstance(command, Tokenize)]
    engines.say(Tokenized(id=question.id, token_ids=[1], text="p", token_bytes=[b"p"]))
    assert answers.get(timeout=PATIENCE_S).id == "t"  # type: ignore[union-attr]


def test_an_abort_reaches_the_engine_that_has_the_request_and_one_between_two_ends_it(engines: _Engines) -> None:
    client = _client(engines)
    events = _submit(client, "a", "b")
    engines.replace()
    first, second = engines.submits
    client.abort("a")
    assert engines.sent[-1] == Abort(first.id)
    engines.replace()  # before it has answered
    assert [type(event) for event in _all(events["a"])] == [Finished]
    assert [submit.id.partition("~")[0] for submit in engines.submits] == ["b"]
    assert second.id != engines.submits[0].id


def test_what_the_next_engine_has_no_room_for_is_sent_again(engines: _Engines) -> None:
    client = _client(engines)
    events = _submit(client, "a")["a"]
    engines.replace()
    engines.say(Failed(engines.submits[0].id, CapacityExceeded.__name__, "full"))
    _until(lambda: len(engines.submits) == 2)
    assert events.empty()
    engines.finish(engines.submits[1].id)
    assert isinstance(events.get(timeout=PATIENCE_S), Finished)
    client.close()


def test_many_requests_that_are_sent_again_need_no_thread_each(engines: _Engines) -> None:
    client = _client(engines)
    names = [f"r{i}" for i in range(300)]
    events = _submit(client, *names)
    engines.replace()
    before = set(threading.enumerate())
    for submit in list(engines.submits):
        engines.say(Failed(submit.id, CapacityExceeded.__name__, "full"))
    assert set(threading.enumerate()) <= before
    _until(lambda: len(engines.submits) == 600)
    for submit in engines.submits[300:]:
        engines.finish(submit.id)
    assert all(isinstance(each.get(timeout=PATIENCE_S), Finished) for each in events.values())
    client.close()


def test_what_is_too_long_to_be_sent_again_fails_alone(engines: _Engines) -> None:
    client = _client(engines)
    events = _submit(client, "a", "b")
    engines.too_long = "a"
    engines.replace()
    failed = events["a"].get(timeout=PATIENCE_S)
    assert isinstance(failed, Failed)
    assert failed.error == "InvalidRequest"
    assert [submit.id.partition("~")[0] for submit in engines.submits] == ["b"]
    client.close()


def test_without_another_engine_in_time_what_waits_fails(engines: _Engines) -> None:
    client = _client(engines, wait_s=0.1)
    events = _submit(client, "a")["a"]
    assert engines.hear_silence is not None
    engines.is_silent = True
    engines.hear_silence(EngineStopped("silence"))
    failed = events.get(timeout=PATIENCE_S)
    assert isinstance(failed, Failed)
    assert failed.message == "silence"
    client.close()


def test_an_engine_that_was_only_silent_for_a_while_keeps_its_requests(engines: _Engines) -> None:
    client = _client(engines, wait_s=0.05)
    events = _submit(client, "a")["a"]
    assert engines.hear_silence is not None
    engines.hear_silence(EngineStopped("silence"))  # it answers again before the time is up
    time.sleep(0.2)
    engines.finish("a")
    assert isinstance(events.get(timeout=PATIENCE_S), Finished)
    client.close()


def test_a_request_that_kills_engines_fails_alone(engines: _Engines) -> None:
    client = _client(engines)
    events = _submit(client, "good", "bad", "other")
    deaths = 0
    seen: dict[str, list[int]] = {name: [] for name in events}
    while True:
        killed = False
        for submit in list(engines.submits):
            name = submit.id.partition("~")[0]
            if name == "bad":
                killed = True
                continue
            known = len(seen[name])
            engines.accept(submit.id)
            if deaths and not killed:  # whoever comes before it gets on, until it kills again
                engines.delta(submit.id, 1, position=known)
                seen[name].append(1)
        if not killed:
            break
        deaths += 1
        assert deaths <= 3
        engines.replace()
    failed = [event for event in _all(events["bad"]) if isinstance(event, Failed)]
    with pytest.raises(EngineFault, match="died again and again while it computed this request"):
        raise to_error(failed[0])
    for name in ("good", "other"):
        engines.finish(next(submit.id for submit in reversed(engines.submits) if submit.id.startswith(name)))
        assert not any(isinstance(event, Failed) for event in _all(events[name]))
    client.close()


def test_no_request_is_blamed_for_engines_that_somebody_kills(engines: _Engines) -> None:
    killed = True
    client = Client(ResumingConnection(engines, killed_from_outside=lambda: killed))
    events = _submit(client, "a", "b")
    for _ in range(6):
        engines.replace()
        assert [submit.id.partition("~")[0] for submit in engines.submits] == ["a", "b"]
    killed = False
    engines.replace()
    engines.replace()
    assert [submit.id.partition("~")[0] for submit in engines.submits] == ["a"]  # one suspect alone
    killed = True
    engines.replace()
    assert [submit.id.partition("~")[0] for submit in engines.submits] == ["a"]  # as before
    assert all(each.empty() for each in events.values())
    client.close()


def test_new_requests_wait_while_one_is_tried_alone(engines: _Engines) -> None:
    client = _client(engines)
    _submit(client, "a", "b")
    engines.replace()
    engines.replace()
    [tried] = engines.submits
    assert tried.id.startswith("a~")
    late = _submit(client, "late")["late"]
    assert len(engines.submits) == 1
    engines.accept(tried.id)
    engines.delta(tried.id, 3, position=0)
    assert [submit.id.partition("~")[0] for submit in engines.submits] == ["a", "b"]
    engines.finish(engines.submits[1].id)
    assert [submit.id for submit in engines.submits[2:]] == ["late"]
    assert late.empty()
    client.close()


def test_a_status_is_no_requests_event(engines: _Engines) -> None:
    client = _client(engines)
    answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.ask(StatusRequest(), answers.put)
    status = Status(
        ready=True,
        ranks=1,
        max_model_len=1,
        max_num_seqs=1,
        block_size=1,
        total_blocks=1,
        free_blocks=1,
        running=0,
        waiting=0,
        steps=0,
        preemptions=0,
        prefix_hits=0,
        peak_memory=[],
        report=[],
    )
    engines.say(status)
    assert answers.get(timeout=PATIENCE_S) == status
    engines.replace()
    assert engines.sent == []


def test_who_gets_on_between_two_deaths_is_not_suspected() -> None:
    suspects = Suspects()
    assert suspects.died(["a", "b"]) is None
    assert suspects.first() is None
    suspects.got_on("a")
    assert suspects.died(["a", "b"]) is None
    assert suspects.first() == "b"
    assert suspects.died(["b"]) == "b"
    assert suspects.first() is None


def test_who_is_alone_at_two_deaths_is_blamed() -> None:
    suspects = Suspects()
    assert suspects.died(["a"]) is None
    assert suspects.died(["a"]) == "a"


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_question_that_an_engine_gives_back_as_it_ends_is_asked_of_the_next(engines: _Engines) -> None:
    client = _client(engines)
    answers: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client.ask(Tokenize(id="t", prompt="a"), answers.put)
    engines.say(Failed("t", EngineStopped.__name__, "the engine was closed"))
    engines.replace()
    assert Tokenize(id="t~1", prompt="a") in engines.sent
    engines.say(Tokenized(id="t~1", token_ids=[1], text="a", token_bytes=[b"a"]))
    answer = answers.get(timeout=PATIENCE_S)
    assert isinstance(answer, Tokenized)
    assert answer.id == "t"
    client.close()


def test_what_is_sent_long_after_an_engine_has_gone_is_given_up_too(engines: _Engines) -> None:
    client = _client(engines, wait_s=0.05)
    assert engines.hear_silence is not None
    engines.is_silent = True
    engines.hear_silence(STOPPED)
    time.sleep(0.2)  # what waited then was given up
    late = _submit(client, "a")["a"].get(timeout=PATIENCE_S)
    assert isinstance(late, Failed)
    assert late.error == EngineStopped.__name__
    client.close()


def test_a_request_that_was_being_sent_when_its_engine_was_replaced_is_computed_once(engines: _Engines) -> None:
    client = _client(engines)
    plain = engines.send

    def send(command: Command) -> None:
        if isinstance(command, Submit) and command.id == "a" and engines.number == 1:
            engines.replace()  # before it is on its way
        plain(command)

    engines.send = send  # type: ignore[method-assign]
    _submit(client, "a")
    assert [each.id for each in engines.submits] == ["a~1", "a"]
    assert engines.sent[-1] == Abort("a")
    client.close()
