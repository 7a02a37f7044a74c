"""Answers that match a grammar: whatever else is asked for, beside any neighbours, at any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, InvalidRequest, SamplingParams, StructuredOutput
from phalanx.engine.client.requests import RequestOutput
from phalanx.tests.engine.conftest import CONFIG

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = StructuredOutput(json_schema=json.dumps(PERSON))
DIGITS = StructuredOutput(regex="[0-9]{3,6}")
GREEDY = SamplingParams(temperature=0, max_tokens=200)


def _is_person(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    return len(value["name"]) <= 8 and 0 <= value["age"] <= 150 and set(value["tags"]) <= {"a", "b"}


def _texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_answers_match_their_schemas_beside_others_that_have_none(llm: LLM) -> None:
    prompts = [[5, 6, 7], [8, 9], [10], [11, 12]]
    forms = [SCHEMA, None, DIGITS, None]
    alone = [llm.generate([prompt], GREEDY)[0] for prompt in (prompts[1], prompts[3])]
    outputs = llm.generate(prompts, GREEDY, forms)
    assert _is_person(outputs[0].outputs[0].text)
    assert outputs[0].outputs[0].finish_reason == "stop"
    assert outputs[2].outputs[0].text.isdigit()
    assert [outputs[1].outputs[0].token_ids, outputs[3].outputs[0].token_ids] == [
        output.outputs[0].token_ids for output in alone
    ]


def test_each_completion_has_a_place_of_its_own_in_the_grammar(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=3, n=4, max_tokens=120)
    [output] = llm.generate([[5, 6, 7]], sampling, SCHEMA)
    texts = [one.text for one in output.outputs if one.finish_reason == "stop"]
    assert len(set(texts)) > 1
    assert all(map(_is_person, texts))


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_answers_go_on_where_they_were_with_overlap_and_without(tiny: Path, llm: LLM, overlap: bool) -> None:
    prompts = [[5 + i, 6, 7, 8, 9, 10, 11, 12] for i in range(6)]
    samplings = [SamplingParams(temperature=1.0, seed=i, max_tokens=100) for i in range(6)]
    forms = [SCHEMA, DIGITS, None, SCHEMA, StructuredOutput(json_object=True), SCHEMA]
    expected = llm.generate(prompts, samplings, forms)
    config: dict[str, Any] = {**CONFIG, "block_size": 4, "max_model_len": 128, "kv_memory": 40 * 2048}
    with LLM(str(tiny), overlap=overlap, **config) as small:
        outputs = small.generate(prompts, samplings, forms)
        assert small.status().preemptions > 0
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert [o.outputs[0].finish_reason for o in outputs] == [o.outputs[0].finish_reason for o in expected]


def test_the_other_fields_that_forbid_tokens_hold_too(llm: LLM) -> None:
    def answer(**fields: Any) -> Any:
        return llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=20, **fields), DIGITS)[0].outputs[0]

    plain = answer()
    first = plain.text[0]
    assert plain.finish_reason == "stop"
    assert len(answer(min_tokens=6).token_ids) == 6
    assert answer(ignore_eos=True).text.isdigit()
    assert answer(ignore_eos=True).finish_reason == "stop"
    without = answer(bad_words=[first])
    assert without.text.isdigit()
    assert first not in without.text
    [zero] = _token_ids(llm, "0")
    assert set(answer(allowed_token_ids=[zero]).text) == {"0"}
    assert set(answer(logit_bias={zero: 100}).text) == {"0"}
    # A stop token that the grammar allows as text ends the answer there, as a stop string does.
    stopped = answer(logit_bias={zero: 100}, stop_token_ids=[zero])
    assert (stopped.text, stopped.stop_reason) == ("", zero)


def _token_ids(llm: LLM, text: str) -> list[int]:
    answer = llm.generate([text], SamplingParams(max_tokens=1))[0]
    return answer.prompt_token_ids


def test_a_row_that_has_no_token_left_says_so_and_no_other_fails(llm: LLM) -> None:
    [letter] = _token_ids(llm, "x")
    submits = [
        (DIGITS, {"allowed_token_ids": [letter]}, "allowed_token_ids forbids"),
        (StructuredOutput(regex="("), {}, "unclosed group"),
        (StructuredOutput(json_schema='{"properties": {"a": {"not": {}}}}'), {}, "properties.a.not"),
    ]
    neighbour = llm.stream([7, 8], sampling=GREEDY)
    for form, fields, why in submits:
        with pytest.raises(InvalidRequest, match=why):
            llm.generate([[5, 6]], SamplingParams(temperature=0, **fields), form)
    text = "".join(getattr(event, "text", "") for event in neighbour)
    assert text == llm.generate([[7, 8]], GREEDY)[0].outputs[0].text


def test_raw_logprobs_are_the_models_and_processed_ones_the_grammars(llm: LLM) -> None:
    choice = StructuredOutput(choice=("0", "1"))

    def entry(mode: str) -> Any:
        sampling = SamplingParams(temperature=1.0, seed=1, logprobs=5, logprobs_mode=mode, max_tokens=3)
        [output] = llm.generate([[5, 6]], sampling, choice)
        assert output.outputs[0].logprobs is not None
        return output.outputs[0].logprobs[0]

    raw, processed = entry("raw"), entry("processed")
    assert raw.token_id == processed.token_id
    assert len(raw.top_token_ids) == 5
    assert len(processed.top_token_ids) == 2
    assert processed.logprob > raw.logprob


def test_what_is_no_structured_output_is_refused(llm: LLM) -> None:
    for wrong in ({"regex": "a"}, [DIGITS, DIGITS]):
        with pytest.raises(InvalidRequest, match="structured"):
            llm.generate([[5, 6]], GREEDY, wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def at_one_rank(smollm2: Path) -> Callable[[int], list[str]]:
    def texts(ranks: int) -> list[str]:
        config: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "kv_memory": 2**27}
        prompts = ["A person as JSON:", "Count:", "The city of France is", "Once upon a time"]
        forms = [SCHEMA, DIGITS, StructuredOutput(choice=("Paris", "London")), StructuredOutput(json_object=True)]
        with LLM(str(smollm2), ranks=ranks, **config) as llm:
            return _texts(llm.generate(prompts, GREEDY, forms))

    return texts


@pytest.mark.slow
def test_constrained_greedy_text_is_the_same_at_1_2_and_3_ranks(at_one_rank: Callable[[int], list[str]]) -> None:
    expected = at_one_rank(1)
    assert _is_person(expected[0])
    assert expected[2] == "Paris"
    assert [at_one_rank(ranks) for ranks in (2, 3)] == [expected, expected]
