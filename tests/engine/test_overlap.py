"""Steps planned ahead of the last one's tokens: the same answers, at any number of ranks and whatever is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.client.outputs import RequestOutput
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.execution.worker import Worker
from phalanx.engine.scheduling.step_plan import StepPlan
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG

LONG: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
SAMPLINGS = [
    SamplingParams(temperature=0, **LONG),
    SamplingParams(temperature=0.9, seed=1, **LONG),
    SamplingParams(temperature=0.9, seed=2, top_k=20, top_p=0.8, **LONG),
    SamplingParams(temperature=1.5, seed=3, top_p=0.95, **LONG),
    SamplingParams(temperature=0, repetition_penalty=1.3, **LONG),
    SamplingParams(temperature=0.7, seed=4, presence_penalty=0.5, frequency_penalty=0.5, **LONG),
    SamplingParams(temperature=0, logprobs=3, prompt_logprobs=2, **LONG),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=1.0, seed=5, max_tokens=40, min_tokens=3),
    SamplingParams(temperature=1.0, seed=6, n=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=7, max_tokens=30, stop_token_ids=list(range(3, 400))),
    SamplingParams(temperature=0.8, seed=8, max_tokens=30, stop=["a", "e", "1"]),
]


def _prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[5] * 20 + [rng.randrange(3, 1031) for _ in range(rng.randrange(1, 80))] for _ in SAMPLINGS]


def _contents(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(o.token_ids, o.text, o.finish_reason, o.stop_reason, _ids(o.logprobs)) for o in output.outputs]
        + [_ids(output.prompt_logprobs)]
        for output in outputs
    ]


def _ids(entries: list[Any] | None) -> list[Any] | None:
    return None if entries is None else [(e.token_id, e.rank, round(e.logprob, 3)) for e in entries]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_cache": False, "max_num_batched_tokens": 16},
        {"block_size": 4, "max_model_len": 256, "kv_memory": 66 * 2048},
    ],
    ids=str,
)
@pytest.mark.parametrize("together", [True, False])
def test_overlapping_steps_change_no_answer(llm: LLM, tiny: Path, changes: dict[str, Any], together: bool) -> None:
    prompts = _prompts()
    expected = [_contents(llm.generate([p], s))[0] for p, s in zip(prompts, SAMPLINGS, strict=True)]
    with LLM(str(tiny), **{**CONFIG, **changes, "overlap": True}) as ahead:
        for _ in range(2):
            if together:
                outputs = ahead.generate(prompts, SAMPLINGS)
            else:
                outputs = [ahead.generate([p], s)[0] for p, s in zip(prompts, SAMPLINGS, strict=True)]
            assert _contents(outputs) == expected
        status = ahead.status()
        assert status.free_blocks == status.total_blocks
        if "kv_memory" in changes and together:
            assert status.preemptions > 0


def test_a_step_is_launched_before_the_last_one_is_asked_for_its_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    launch: Callable[..., Any] = Worker.launch

    def watched(self: Worker, plan: StepPlan) -> Any:
        events.append(("launch", plan.step))
        step = launch(self, plan)
        result = step.result

        def asked() -> Any:
            events.append(("result", plan.step))
            return result()

        step.result = asked
        return step

    monkeypatch.setattr(Worker, "launch", watched)
    with LLM(str(tiny), **{**CONFIG, "overlap": True}) as ahead:
        ahead.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
        overlapping = [("launch", 1), ("launch", 2), ("result", 1), ("launch", 3), ("result", 2), ("launch", 4)]
        assert events == [*overlapping, ("result", 3), ("result", 4)]


def test_overlapping_steps_change_no_answer_of_several_ranks(run_ranks: Callable[..., list[Any]], tiny: Path) -> None:
    calls = [(_prompts(), SAMPLINGS)]
    with_, without = (
        run_ranks(2, programs.generate_at_each_size, str(tiny), [2], calls, {**CONFIG, "overlap": overlap})
        for overlap in (True, False)
    )
    for ahead, in_turn in zip(with_, without, strict=True):
        assert _contents(ahead[2][0]) == _contents(in_turn[2][0])


def test_bad_words_and_allowed_tokens_hold_at_any_number_of_ranks_whether_or_not_steps_overlap(
    run_ranks: Callable[..., list[Any]], tiny: Path
) -> None:
    letters = tuple(Tokenizer(tiny).encode("abcdef"))
    words = ("ab", "cde", "f", "abba", "ee")
    each = [
        SamplingParams(temperature=1.5, seed=seed, allowed_token_ids=letters, bad_words=bad, max_tokens=40, top_k=top_k)
        for seed, top_k in ((1, 0), (2, 4))
        for bad in (words, ())
    ]
    calls = [([[5, 6, 7]] * len(each), each)]
    runs = [
        run_ranks(3, programs.generate_at_each_size, str(tiny), [1, 2, 3], calls, {**CONFIG, "overlap": overlap})[0]
        for overlap in (False, True)
    ]
    expected = _contents(runs[0][1][0])
    for run in runs:
        for size in (1, 2, 3):
            assert _contents(run[size][0]) == expected

    texts = [output.outputs[0].text for output in runs[0][1][0]]
    assert all(len(text) == 40 and set(text) <= set("abcdef") for text in texts)
    for number, text in enumerate(texts):
        assert any(word in text for word in words) == (number % 2 == 1)
