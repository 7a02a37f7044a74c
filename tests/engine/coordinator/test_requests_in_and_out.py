"""The ends of the coordinator: what is accepted, refused and failed, in which order, and when the engine stops."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from phalanx import SamplingParams
from phalanx.engine.coordinator import ingress as ingress_module
from phalanx.engine.coordinator.egress import Egress
from phalanx.engine.coordinator.ingress import CHAT_THREADS, LONG_BYTES, Ingress
from phalanx.engine.coordinator.output_processor import OutputProcessor
from phalanx.engine.coordinator.registry import Owner, RequestRegistry
from phalanx.engine.errors import CapacityExceeded, EngineFault, EngineStopped, InvalidRequest
from phalanx.engine.protocol.messages import (
    Abort,
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    ModelInfoRequest,
    Shutdown,
    StatusRequest,
    Submit,
)
from phalanx.engine.protocol.transport import OnCommand, Transport
from phalanx.engine.scheduling.request import Request, SequenceUpdate
from phalanx.engine.scheduling.step_plan import SlotSampling

PATIENCE_S = 20.0
MOST_BYTES = 2**20
LONG = "long" + " " * LONG_BYTES
IN_USE = "id='a' is in use by a request that is not finished; choose another"
ONE, OTHER = Owner(b"\x01", "a"), Owner(b"\x02", "a")


class _Transport(Transport):
    """Keeps what is sent: a message is a client and its events."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[tuple[bytes, list[Event]]] = queue.SimpleQueue()

    def start(self, on_command: OnCommand) -> None:
        raise NotImplementedError

    def send(self, client: bytes, *events: Event) -> None:
        self.messages.put((client, list(events)))

    def close(self) -> None:
        raise NotImplementedError

    def next(self) -> tuple[bytes, list[Event]]:
        return self.messages.get(timeout=PATIENCE_S)


class _Loop:
    """Notes what it is asked for, by the name of the method, instead of doing it."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.answered: list[tuple[str, bytes]] = []  # at once, by whoever asked

    def call_soon(self, action: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._asked.put(partial(action, *args, **kwargs))

    def stop(self) -> None:
        self.call_soon(lambda: ("stop",))

    def report_status(self, client: bytes) -> None:
        self.answered.append(("report_status", client))

    def report_model_info(self, client: bytes) -> None:
        self.answered.append(("report_model_info", client))

    def next(self) -> Any:
        """The next thing asked for; raises what the loop would."""
        return self._asked.get(timeout=PATIENCE_S)()

    @property
    def idle(self) -> bool:
        return self._asked.empty()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: (name, *args)


class _Processor:
    """Makes a request of anything but the prompts that name an error."""

    def __init__(self) -> None:
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.processed: list[str] = []
        self.seeds: dict[str, int | None] = {}
        self._numbers = itertools.count()
        self.busy_with: queue.SimpleQueue[str] = queue.SimpleQueue()

    def next_seed(self, submit: Submit) -> int | None:
        return next(self._numbers)

    def check_bytes(self, submit: Submit, size: int) -> None:
        if size > MOST_BYTES:
            raise InvalidRequest("too many bytes")

    def close(self) -> None:
        self.closed = True

    def process(self, submit: Submit, request_id: str, arrived_at: float, seed: int | None) -> Request:
        self.processed.append(submit.id)
        self.seeds[request_id] = seed
        if submit.messages or (submit.prompt or "").startswith("long"):
            self.busy_with.put(submit.id)
            self.busy.set()
            assert self.go_on.wait(PATIENCE_S)
        if submit.prompt == "invalid":
            raise InvalidRequest("the prompt is invalid")
        if submit.prompt == "defect":
            raise KeyError("a defect")
        return _request(request_id)


def _request(request_id: str) -> Request:
    sampling = SlotSampling(
        temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
        frequency_penalty=0.0, seed=0, min_tokens=0, end_token_ids=(), bias_token_ids=(), bias_values=(), logprobs=-1,
        prompt_logprobs=-1, processed_logprobs=False,
    )  # fmt: skip
    request = Request(id=request_id, prompt=[1], samplings=[sampling], max_tokens=4, arrived_at=0.0)
    request.take_on(0, 8, None)
    return request


class _Ends:
    """Both ends over one registry, and what is around them."""

    def __init__(self) -> None:
        self.transport, self.loop, self.registry = _Transport(), _Loop(), RequestRegistry()
        self.egress = Egress(self.transport, None, self.registry, self.loop)
        self.processor = _Processor()
        self.ingress = Ingress(self.processor, self.registry, self.egress, self.loop)  # type: ignore[arg-type]
        self.egress.start()
        self.ingress.start()

    def accept(self, owner: Owner) -> Request:
        """A request of `owner`, as the scheduler has it once it was submitted."""
        self.ingress.receive(owner.client, Submit(id=owner.external_id, prompt="x"))
        name, added, request, submit = self.loop.next()
        assert (name, added) == ("add", owner)
        assert isinstance(request, Request)
        self.egress.begin(owner, submit, request)
        accepted = Accepted(id=owner.external_id, prompt_tokens=1, seed=0, max_tokens=4)
        assert self.transport.next() == (owner.client, [accepted])
        return request


@pytest.fixture
def ends() -> Iterator[_Ends]:
    ends = _Ends()
    yield ends
    ends.ingress.close()
    ends.egress.close()


def _update(request: Request, token: int, **last: Any) -> SequenceUpdate:
    return SequenceUpdate(request, request.sequences[0], [token], **last)


def _failed(error: type[Exception], message: str) -> Failed:
    return Failed("a", error.__name__, message)


# ---- the registry


def test_two_clients_may_use_the_same_id_and_one_client_may_not_use_it_twice() -> None:
    registry = RequestRegistry()
    for owner in (ONE, OTHER):
        registry.check_unused(owner)
        registry.add(owner)
    with pytest.raises(InvalidRequest, match="id='a' is in use by a request that is not finished; choose another"):
        registry.check_unused(ONE)
    assert registry.remove(ONE.request_id) == ONE
    assert registry.remove(ONE.request_id) is None
    registry.check_unused(ONE)
    assert registry.unfinished() == [OTHER.request_id]


def test_a_closed_registry_refuses_with_the_first_reason_and_keeps_what_it_has() -> None:
    registry = RequestRegistry()
    registry.add(ONE)
    assert [str(registry.close(why)) for why in ("first", "second")] == ["first", "first"]
    for refused in (registry.check_open, lambda: registry.add(OTHER)):
        with pytest.raises(EngineStopped, match="first"):
            refused()
    assert registry.unfinished() == [ONE.request_id]


def test_each_request_is_either_refused_or_left_for_whoever_closes_the_registry() -> None:
    for _ in range(50):
        registry, go = RequestRegistry(), threading.Barrier(2)
        refused = []

        def add_all(registry: RequestRegistry = registry, go: Any = go, refused: list[str] = refused) -> None:
            go.wait()
            for number in range(100):
                owner = Owner(b"", str(number))
                try:
                    registry.add(owner)
                except EngineStopped:
                    refused.append(owner.request_id)

        thread = threading.Thread(target=add_all)
        thread.start()
        go.wait()
        registry.close("the end")
        left = registry.unfinished()
        thread.join()
        assert sorted([*left, *refused]) == sorted(f":{number}" for number in range(100))


# ---- what comes in


def test_nothing_but_text_waits_for_text(ends: _Ends) -> None:
    ends.ingress.receive(b"\x01", Submit(id="a", prompt="long"))
    assert ends.processor.busy.wait(PATIENCE_S)
    ends.ingress.receive(b"\x01", Shutdown())
    assert ends.loop.next() == ("stop",)
    ends.processor.go_on.set()
    assert ends.loop.next()[0] == "add"


def test_a_request_aborted_while_its_text_is_taken_in_is_aborted_once_it_is_added(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="long"))
    assert ends.processor.busy.wait(PATIENCE_S)
    ends.ingress.receive(ONE.client, Abort("a"))
    assert ends.loop.next() == ("abort", ONE.request_id)  # of no use: the loop does not know it yet
    ends.processor.go_on.set()
    assert ends.loop.next()[0] == "add"
    assert ends.loop.next() == ("abort", ONE.request_id)


def test_a_request_aborted_while_it_waits_for_its_turn_ends_without_being_looked_at(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="long"))
    assert ends.processor.busy.wait(PATIENCE_S)
    ends.ingress.receive(OTHER.client, Submit(id="a", prompt="x", sampling=SamplingParams(n=2)))
    ends.ingress.receive(OTHER.client, Abort("a"))
    ends.processor.go_on.set()
    client, [event] = ends.transport.next()
    assert client == OTHER.client
    assert isinstance(event, Finished)
    assert [completion.finish_reason for completion in event.completions] == ["abort", "abort"]
    assert ends.processor.processed == ["a"]
    assert [ends.loop.next()[0] for _ in range(2)] == ["abort", "add"]
    assert ends.accept(OTHER).id == OTHER.request_id  # the id is free again


def test_commands_reach_the_step_loop_under_the_engines_own_ids(ends: _Ends) -> None:
    assert ends.accept(ONE).id == ONE.request_id
    for command in (Abort("a"), Shutdown()):
        ends.ingress.receive(ONE.client, command)
    assert [ends.loop.next() for _ in range(2)] == [("abort", ONE.request_id), ("stop",)]


def test_questions_for_the_state_are_answered_beside_intake_and_step_loop(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="long"))
    assert ends.processor.busy.wait(PATIENCE_S)
    for command in (StatusRequest(), ModelInfoRequest()):
        ends.ingress.receive(ONE.client, command)
    assert ends.loop.answered == [("report_status", ONE.client), ("report_model_info", ONE.client)]
    assert ends.loop.idle
    ends.processor.go_on.set()


def test_a_request_is_refused_first_for_its_id_then_for_its_fields_then_for_an_engine_that_stopped(ends: _Ends) -> None:
    ends.accept(ONE)
    ends.registry.close("the engine was closed")
    for owner, prompt, refusal in (
        (ONE, "invalid", _failed(InvalidRequest, IN_USE)),
        (OTHER, "invalid", _failed(InvalidRequest, "the prompt is invalid")),
        (OTHER, "x", _failed(EngineStopped, "the engine was closed")),
    ):
        ends.ingress.receive(owner.client, Submit(id="a", prompt=prompt))
        assert ends.transport.next() == (owner.client, [refusal])
    assert ends.loop.idle


def test_what_else_goes_wrong_while_a_request_is_taken_in_fails_that_request_alone(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="defect"))
    refusal = _failed(InvalidRequest, "the request was refused: KeyError('a defect')")
    assert ends.transport.next() == (ONE.client, [refusal])
    ends.accept(ONE)


def test_closing_handles_what_was_received_and_drops_what_comes_later() -> None:
    ends = _Ends()
    for number in range(100):
        ends.ingress.receive(b"", Submit(id=str(number), prompt="x"))
    ends.ingress.close()
    ends.ingress.receive(b"", Submit(id="late", prompt="x"))
    assert [ends.loop.next()[1].external_id for _ in range(100)] == [str(number) for number in range(100)]
    assert ends.loop.idle
    ends.egress.close()


@pytest.mark.parametrize("slow", [{"prompt": LONG}, {"messages": [{"role": "user", "content": "x"}]}])
def test_long_texts_and_conversations_hold_up_no_short_prompt(ends: _Ends, slow: dict[str, Any]) -> None:
    for number in range(20):
        ends.ingress.receive(ONE.client, Submit(id=str(number), **slow))
    ends.processor.busy_with.get(timeout=PATIENCE_S)
    for number in range(20):
        ends.accept(Owner(ONE.client, f"short {number}"))
    ends.processor.go_on.set()
    assert {ends.loop.next()[1].external_id for _ in range(20)} == set(map(str, range(20)))


def test_one_client_cannot_keep_all_threads_for_conversations_busy(ends: _Ends) -> None:
    conversation = [{"role": "user", "content": "x"}]
    for number in range(3 * CHAT_THREADS):
        ends.ingress.receive(ONE.client, Submit(id=str(number), messages=conversation))
    begun = [ends.processor.busy_with.get(timeout=PATIENCE_S) for _ in range(CHAT_THREADS - 1)]
    ends.ingress.receive(OTHER.client, Submit(id="other", messages=conversation))
    assert ends.processor.busy_with.get(timeout=PATIENCE_S) == "other"
    assert sorted(begun) == ["0", "1", "2"]
    ends.processor.go_on.set()


def test_seeds_follow_the_order_of_arrival_whichever_text_is_ready_first(ends: _Ends) -> None:
    for name, prompt in (("a", LONG), ("b", "x"), ("c", LONG), ("d", "x")):
        ends.ingress.receive(b"", Submit(id=name, prompt=prompt))
    assert [ends.loop.next()[1].external_id for _ in range(2)] == ["b", "d"]
    ends.processor.go_on.set()
    assert {ends.loop.next()[1].external_id for _ in range(2)} == {"a", "c"}
    assert ends.processor.seeds == {":a": 0, ":b": 1, ":c": 2, ":d": 3}


def test_a_second_request_of_an_id_is_refused_while_the_first_is_encoded(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt=LONG))
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="x"))
    assert ends.transport.next() == (ONE.client, [_failed(InvalidRequest, IN_USE)])
    ends.processor.go_on.set()
    assert ends.loop.next()[0] == "add"
    assert ends.loop.idle


def test_an_id_does_not_wait_any_more_once_the_step_loop_can_answer_it(
    ends: _Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    leave = ends.ingress._leave

    def slow_to_leave(received: Any) -> bool:
        released.wait(0.5)
        return leave(received)

    monkeypatch.setattr(ends.ingress, "_leave", slow_to_leave)
    ends.accept(ONE)
    ends.egress.fail(ONE.request_id, CapacityExceeded("full"))
    ends.transport.next()
    ends.accept(ONE)  # sent again at once
    released.set()


def test_too_many_bytes_are_refused_unseen(ends: _Ends) -> None:
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="x" * (MOST_BYTES + 1)))
    assert ends.transport.next() == (ONE.client, [_failed(InvalidRequest, "too many bytes")])
    ends.ingress.receive(ONE.client, Submit(id="a", messages=[{"role": "user", "content": ["é" * (MOST_BYTES // 2)]}]))
    assert ends.transport.next() == (ONE.client, [_failed(InvalidRequest, "too many bytes")])
    behind_a_number = {"x": [1, "x" * MOST_BYTES]}
    ends.ingress.receive(ONE.client, Submit(id="a", messages=[], chat_template_kwargs=behind_a_number))
    assert ends.transport.next() == (ONE.client, [_failed(InvalidRequest, "too many bytes")])
    assert ends.processor.processed == []


def test_what_one_client_has_waiting_is_bounded_and_the_others_notice_nothing(
    ends: _Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress_module, "WAITING_BYTES", 2 * len(LONG))
    for name in "abc":
        ends.ingress.receive(ONE.client, Submit(id=name, prompt=LONG))
    client, [failed] = ends.transport.next()
    assert isinstance(failed, Failed)
    assert (client, failed.id, failed.error) == (ONE.client, "c", "CapacityExceeded")
    assert f"{2 * len(LONG)} bytes of this client's requests wait" in failed.message
    ends.accept(OTHER)
    ends.processor.go_on.set()
    for _ in range(2):
        ends.loop.next()
    ends.ingress.receive(ONE.client, Submit(id="c", prompt=LONG))  # there is room again
    assert ends.loop.next()[1].external_id == "c"


def test_everything_of_a_client_that_has_gone_is_aborted(ends: _Ends) -> None:
    ends.accept(Owner(ONE.client, "accepted"))
    ends.accept(OTHER)
    ends.ingress.receive(ONE.client, Submit(id="begun", prompt=LONG))
    assert ends.processor.busy.wait(PATIENCE_S)
    ends.ingress.receive(ONE.client, Submit(id="waiting", prompt=LONG))
    ends.ingress.abandon(ONE.client)
    assert ends.loop.next() == ("abort", Owner(ONE.client, "accepted").request_id)
    ends.processor.go_on.set()
    assert ends.loop.next()[0] == "add"
    assert ends.loop.next() == ("abort", Owner(ONE.client, "begun").request_id)
    _, [event] = ends.transport.next()
    assert isinstance(event, Finished)
    assert event.id == "waiting"
    assert ends.loop.idle


@pytest.mark.parametrize("prompt", ["long", LONG])
def test_closing_waits_a_bounded_time_for_a_text_and_leaves_no_request_unanswered(prompt: str) -> None:
    ends = _Ends()
    for name in "ab":
        ends.ingress.receive(ONE.client, Submit(id=name, prompt=prompt))
    assert ends.processor.busy.wait(PATIENCE_S)
    began = time.monotonic()
    ends.ingress.close()
    assert time.monotonic() - began < 5
    answers = [event for _ in "ab" for event in ends.transport.next()[1]]
    assert answers == [Failed(name, "EngineStopped", "the engine was closed") for name in "ab"]
    ends.processor.go_on.set()
    ends.egress.close()
    assert ends.loop.idle
    assert ends.transport.messages.empty()


def test_the_end_of_the_transport_ends_the_step_loop_with_its_reason(ends: _Ends) -> None:
    ends.ingress.fail(EngineStopped("the transport's thread ended"))
    with pytest.raises(EngineStopped, match="the transport's thread ended"):
        ends.loop.next()


# ---- what goes out


def test_what_one_step_brings_a_client_goes_to_it_as_one_message(ends: _Ends) -> None:
    second = Owner(ONE.client, "b")
    requests = [ends.accept(owner) for owner in (ONE, OTHER, second)]
    ends.egress.deliver([_update(request, token) for token, request in enumerate(requests)])
    assert ends.transport.next() == (ONE.client, [Delta("a", 0, "", [0]), Delta("b", 0, "", [2])])
    assert ends.transport.next() == (OTHER.client, [Delta("a", 0, "", [1])])


def test_an_id_is_free_again_once_its_request_finished_or_failed(ends: _Ends) -> None:
    request = ends.accept(ONE)
    ends.egress.deliver([_update(request, 5, finish_reason="length", request_finished=True)])
    _, events = ends.transport.next()
    assert [type(event) for event in events] == [Delta, Finished]
    ends.accept(ONE)
    ends.egress.fail(ONE.request_id, CapacityExceeded("the queue is full"))
    assert ends.transport.next() == (ONE.client, [_failed(CapacityExceeded, "the queue is full")])
    ends.accept(ONE)


def test_a_failure_comes_after_what_was_due_and_nothing_comes_after_it(ends: _Ends) -> None:
    request = ends.accept(ONE)
    ends.egress.deliver([_update(request, 5)])
    for _ in range(2):
        ends.egress.fail(ONE.request_id, InvalidRequest("no number"))
    ends.egress.deliver([_update(request, 6, finish_reason="abort", request_finished=True)])
    ends.egress.close()
    assert ends.transport.next() == (ONE.client, [Delta("a", 0, "", [5])])
    assert ends.transport.next() == (ONE.client, [_failed(InvalidRequest, "no number")])
    assert ends.transport.messages.empty()


def test_a_refusal_leaves_the_accepted_request_of_that_id_alone(ends: _Ends) -> None:
    request = ends.accept(ONE)
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="x"))
    _, [refusal] = ends.transport.next()
    assert isinstance(refusal, Failed)
    ends.egress.deliver([_update(request, 5)])
    assert ends.transport.next() == (ONE.client, [Delta("a", 0, "", [5])])


def test_when_the_engine_stops_every_accepted_request_fails_after_what_is_due(ends: _Ends) -> None:
    finishing = ends.accept(ONE)
    ends.ingress.receive(OTHER.client, Submit(id="a", prompt="x"))
    ends.loop.next()  # accepted; a loop that has stopped never adds it
    ends.egress.deliver([_update(finishing, 5, finish_reason="length", request_finished=True)])
    ends.egress.fail_all(ends.registry.close("rank 0 failed"))
    client, events = ends.transport.next()
    assert (client, isinstance(events[-1], Finished)) == (ONE.client, True)
    assert ends.transport.next() == (OTHER.client, [_failed(EngineStopped, "rank 0 failed")])
    assert ends.registry.unfinished() == []


@pytest.mark.parametrize("stage", ["start", "update"])
def test_an_answer_whose_text_cannot_be_made_fails_alone(
    ends: _Ends, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    neighbour = ends.accept(OTHER)
    made = getattr(OutputProcessor, stage)

    def broken(self: OutputProcessor, *args: Any) -> None:
        made(self, *args)
        if any(getattr(arg, "id", None) == ONE.request_id or getattr(arg, "request", None) is request for arg in args):
            raise KeyError("a defect")

    request: Request | None = None
    monkeypatch.setattr(OutputProcessor, stage, broken)
    ends.ingress.receive(ONE.client, Submit(id="a", prompt="x"))
    _, owner, request, submit = ends.loop.next()
    ends.egress.begin(owner, submit, request)
    ends.egress.deliver([_update(request, 5)])

    events: list[Event] = []
    while not any(isinstance(event, Failed) for event in events):
        client, sent = ends.transport.next()
        assert client == ONE.client
        events += sent
    assert events[-1] == _failed(EngineFault, "the answer could not be made: KeyError('a defect')")
    assert ends.loop.next() == ("abort", ONE.request_id)

    ends.egress.deliver([_update(request, 6), _update(neighbour, 5)])
    assert ends.transport.next() == (OTHER.client, [Delta("a", 0, "", [5])])
    assert ends.registry.unfinished() == [OTHER.request_id]


def test_a_defect_of_either_thread_is_raised_in_the_step_loop(ends: _Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(ends.transport, "send", broken)
    ends.egress.send(b"", Failed("a", "", ""))
    with pytest.raises(RuntimeError, match="a defect"):
        ends.loop.next()
    monkeypatch.setattr(ends.egress, "refuse", broken)
    ends.ingress.receive(b"", Submit(id="a", prompt="invalid"))
    with pytest.raises(RuntimeError, match="a defect"):
        ends.loop.next()
