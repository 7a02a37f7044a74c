"""Grammars made to hurt: refused, or compiled within bounds; and the official suite of JSON Schema, where it is."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from phalanx import InvalidRequest, StructuredOutput
from phalanx.benchmarks.parts.json_schema_suite import run_suite
from phalanx.engine.constraints.compiler import GrammarCompiler
from phalanx.engine.coordinator.tokenizer import Tokenizer

SUITE = os.environ.get("JSON_SCHEMA_SUITE", "")
"""The folder draft2020-12 of the suite's tests."""

PROPERTY = {"type": "string", "description": "x" * 50}
BRANCHES = [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(4)]
HURTFUL: dict[str, tuple[dict[str, Any], str | None]] = {
    "exponential intersections": ({"json_schema": json.dumps({"allOf": [{"anyOf": BRANCHES}] * 20})}, "too large"),
    "exponential references": (
        {
            "json_schema": json.dumps(
                {
                    "$defs": {"d20": {"type": "string"}}
                    | {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(20)},
                    "$ref": "#/$defs/d0",
                }
            )
        },
        None,
    ),
    "a megabyte": (
        {"json_schema": json.dumps({"properties": {f"property_{i}": PROPERTY for i in range(10_000)}})},
        "bytes; it must have",
    ),
    "3,000 properties": (
        {"json_schema": json.dumps({"properties": {f"p{i}": {"type": "null"} for i in range(3000)}})},
        "one too many",
    ),
    "10,000 values": ({"json_schema": json.dumps({"enum": [f"value number {i}" for i in range(10_000)]})}, None),
    "10,000 choices": ({"choice": [f"choice {i * 7919}" for i in range(10_000)]}, None),
    "deep": ({"json_schema": '{"items":' * 5000 + "true" + "}" * 5000}, "deep"),
    "a long pattern": ({"json_schema": json.dumps({"pattern": "a?" * 5000})}, "10000 characters"),
    "counts within counts": ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, None),
    "catastrophic": ({"regex": "(x+x+)+y|(a|aa)+$|([a-zA-Z]+)*Z"}, None),
    "many optional letters": ({"regex": "a?" * 1300 + "a" * 1300}, "lexer"),
    "a long expression in a grammar": ({"grammar": "start: /" + "a?" * 10_000 + "/"}, "a line of"),
    "doubling terminals": (
        {"grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(30)) + '\nT30: "x"?'},
        "too big",
    ),
    "ambiguous": ({"grammar": 'start: a\na: a a | a a a | "x" | "xx"'}, None),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    made = GrammarCompiler(tokenizer.definition, tokenizer.size, 2)
    made.prepare()
    return made


@pytest.mark.parametrize("name", HURTFUL)
def test_what_is_made_to_hurt_is_refused_or_bounded(compiler: GrammarCompiler, name: str) -> None:
    fields, why = HURTFUL[name]
    before = time.thread_time()
    if why is None:
        compiler.compile(StructuredOutput(**fields))
    else:
        with pytest.raises(InvalidRequest, match=why):
            compiler.compile(StructuredOutput(**fields))
    assert time.thread_time() - before < 20  # a bound against hanging: it takes less than two seconds


def test_an_answer_whose_grammar_becomes_too_complex_fails_by_itself(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}")).matcher([2])
    [token] = tokenizer.encode("a", special=False)
    for _ in range(200):
        if matcher.allowed() is None:
            break
        matcher.advance(token)
    assert matcher.failure is None or "tokens of the answer" in matcher.failure


@pytest.mark.slow
@pytest.mark.skipif(not SUITE, reason="JSON_SCHEMA_SUITE names no folder of the JSON-Schema test suite")
def test_the_official_suites_schemas_constrain_rightly_or_are_refused(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    verdict = run_suite(Path(SUITE), tokenizer, compiler)
    # Formats are narrower than the standard's: they are enforced, and write no leap second, quoted name or mixed IPv6.
    formats = ("format:", "date-time:", "time:", "email:", "ipv6:")
    assert [line for line in verdict.wrong if ": not accepted:" not in line or not line.startswith(formats)] == []
    assert verdict.right > 170
    assert all(": structured.json_schema" in line for line in verdict.refused)
