"""A fault at any stage of one request's way through the engine fails that request alone.

Nothing in the engine knows of these faults: each test puts one in the place of what the stage does.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from phalanx import LLM, EngineFault, InvalidRequest, PhalanxError, SamplingParams
from phalanx.engine.client.client import to_error
from phalanx.engine.constraints.compiler import GrammarCompiler
from phalanx.engine.constraints.matcher import Matcher
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.engine.coordinator.output_processor import OutputProcessor, StopStrings
from phalanx.engine.coordinator.text.token_text import IncrementalDetokenizer
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.protocol.messages import Delta, Event, Failed, Finished, Submit
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport
from phalanx.engine.sampling import penalties, sampler
from phalanx.engine.scheduling.request import Request, Sequence
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.engine.serving_engine import serving

PATIENCE_S = 60.0
TOKENS = 12
MARK = 77
"""The first token, or the seed, by which a fault knows its request."""
FREE: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
NEIGHBOURS: tuple[dict[str, Any], ...] = (
    {"token_ids": [5, 6, 7, 8], "sampling": SamplingParams(**FREE)},
    {"prompt": "abc", "sampling": SamplingParams(**{**FREE, "temperature": 1.0, "seed": 3, "n": 2, "logprobs": 1})},
    {"prompt": "abd", "sampling": SamplingParams(**FREE), "structured": StructuredOutput(regex="[a-f]{40}")},
    {"messages": [{"role": "user", "content": "hi"}], "sampling": SamplingParams(**{**FREE, "stop": ("\0\0",)})},
)
MARKED = SamplingParams(**{**FREE, "seed": MARK})


@pytest.fixture(scope="module")
def shared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, list[Any]]]:
    """An engine behind ZeroMQ, and what the neighbours are answered undisturbed."""
    address = f"ipc://{tmp_path_factory.mktemp('faults')}/engine"
    with serving(tiny, address, **CONFIG), LLM.connect(address) as llm:
        yield llm, [_ended(events) for events in _ask(llm, NEIGHBOURS)]


def _ask(llm: LLM, requests: tuple[dict[str, Any], ...]) -> list[queue.SimpleQueue[Event]]:
    found = []
    for request in requests:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        llm.client.submit(Submit(id=llm.client.new_id(), **request), events.put, quick=True)
        found.append(events)
    return found


def _ended(events: queue.SimpleQueue[Event]) -> Any:
    """Tokens, texts and ends of an answer. Raises the error with which it ended."""
    tokens: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    while True:
        event = events.get(timeout=PATIENCE_S)
        if isinstance(event, Delta):
            tokens.setdefault(event.index, []).extend(event.token_ids)
            texts[event.index] = texts.get(event.index, "") + event.text
        elif isinstance(event, Finished):
            return tokens, texts, event.completions
        elif isinstance(event, Failed):
            raise to_error(event)


def _raises(error: Exception, hit: Callable[..., bool], made: Callable[..., Any]) -> Callable[..., Any]:
    """What a stage does, but for those that are hit."""

    def stage(*args: Any, **kwargs: Any) -> Any:
        if hit(*args, **kwargs):
            raise error
        return made(*args, **kwargs)

    return stage


def _is_marked(*args: Any, **kwargs: Any) -> bool:
    """Whether any of a stage's arguments belongs to the marked request."""
    for each in (getattr(arg, "request", arg) for arg in args):
        if isinstance(each, Request) and each.seed == MARK:
            return True
        if isinstance(each, Submit) and each.sampling.seed == MARK:
            return True
    return False


def _says(text: str) -> Callable[..., bool]:
    return lambda *args, **kwargs: any(isinstance(each, str) and text in each for each in args)


POISON = {"messages": [{"role": "user", "content": "poison"}]}
LETTERS = {"structured": StructuredOutput(regex="[u-z]{30}")}
STAGES: dict[str, tuple[type, str, Callable[..., bool], dict[str, Any], type[PhalanxError]]] = {
    "template": (
        Tokenizer,
        "encode_conversation",
        lambda tokenizer, prompt, *more: "poison" in str(prompt.messages),
        POISON,
        InvalidRequest,
    ),
    "tokenizer": (Tokenizer, "encode", _says("poison"), {"prompt": "poison"}, InvalidRequest),
    "transport's thread": (InputProcessor, "check_bytes", _is_marked, {"prompt": "a"}, InvalidRequest),
    "intake": (InputProcessor, "process", _is_marked, {"prompt": "a"}, InvalidRequest),
    "grammar": (
        GrammarCompiler,
        "compile",
        lambda compiler, structured: "u-z" in str(structured.regex),
        {"prompt": "a", **LETTERS},
        InvalidRequest,
    ),
    "queue": (Request, "take_on", _is_marked, {"prompt": "a"}, EngineFault),
    "row of a plan": (Sequence, "start", _is_marked, {"prompt": "a"}, EngineFault),
    "row of a result": (Sequence, "append", _is_marked, {"prompt": "a"}, EngineFault),
    "answer's beginning": (OutputProcessor, "start", _is_marked, {"prompt": "a"}, EngineFault),
    "answer": (OutputProcessor, "update", _is_marked, {"prompt": "a"}, EngineFault),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_a_stage_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    kind, name, hit, request, error = STAGES[stage]
    monkeypatch.setattr(kind, name, _raises(RuntimeError("a defect"), hit, getattr(kind, name)))
    _check(shared, {**request, "sampling": MARKED}, error)


@pytest.mark.parametrize(("kind", "name"), [(StopStrings, "feed"), (IncrementalDetokenizer, "step")])
def test_a_fault_amid_a_text_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    marked: list[Any] = []
    begin = OutputProcessor.start

    def start(self: OutputProcessor, client: bytes, submit: Submit, request: Request) -> None:
        begin(self, client, submit, request)
        if request.seed == MARK:
            state = self._requests[request.id].completions[0]
            marked.extend([state.stops, state.detokenizer])

    made = getattr(kind, name)
    counts = iter(range(100))
    hit = lambda self, *args, **kwargs: self in marked and next(counts) > 3  # noqa: E731
    monkeypatch.setattr(OutputProcessor, "start", start)
    monkeypatch.setattr(kind, name, _raises(RuntimeError("a defect"), hit, made))
    _check(shared, {"prompt": "a", "sampling": MARKED}, EngineFault)


def test_a_fault_of_a_mask_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "make_mask" if hasattr(Matcher, "make_mask") else "allowed"
    made = getattr(Matcher, name)
    process = InputProcessor.process
    marked: list[Any] = []

    def processed(self: InputProcessor, *args: Any) -> Request:
        request = process(self, *args)
        if request.seed == MARK:
            marked.extend(request.constraints)
        return request

    calls = iter(range(100))
    hit = lambda self: self in marked and next(calls) > 2  # noqa: E731
    monkeypatch.setattr(InputProcessor, "process", processed)
    monkeypatch.setattr(Matcher, name, _raises(RuntimeError("a defect"), hit, made))
    _check(shared, {"prompt": "a", **LETTERS, "sampling": MARKED}, InvalidRequest, "its grammar cannot be followed")


def test_a_fault_of_following_a_grammar_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_in = Sequence._take_in
    hit = lambda self, token, length: self.request.seed == MARK and length == 2  # noqa: E731
    monkeypatch.setattr(Sequence, "_take_in", _raises(RuntimeError("a defect"), hit, take_in))
    _check(shared, {"prompt": "a", **LETTERS, "sampling": MARKED}, EngineFault)


@pytest.mark.parametrize("change", [{"logit_bias": {5: 0.125}}, {"logprobs_mode": "processed"}])
def test_a_fault_of_sampling_a_row_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    counts = iter(range(100))
    if "logit_bias" in change:
        hit = lambda logits, vocab, sampling, *more: sampling.bias_values == (0.125,) and next(counts) > 3  # noqa: E731
        broken = _raises(IndexError("a defect"), hit, penalties.edit_logits)
        monkeypatch.setattr(penalties, "edit_logits", broken)
    else:
        change = {**change, "temperature": 1.0, "top_k": 20, "logprobs": 3}
        hit = lambda *args: args[-1] == 3 and next(counts) > 3  # noqa: E731
        broken = _raises(IndexError("a defect"), hit, sampler.kept_logprobs)
        monkeypatch.setattr(sampler, "kept_logprobs", broken)
    _check(
        shared,
        {"prompt": "a", "sampling": SamplingParams.from_dict({**FREE, "seed": MARK, **change})},
        EngineFault,
        "could not be sampled.*a defect",
    )


def test_an_event_that_cannot_be_encoded_fails_its_own_request_alone(
    shared: tuple[LLM, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = ZmqTransport.send
    hit_id = ""

    def sent(self: ZmqTransport, client: bytes, *events: Event) -> None:
        """Half a character in the text of the request that is hit, amid its answer."""
        made = [
            msgspec.structs.replace(event, text="\ud800")
            if isinstance(event, Delta) and event.id == hit_id and event.position > 2
            else event
            for event in events
        ]
        send(self, client, *made)

    llm, _ = shared
    monkeypatch.setattr(ZmqTransport, "send", sent)
    new_id = llm.client.new_id
    monkeypatch.setattr(llm.client, "new_id", lambda: hit_id or new_id())
    neighbours = _ask(llm, NEIGHBOURS)
    hit_id = "hit"
    [events] = _ask(llm, ({"prompt": "a", "sampling": MARKED},))
    with pytest.raises(EngineFault, match="could not be sent"):
        _ended(events)
    assert [_ended(each) for each in neighbours] == shared[1]
    hit_id = ""
    _served_on(shared)


def test_a_client_that_goes_amid_its_answer_takes_nobody_along(shared: tuple[LLM, list[Any]]) -> None:
    llm, expected = shared
    neighbours = _ask(llm, NEIGHBOURS)
    connection = ZmqConnection(llm.client._connection._inner._address)  # type: ignore[attr-defined]
    connection.start(lambda event: None, lambda error: None)
    connection.send(Submit(id="gone", prompt="a", sampling=SamplingParams(**{**FREE, "max_tokens": 400})))
    connection.close()
    assert [_ended(each) for each in neighbours] == expected
    _served_on(shared)


def _check(
    shared: tuple[LLM, list[Any]], request: dict[str, Any], error: type[PhalanxError], words: str = "a defect"
) -> None:
    """The request fails, its neighbours' answers are the undisturbed ones, and the engine serves on."""
    llm, expected = shared
    before = _ask(llm, NEIGHBOURS[:2])
    [events] = _ask(llm, (request,))
    after = _ask(llm, NEIGHBOURS[2:])
    with pytest.raises(error, match=words):
        _ended(events)
    assert [_ended(each) for each in [*before, *after]] == expected
    _served_on(shared)


def _served_on(shared: tuple[LLM, list[Any]]) -> None:
    llm, expected = shared
    assert [_ended(each) for each in _ask(llm, NEIGHBOURS)] == expected
