"""Regexes, schemas and grammars: compiled within bounds or refused, and followed within bounds."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from phalanx.engine.constraints.compiler import GrammarCompiler
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.errors import InvalidRequest
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.tests.fuzz.bounds import check_message, in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import tiny_model

STEPS = 12
COMPILE_S = 2.0
"""Seconds of CPU that compiling may take, as engine/constraints/compiler.py bounds it."""
REGEX = (
    "a", "b", ".", "\\d", "\\w", "\\s", "[a-z]", "[^a]", "\\p{L}", "(", ")", "(?:", "(?i)", "|", "*", "+", "?",
    "{2}", "{0,9}",
    "{1,1000}", "{999,1000}", "^", "$", "\\b", "(?=a)", "\\1", "\\u{1F600}", "[[:alpha:]]", "&&", "x*",
    "(a|aa)+", "(.*)*",
)  # fmt: skip
LARK = (
    "start: ", "a: ", "b: ", "T: ", "a", "b", "T", "start", ' "x" ', " /a+/ ", " | ", "*", "+", "?", "(", ")",
    "[", "]", "~3", "~1..5",
    "\n", "%ignore ", "%import common.INT\n", "%json {} ", "%regex {} ", "root ::= ", "::=", "a ::= ", "[a-z]",
    " 'y' ", '""', "<[^1]>",
    "start: a\na: a a | \"x\"\n", "[lazy]", "[max_tokens=3]", "[capture]", "TEXT: /(.|\\n)*/\n",
)  # fmt: skip
SCHEMA_WORDS = (
    "type", "object", "array", "string", "integer", "number", "boolean", "null", "properties", "required",
    "items", "enum",
    "const", "anyOf", "oneOf", "allOf", "$ref", "#", "#/$defs/a", "$defs", "a", "b", "pattern", "a+",
    "(a|aa)+$", "format",
    "date-time", "email", "uri", "uuid", "ipv6", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "minLength",
    "maxLength", "minItems", "maxItems", "prefixItems", "additionalProperties", "patternProperties", "not",
    "if", "then",
    "description", "$id", "$schema", "$anchor", "definitions", "minProperties",
)  # fmt: skip
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]},
    {"$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
    {"type": "array", "items": {"enum": ["a", 1, None]}, "minItems": 1, "maxItems": 3},
    {"type": "string", "pattern": "^a{2,9}$", "maxLength": 9},
    {"allOf": [{"type": "number", "minimum": 0.5}, {"multipleOf": 0.25}]},
)
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMAS[0], "end": "</f>"}], "triggers": ["<f"]}


@cache
def _compiler() -> GrammarCompiler:
    tokenizer = Tokenizer(tiny_model())
    return GrammarCompiler(tokenizer.definition, 1031, tokenizer.eos_token_id)


def fuzz_one(data: bytes) -> None:
    """Compile what a request gives, and go some tokens along it."""
    choices = Choices(data)
    _compiler().prepare()
    try:
        structured = StructuredOutput(**_given(choices))
        with in_time(COMPILE_S):
            grammar = _compiler().compile(structured)
    except InvalidRequest as error:
        check_message(error)
        return

    matcher = grammar.matcher((258,))
    with in_time():
        for _ in range(STEPS):
            words = matcher.allowed()
            if words is None:
                return
            allowed = [word * 32 + bit for word in range(len(words)) for bit in range(32) if words[word] >> bit & 1]
            if not allowed:
                return  # the step says why the answer cannot go on (mask_thread.no_token_left)
            assert max(allowed) < 1031
            token = choices.pick(allowed)
            if token == 258:
                return
            matcher.advance(token)


def _given(choices: Choices) -> dict[str, Any]:
    kind = choices.number(8)
    if kind < 2:
        return {"regex": "".join(choices.pick(REGEX) for _ in range(choices.number(40)))}
    if kind == 2:
        return {"regex": choices.rest().decode(errors="replace")}
    if kind < 5:
        schema: Any = choices.pick(SCHEMAS)
        for _ in range(choices.number(5)):
            schema = choices.changed(schema, SCHEMA_WORDS)
        return {"json_schema": json.dumps(schema)}
    if kind == 5:
        return {"grammar": "".join(choices.pick(LARK) for _ in range(choices.number(40)))}
    if kind == 6:
        return {"choice": tuple(choices.text(("a", "ab", "<|im_end|>")) for _ in range(choices.number(20)))}
    return {
        "structural_tag": json.dumps(
            choices.changed(TAG, ("structures", "begin", "schema", "end", "<f>", "alone", "one"))
        )
    }
