"""Answers at temperature 1 of a random model, by schemas that hypothesis makes: each that ends is valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phalanx import LLM, InvalidRequest, SamplingParams, StructuredOutput
from phalanx.engine.protocol.messages import Finished
from phalanx.tests.engine.conftest import CONFIG

NAMES = st.sampled_from(["a", "b", "name", "x y", "ä", 'q"'])
FORMATS = ["date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "json-pointer", "duration"]
PATTERNS = ["^[a-c]{2,4}$", "^.$", "^\\d+\\s[^x]$", "^(ab?)*c$"]
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.sampled_from(["", "yes", "né\n", 1.5, -0.25]))


@st.composite
def texts(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["length", "pattern", "format"]))
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": draw(st.sampled_from(["^[a-c]{2,4}$", "^.$", "^\\d+\\s[^x]$", "^(ab?)*c$"])),
        }
    if kind == "format":
        return {"type": "string", "format": draw(st.sampled_from(FORMATS)), "maxLength": 60}
    least = draw(st.integers(0, 3))
    return {"type": "string", "minLength": least, "maxLength": least + draw(st.integers(0, 4))}


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    least = draw(st.integers(-500, 500))
    bounds = {
        draw(st.sampled_from(["minimum", "exclusiveMinimum"])): least,
        "maximum": least + draw(st.integers(2, 99)),
    }
    multiple = draw(st.sampled_from([{}, {"multipleOf": 2}]))
    return {"type": draw(st.sampled_from(["integer", "number"])), **bounds, **multiple}


@st.composite
def lists(draw: st.DrawFn, items: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    first = draw(st.lists(items, max_size=2))
    least = draw(st.integers(0, 2))
    made = {"type": "array", "items": draw(items), "minItems": least, "maxItems": least + draw(st.integers(0, 3))}
    return {**made, "prefixItems": first} if first else made


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


LEAVES = st.one_of(
    texts(),
    numbers(),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, VALUES),
    st.just({"type": ["boolean", "null"]}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        lists(below),
        objects(below),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(below, min_size=1, max_size=3)),
        st.builds(lambda part: {"$defs": {"part": part}, "items": {"$ref": "#/$defs/part"}, "maxItems": 2}, LEAVES),
    ),
    max_leaves=5,
)


def check_answers(llm: LLM, schemas: list[dict[str, Any]], seed: int) -> int:
    """Answer all schemas at once. Returns how many answers ended; all of these are valid."""
    handles = []
    for i, schema in enumerate(schemas):
        sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=seed + i, max_tokens=200)
        form = StructuredOutput(json_schema=json.dumps(schema))
        handles.append(llm.stream([5 + i, 6], sampling=sampling, structured=form))

    ended = 0
    for schema, handle in zip(schemas, handles, strict=True):
        text, reason = "", None
        try:
            for event in handle:
                text += getattr(event, "text", "")
                if isinstance(event, Finished):
                    reason = event.completions[0].finish_reason
        except InvalidRequest:  # a schema that is refused
            continue
        if reason == "stop":
            ended += 1
            validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
            assert validator.is_valid(json.loads(text)), (schema, text)
    return ended


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas=st.lists(SCHEMAS, min_size=6, max_size=10))
def test_answers_are_valid_by_the_schemas_that_hypothesis_makes(llm: LLM, schemas: list[dict[str, Any]]) -> None:
    check_answers(llm, schemas, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_answers_are_valid_at_any_number_of_ranks(tiny: Path, ranks: int) -> None:
    ended = 0
    with LLM(str(tiny), ranks=ranks, **CONFIG) as llm:

        @settings(max_examples=25, deadline=None, derandomize=True)
        @given(schemas=st.lists(SCHEMAS, min_size=8, max_size=16))
        def check(schemas: list[dict[str, Any]]) -> None:
            nonlocal ended
            ended += check_answers(llm, schemas, seed=100 * ranks)

        check()
    assert ended > 100
