"""Grammars that take their time: they are compiled, and their masks made, while neighbours go on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, InvalidRequest, SamplingParams, StructuredOutput
from phalanx.engine.constraints.compiler import CompiledGrammar, GrammarCompiler
from phalanx.engine.constraints.matcher import MASK_CPU_S, Matcher
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.scheduling.step_plan import StepPlan
from phalanx.tests.engine.conftest import CONFIG

SLOW = StructuredOutput(regex="[a-c]{12}")
QUICK = StructuredOutput(regex="[0-9]{30}")
AMBIGUOUS = StructuredOutput(grammar='start: a\na: a a | a a a | "x" | "xx"')
GREEDY = SamplingParams(temperature=0, max_tokens=40)
LIMIT_S = 60
"""A bound against hanging."""


@pytest.fixture(params=[False, True], ids=["in turn", "overlap"])
def engine(tiny: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(str(tiny), overlap=request.param, **CONFIG) as llm:
        yield llm


def _hold_masks(monkeypatch: pytest.MonkeyPatch, wait: Callable[[], Any]) -> None:
    """Have masks of SLOW, all but an answer's first, wait before they are made."""
    make_mask, matcher = Matcher.make_mask, CompiledGrammar.matcher
    slow: set[Matcher] = set()

    def remember(self: CompiledGrammar, *arguments: Any) -> Matcher:
        made = matcher(self, *arguments)
        if getattr(self, "held", False):
            slow.add(made)
        return made

    def held(self: Matcher) -> None:
        if self in slow and self._length:
            wait()
        make_mask(self)

    compile_one = GrammarCompiler.compile

    def mark(self: GrammarCompiler, structured: StructuredOutput) -> CompiledGrammar:
        compiled = compile_one(self, structured)
        if structured == SLOW:
            object.__setattr__(compiled, "held", True)
        return compiled

    monkeypatch.setattr(CompiledGrammar, "matcher", remember)
    monkeypatch.setattr(Matcher, "make_mask", held)
    monkeypatch.setattr(GrammarCompiler, "compile", mark)


def _text(events: Any) -> str:
    return "".join(getattr(event, "text", "") for event in events)


def test_neighbours_get_all_their_tokens_before_a_mask_that_is_not_made(
    engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7], [8, 9], [10, 11]]
    expected = [o.outputs[0].text for o in engine.generate(prompts, GREEDY, [SLOW, None, QUICK])]
    gate = threading.Event()
    _hold_masks(monkeypatch, lambda: gate.wait(LIMIT_S))

    slow = engine.stream(prompts[0], sampling=GREEDY, structured=SLOW)
    others = [engine.stream(prompts[1], sampling=GREEDY), engine.stream(prompts[2], sampling=GREEDY, structured=QUICK)]
    assert [_text(other) for other in others] == expected[1:]  # while no mask of the slow one is made
    assert not gate.is_set()
    steps = engine.status().steps
    gate.set()
    assert _text(slow) == expected[0]
    assert engine.status().steps > steps
    assert engine.status().free_blocks == engine.status().total_blocks


def test_slow_masks_cost_their_neighbour_no_step(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [o.outputs[0].text for o in engine.generate([[5, 6], [8, 9]], GREEDY, [SLOW, None])]
    tokens = threading.Semaphore(0)
    _hold_masks(monkeypatch, lambda: tokens.acquire(timeout=LIMIT_S))
    forward = Worker._forward  # what every step goes through, with masks or without
    computed: list[set[int]] = []

    def record(self: Worker, plan: StepPlan) -> Any:
        computed.append(set(plan.slots))
        return forward(self, plan)

    monkeypatch.setattr(Worker, "_forward", record)

    # Each token of the neighbour lets one mask of the slow row through.
    slow = engine.stream([5, 6], sampling=GREEDY, structured=SLOW)
    first = next(slow)  # it has a slot, before its neighbour
    text = ""
    for event in engine.stream([8, 9], sampling=GREEDY):
        text += getattr(event, "text", "")
        tokens.release()
    for _ in range(20):
        tokens.release()
    assert text == expected[1]
    assert _text([first, *slow]) == expected[0]
    [its_slot] = set.union(*computed) - computed[0]
    steps = [number for number, slots in enumerate(computed) if its_slot in slots]
    # From its prompt to what was planned when it ended, no step goes by without it.
    assert len(steps) >= GREEDY.max_tokens
    assert steps[-1] - steps[0] < GREEDY.max_tokens + 2


def test_ambiguous_grammars_and_their_neighbours_say_what_each_says_alone(engine: LLM) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=12)
    prompts: list[Any] = [[5, 6], [8, 9], [10]]
    forms = [AMBIGUOUS, None, QUICK]
    alone = [
        engine.generate([prompt], sampling, form)[0].outputs[0].text
        for prompt, form in zip(prompts, forms, strict=True)
    ]
    assert [output.outputs[0].text for output in engine.generate(prompts, sampling, forms)] == alone
    assert set(alone[0]) == {"x"}


def test_a_grammar_that_is_being_compiled_holds_up_nobody(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    compile_one = GrammarCompiler._compile

    def held(self: GrammarCompiler, structured: StructuredOutput) -> CompiledGrammar:
        if structured == SLOW:
            assert gate.wait(LIMIT_S)
        return compile_one(self, structured)

    monkeypatch.setattr(GrammarCompiler, "_compile", held)
    slow = engine.stream([5, 6], sampling=GREEDY, structured=SLOW)
    for form in (None, QUICK, None):
        assert engine.generate([[8, 9]], GREEDY, form)[0].outputs[0].text
    assert not gate.is_set()
    gate.set()
    assert len(_text(slow)) == 12


def test_grammars_that_fail_hurt_no_neighbour(engine: LLM) -> None:
    branches = [{"properties": {f"k{i}": {}}} for i in range(4)]
    bad = [
        StructuredOutput(regex="("),
        StructuredOutput(grammar="start: foo"),
        StructuredOutput(json_schema='{"properties": {"a": {"not": {}}}}'),
        StructuredOutput(json_schema=json.dumps({"allOf": [{"anyOf": branches}] * 20})),
    ]
    alone = engine.generate([[8, 9]], GREEDY)[0].outputs[0].text
    neighbours = [engine.stream([8, 9], sampling=GREEDY) for _ in range(4)]
    for form in bad:
        with pytest.raises(InvalidRequest, match="structured"):
            engine.generate([[5, 6]], GREEDY, form)
    assert [_text(neighbour) for neighbour in neighbours] == [alone] * 4


def test_a_mask_that_takes_too_much_of_the_processor_fails_its_answer_alone(
    engine: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"spent": 0.0}
    _hold_masks(monkeypatch, lambda: None)
    allowed = Matcher._allowed

    def costly(self: Matcher) -> Any:
        if self._length == 3:
            clock["spent"] += 2 * MASK_CPU_S
        return allowed(self)

    real = time.thread_time
    monkeypatch.setattr(time, "thread_time", lambda: real() + clock["spent"])
    monkeypatch.setattr(Matcher, "_allowed", costly)
    neighbour = engine.stream([8, 9], sampling=GREEDY)
    with pytest.raises(InvalidRequest, match="after 3 tokens of the answer its grammar took"):
        engine.generate([[5, 6]], GREEDY, SLOW)
    monkeypatch.undo()
    assert _text(neighbour) == engine.generate([[8, 9]], GREEDY)[0].outputs[0].text
