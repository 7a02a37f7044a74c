"""A request that goes on at another engine, from any Delta on: its client ends up with what it would have had."""

from __future__ import annotations

import queue
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from phalanx import LLM, EngineStopped, InvalidRequest, SamplingParams
from phalanx.engine.client.client import to_error
from phalanx.engine.client.llm import choose_device
from phalanx.engine.client.requests import OutputBuilder, RequestOutput
from phalanx.engine.client.resume.delivered import Delivered
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import Delta, Event, Failed, Finished, Resume, ResumedCompletion, Submit
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.engine.protocol.transport import InProcess
from phalanx.parallel.group import local_group
from phalanx.tests.engine.conftest import CONFIG

PROMPT = "once upon a time 🙂"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
SEEDED: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 7, "ignore_eos": True}


def _events(llm: LLM, submit: Submit) -> list[Event]:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    llm.client.submit(submit, events.put, quick=True)
    found = [events.get(timeout=60)]
    while not isinstance(found[-1], Finished | Failed):
        found.append(events.get(timeout=60))
    if isinstance(found[-1], Failed):
        raise to_error(found[-1])
    return found


def _output(events: Iterable[Event], n: int) -> RequestOutput:
    builder = OutputBuilder(n)
    output = None
    for event in events:
        output = builder.add(event)
    assert output is not None
    return output


def _submit(llm: LLM, sampling: SamplingParams, **fields: Any) -> Submit:
    return Submit(id=llm.client.new_id(), prompt=PROMPT, sampling=sampling, return_prompt_token_ids=True, **fields)


def _thinking(events: Iterable[Event], n: int) -> list[str]:
    deltas = [event for event in events if isinstance(event, Delta)]
    return ["".join(delta.reasoning for delta in deltas if delta.index == index) for index in range(n)]


def _comparable(output: RequestOutput) -> Any:
    """What must not differ. Log-probabilities are compared apart, and how much of the prompt was cached by its test."""
    usage = msgspec.structs.replace(output.usage, cached_tokens=0)
    each = [(one.text, one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]
    return output.prompt_token_ids, each, usage


def _same_logprobs(found: list[TokenLogprobs] | None, expected: list[TokenLogprobs] | None) -> None:
    assert (found is None) == (expected is None)
    for one, other in zip(found or [], expected or [], strict=True):
        assert (one.token_id, one.rank, one.top_token_ids) == (other.token_id, other.rank, other.top_token_ids)
        assert one.token_bytes == other.token_bytes
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)


def _go_on_from_everywhere(llm: LLM, sampling: SamplingParams, **fields: Any) -> RequestOutput:
    """Compare the uninterrupted answer with those of which an engine had delivered 0, 1, ... events; return it."""
    submit = _submit(llm, sampling, **fields)
    events = _events(llm, submit)
    expected = _output(events, sampling.n)
    for cut in range(1, len(events)):
        delivered = Delivered(submit)
        assert all(delivered.add(event) for event in events[:cut])
        rest = _events(llm, delivered.resubmit(llm.client.new_id()))
        new = [event for event in rest if delivered.add(event)]
        assert len(new) == len(rest) - 1  # a second Accepted, and nothing else twice

        output = _output([*events[:cut], *new], sampling.n)
        assert _comparable(output) == _comparable(expected)
        assert _thinking([*events[:cut], *new], sampling.n) == _thinking(events, sampling.n)
        for one, other in zip(output.outputs, expected.outputs, strict=True):
            _same_logprobs(one.logprobs, other.logprobs)
        _same_logprobs(output.prompt_logprobs, expected.prompt_logprobs)
    return expected


@pytest.mark.parametrize(
    "values",
    [
        GREEDY,
        SEEDED,
        {**SEEDED, "n": 2},
        {**GREEDY, "presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
        {**SEEDED, "n": 2, "logprobs": 2, "prompt_logprobs": 1},
        {**GREEDY, "ignore_eos": False, "min_tokens": 6, "logit_bias": {258: 50.0}},
        {**SEEDED, "ignore_eos": False, "n": 3, "logit_bias": {258: 6.0}, "prompt_logprobs": 0},
    ],
    ids=["greedy", "seeded", "n=2", "penalties", "logprobs", "min_tokens", "eos"],
)
def test_an_answer_goes_on_from_any_of_its_deltas(llm: LLM, values: dict[str, Any]) -> None:
    _go_on_from_everywhere(llm, SamplingParams.from_dict(values))


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_are_right_across_the_seam(llm: LLM, include: bool) -> None:
    values = {**SEEDED, "n": 2, "max_tokens": 24}
    free = _output(_events(llm, _submit(llm, SamplingParams.from_dict(values))), 2).outputs
    # One completion ends at a string of several tokens; others begin strings that never end.
    stops = (free[0].text[7:10], *(free[1].text[place : place + 2] + "\0" for place in range(12)))
    values |= {"stop": stops, "include_stop_str_in_output": include, "prompt_logprobs": 0}
    expected = _go_on_from_everywhere(llm, SamplingParams.from_dict(values))
    assert expected.outputs[0].stop_reason == stops[0]


def test_grammars_and_thinking_go_on_across_the_seam(llm: LLM) -> None:
    form = StructuredOutput(regex="<think>[a-c]{3}</think>([a-f]{2} )+[g-i]{3}")
    sampling = SamplingParams.from_dict({**SEEDED, "n": 2, "max_tokens": 60, "ignore_eos": False, "logprobs": 0})
    expected = _go_on_from_everywhere(llm, sampling, structured=form, split_reasoning=True)
    for output in expected.outputs:
        assert output.finish_reason == "length" or re.fullmatch("([a-f]{2} )+[g-i]{3}", output.text)
    assert 0 < expected.usage.reasoning_tokens < expected.usage.completion_tokens


def test_an_unseeded_answer_goes_on_with_the_seed_it_was_given(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    submit = _submit(llm, sampling)
    events = _events(llm, submit)
    delivered = Delivered(submit)
    for event in events[:5]:
        delivered.add(event)
    rest = _events(llm, delivered.resubmit(llm.client.new_id()))
    assert _comparable(_output([*events[:5], *rest], 1)) == _comparable(_output(events, 1))


def test_what_came_from_the_prefix_cache_is_told_as_it_was_before(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=4, n=2, temperature=1.0, seed=3, ignore_eos=True)
    for _ in range(2):
        submit = Submit(id=llm.client.new_id(), token_ids=[9] * 40, sampling=sampling)
        events = _events(llm, submit)
    cached = _output(events, 2).usage.cached_tokens
    assert cached > 0
    for cut in range(2, len(events)):
        delivered = Delivered(submit)
        for event in events[:cut]:
            delivered.add(event)
        again = delivered.resubmit(llm.client.new_id())
        assert again.resume is not None
        assert again.resume.cached_tokens == cached
        assert _output([*events[:cut], *_events(llm, again)], 2).usage.cached_tokens == cached


def test_times_count_from_the_first_engine_on(llm: LLM) -> None:
    clock = iter([100.0, 130.0, 160.0]).__next__
    delivered = Delivered(submit := _submit(llm, SamplingParams(**GREEDY)), clock)
    events = _events(llm, submit)
    delivered.add(events[0])
    delivered.add(events[1])
    finished = _events(llm, delivered.resubmit(llm.client.new_id()))[-1]
    assert isinstance(finished, Finished)
    assert finished.timings.ttft_s == pytest.approx(30.0)
    assert finished.timings.queued_s <= finished.timings.ttft_s
    assert finished.timings.total_s >= 60.0


def test_what_was_delivered_before_is_not_handed_on_again() -> None:
    delivered = Delivered(Submit(id="a", prompt="p"))
    assert delivered.add(Delta("a", 0, "one", [1, 2], None, 0))
    assert not delivered.add(Delta("a", 0, "one", [1, 2], None, 0))
    assert delivered.add(Delta("a", 0, "two", [3], None, 2))
    assert delivered.tokens == 3


@pytest.mark.parametrize(
    ("resume", "words"),
    [
        (Resume(completions=[]), "resume has 0 completions; it must have as many as n=1"),
        (Resume(completions=[ResumedCompletion(token_ids=[5000])]), "resume.token_ids holds 5000"),
        (Resume(completions=[ResumedCompletion(token_ids=[5] * 600)]), "600 of resume are more than max_model_len"),
        (Resume(completions=[ResumedCompletion()], age_s=float("nan")), "resume has age_s"),
        (Resume(completions=[ResumedCompletion()], cached_tokens=9), "no more than its 1 tokens may be cached"),
        (Resume(completions=[ResumedCompletion(characters=-1)]), r"resume counts \[0, -1, 0\]"),
    ],
)
def test_what_no_engine_has_delivered_is_refused(llm: LLM, resume: Resume, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        _events(llm, Submit(id=llm.client.new_id(), prompt="p", resume=resume))


def test_an_engine_that_is_told_to_end_hands_over_what_it_has(tiny: Path) -> None:
    config = EngineConfig.from_dict({"model": str(tiny), **CONFIG})
    link = InProcess()
    engine = Engine(config, local_group(choose_device(config)), link.transport)
    assert engine.coordinator is not None
    with LLM.from_engine(engine, link) as llm:
        stream = llm.stream(PROMPT, sampling=SamplingParams(max_tokens=400, ignore_eos=True))
        next(stream)
        engine.coordinator.stop(hand_over=True)
        with pytest.raises(EngineStopped, match="the engine was told to end"):  # and no end by "abort"
            list(stream)
