"""benchmarks/chaos.py: short runs of it, after which nothing is lost, doubled or left behind; and how it judges."""

from __future__ import annotations

import importlib.util
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.chaos import Options, disturb
from phalanx.benchmarks.lab.chaos.answers import Asked, _folded, comparable, differences, judge
from phalanx.benchmarks.lab.chaos.kills import Plan, disturb_group
from phalanx.benchmarks.lab.chaos.questions import CHAT, MESSAGES, RESPONSES, TEXT, questions
from phalanx.benchmarks.lab.chaos.server import TEMPLATES, programs
from phalanx.engine.coordinator.text.template_processes import PROCESSES
from phalanx.engine.errors import ConfigError


def test_sixteen_requests_ask_for_everything_that_a_seam_may_break() -> None:
    asked = questions(8)
    assert len(asked) == 16
    assert {question.path for question in asked} == {CHAT, TEXT, RESPONSES, MESSAGES}
    assert {question.stream for question in asked} == {False, True}
    fields = {name for question in asked for name in question.body}
    wanted = {"n", "stop", "logprobs", "prompt_logprobs", "echo", "response_format", "structured_outputs", "tools"}
    assert wanted | {"tool_choice", "presence_penalty", "return_token_ids", "chat_template_kwargs", "seed"} <= fields


class _Process:
    def __init__(self, *words: str) -> None:
        self._words = words

    def cmdline(self) -> list[str]:
        return list(self._words)


def test_processes_for_templates_are_no_growth_up_to_their_bound() -> None:
    rank, template = _Process("python", "-m", "phalanx.launch.ranks.fork"), _Process("python", "-m", TEMPLATES)
    assert importlib.util.find_spec(TEMPLATES) is not None
    found = programs([rank, rank, template])
    assert found == {"processes of phalanx.launch.ranks.fork": 2, f"processes of {TEMPLATES}": PROCESSES}
    assert programs([template] * PROCESSES) == programs([])
    assert programs([template] * (PROCESSES + 1)) != programs([])


def _chunk(content: str | None = None, calls: Any = None, reason: str | None = None) -> dict[str, Any]:
    delta = {"content": content, "tool_calls": calls}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def test_a_stream_is_judged_by_what_it_adds_up_to() -> None:
    call = [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]
    more = [{"index": 0, "function": {"arguments": "{}"}}]
    one = [_chunk("He"), _chunk("llo"), _chunk(calls=call), _chunk(calls=more), _chunk(reason="stop")]
    other = [_chunk("Hello"), _chunk(calls=[{**call[0], "id": "b"}]), _chunk(calls=more), _chunk(reason="stop")]
    found, expected = (comparable(_folded(CHAT, json.loads(json.dumps(events)))) for events in (one, other))
    assert list(differences(found, expected)) == []
    [choice] = found["choices"]
    assert choice["delta"]["content"] == "Hello"
    assert choice["tool_calls"] == {0: {"type": "function", "function": {"name": "f", "arguments": "{}"}}}


@pytest.mark.parametrize(
    ("found", "expected", "verdict", "words"),
    [
        ({"a": [1.00001, "x"]}, {"a": [1.0, "x"]}, "same", ""),
        ({"a": [1.001]}, {"a": [1.0]}, "different", ".a[0]: 1.001 instead of 1.0"),
        ({"text": "to to be"}, {"text": "to be"}, "different", "from 0 on 'to to be' instead of 'to be'"),
        ({"a": 1}, {"a": 1, "b": 2}, "different", ".b is there only undisturbed"),
        ([1, 2], [1], "different", "[1, 2] instead of [1]"),
    ],
)
def test_a_token_that_is_missing_or_twice_is_a_difference(found: Any, expected: Any, verdict: str, words: str) -> None:
    asked = Asked(questions(8)[0], answer=found)
    got, why = judge(asked, expected)
    assert got == verdict
    assert words in why


def test_what_failed_is_lost_and_what_was_not_accepted_is_refused() -> None:
    question = questions(8)[0]
    assert judge(Asked(question, error="status 500"), None)[0] == "lost"
    assert judge(Asked(question, error="status 503", refused=True), None)[0] == "refused"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "calm"}, "mode='calm' is not one of chaos, kills"),
        ({"groups": "2,1"}, "groups='2,1' must be numbers of at least 2"),
        ({"mode": "beside"}, "vllm=None is no environment"),
        ({"model": "nowhere"}, "model='nowhere' is no folder"),
    ],
)
def test_what_cannot_be_run_is_named(values: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Options(**values).check()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [2, 3])
def test_requests_of_every_kind_outlive_each_rank(smollm2: Path, ranks: int, number: signal.Signals) -> None:
    result = disturb_group(smollm2, ranks, Plan(number, ranks, 24, 2.0, seed=4))
    assert (result["differences"], result["left_behind"]) == ([], [])
    assert result["same"] == 16 * ranks
    said = "is stopped: nothing has moved" if number is signal.SIGSTOP else "SIGKILL"
    for rank, row in enumerate(result["each"]):
        assert f"rank {rank} " in row["reason"], row
        assert said in row["reason"], row


@pytest.mark.slow
def test_a_minute_of_chaos_costs_nothing(smollm2: Path) -> None:
    options = Options(model=str(smollm2), seconds=40.0, fault_every_s=13.0, clients=4, max_tokens=24, seed=2)
    result = disturb(options)
    assert result["well"], result
    assert sum(result["faults"].values()) > 0
    assert result["restarts"] > 0


@pytest.mark.slow
def test_long_prefills_on_every_core_are_no_hang(smollm2: Path) -> None:
    result = disturb(Options(mode="saturation", model=str(smollm2), seconds=15.0, clients=4, step_timeout_s=2.0))
    assert result["well"], result
    assert result["prompts"] > 4
