"""Grammars of what requests give, followed token by token with the demo model's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phalanx import InvalidRequest, StructuredOutput
from phalanx.engine.constraints.compiler import CACHED, GrammarCompiler
from phalanx.engine.constraints.mask_thread import MaskThreads, no_token_left
from phalanx.engine.constraints.matcher import Beginning, Matcher
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.scheduling.step_plan import SlotSampling
from phalanx.serving.gateway.generation.tool_grammar import tool_grammar
from phalanx.serving.gateway.http.errors import ApiError

END, VOCAB = 2, 49152 + 7  # a vocabulary larger than the tokenizer's
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


TAG_OF_NO_TYPE = {
    "structures": [
        {"begin": "<a>", "schema": {"type": "object"}, "end": ""},
        {"begin": "<b>", "schema": {"properties": {"a": {"type": "colour"}}}, "end": ""},
    ],
    "triggers": ["<"],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.definition, VOCAB, END)


def allowed(matcher: Matcher) -> set[int] | None:
    words = matcher.allowed()
    if words is None:
        return None
    assert words.dtype == np.uint32
    assert len(words) == -(-VOCAB // 32)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, text: str) -> bool:
    matcher = compiler.compile(structured).matcher([END])
    for token in tokenizer.encode(text, special=False):
        tokens = allowed(matcher)
        if tokens is None or token not in tokens:
            return False
        matcher.advance(token)
    tokens = allowed(matcher)
    return matcher.finished or (tokens is not None and END in tokens)


def schema(value: object) -> StructuredOutput:
    return StructuredOutput(json_schema=json.dumps(value))


@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        (
            schema(PERSON),
            ['{"name":"Jo","age":3}', '{ "name": "Zoë 🙂", "age": 30 }', '{\n  "name": "",\n  "age": 0\n}'],
            ['{"age":3,"name":"Jo"}', '{"name":"Jo"}', '{"name":"Jo","age":-1}', "{}", '{"name":"Jo","age":3', "x"],
        ),
        (schema(True), ["1", '"a"', "[null]"], ["", "x"]),
        (schema({"type": "string", "format": "date"}), ['"2024-02-29"'], ['"2023-02-29"', '"2023-13-01"']),
        (schema({"type": "array", "uniqueItems": False, "maxItems": 2.0}), ["[1,1]"], ["[1,1,1]"]),
        (StructuredOutput(json_object=True), ['{"a": [1, {"b": null}]}', "{}"], ["[]", "1"]),
        (StructuredOutput(regex="[0-9]{2,3}x?"), ["12", "123x"], ["1", "1234", "x"]),
        (StructuredOutput(choice=("yes", 'né\n"🙂"')), ["yes", 'né\n"🙂"'], ["no", "ye"]),
        (StructuredOutput(grammar='start: "a" B?\nB: /[0-9]+/'), ["a", "a17"], ["b", "17"]),
        (
            StructuredOutput(grammar='start: "on " %json {"format": "date", "type": "string"} "."'),
            ['on "2024-02-29".'],
            ['on "2023-02-29".', "on 1."],
        ),
        (StructuredOutput(grammar='root ::= "a" b?\nb ::= [0-9]+'), ["a", "a17"], ["b", "17"]),
        (
            StructuredOutput(
                structural_tag=json.dumps(
                    {
                        "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
                        "triggers": ["<f"],
                    }
                )
            ),
            ["hello", "hi <f=a>12</f> and <f=a>3</f>"],
            ["hi <f=b>", "<f=a>x</f>", "<f=a>12"],
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, StructuredOutput) else "",
)
def test_a_matcher_lets_through_what_matches_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: Tokenizer, structured: StructuredOutput, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(compiler, tokenizer, structured, text)] == []
    assert [text for text in bad if accepts(compiler, tokenizer, structured, text)] == []


def test_white_space_of_json_ends(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for space in ("\n\n\n", "  ", "\n" + " " * 80):
        assert not accepts(compiler, tokenizer, schema(PERSON), f'{{{space}"name":"Jo","age":3}}')


@pytest.mark.parametrize(
    ("value", "path", "why"),
    [
        ({"properties": {"a": {"not": {}}}}, "properties.a.not", "not supported"),
        ({"items": {"if": {}, "then": {}}}, "items.if", "not supported"),
        ({"properties": {"a b": {"uniqueItems": True}}}, 'properties["a b"].uniqueItems', "not supported"),
        ({"properties": {"a": {"anyOf": [True, {"type": "strin"}]}}}, "properties.a.anyOf[1]", "Invalid type"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, "properties.a", "look-around"),
        ({"$defs": {"b": {"minLength": -1}}, "$ref": "#/$defs/b"}, "$defs.b", "minLength"),
        ({"properties": {"a": 3}}, "properties.a", "must be a schema"),
        ({"items": {"format": "poem"}}, "items.format='poem'", "is not supported: it must be one of date, "),
        ({"format": "regex"}, "format='regex'", "is not supported"),
        ({"format": "unknown"}, "format='unknown'", "is not supported"),
        ({"type": "number", "format": "int32"}, "format='int32'", 'is for {"type": "integer"} alone'),
        ({"$ref": "https://example.com/schema"}, "", "not present"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance", "not supported"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "", "oneOf"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_path(
    compiler: GrammarCompiler, value: object, path: str, why: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        compiler.compile(schema(value))
    assert str(raised.value).startswith(f"structured.json_schema{path and '.'}{path} ")
    assert why in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "json_object": True}, "exactly one"),
        ({"regex": 5}, "must be a text"),
        ({"choice": [1]}, "list of texts"),
        ({"choice": []}, "0 bytes"),
        ({"choice": ["a", ""]}, r"choice\[1\] is empty"),
        ({"choice": ["a" * 5000]}, "5000 characters"),
        ({"choice": ["a"] * 20_000}, "20000 texts"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a\ud800"}, "not valid Unicode"),
        ({"regex": "(" * 100 + ")" * 100}, "100 deep"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "start: start"}, "met by no text"),
        ({"grammar": "root ::= ("}, "no EBNF"),
        ({"grammar": 'start: %json {"not": {}}'}, r"grammar.%json.not is not supported"),
        ({"grammar": 'start: %json {"x-guidance": {"lenient": true}}'}, r"grammar.%json.x-guidance is not supported"),
        ({"grammar": 'start: %json {"type": }'}, "no JSON"),
        ({"json_schema": "{"}, "not JSON"),
        ({"json_schema": "[" * 100 + "]" * 100}, "nested"),
        ({"json_schema": '{"const": "\\ud800"}'}, "half of a surrogate pair"),
        ({"json_schema": "false"}, "Unsatisfiable"),
        ({"json_schema": '{"$ref": "#"}'}, "met by no text"),
        ({"structural_tag": "{}"}, "structures must be a list"),
        ({"structural_tag": '{"structures": [{"begin": "a", "end": ""}], "triggers": ["b"]}'}, "begins with none"),
        ({"structural_tag": json.dumps(TAG_OF_NO_TYPE)}, r"structures\[1\]\.schema\.properties\.a cannot be made"),
    ],
)
def test_what_is_no_grammar_is_refused(compiler: GrammarCompiler, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        compiler.compile(StructuredOutput(**fields))


def test_the_ends_are_the_requests_own(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    [seven, x] = tokenizer.encode("7", special=False) + tokenizer.encode("x", special=False)
    grammar = compiler.compile(StructuredOutput(regex="[0-9]{1,2}"))

    # With ignore_eos there is none; a stop token that is no text of the grammar is allowed only at the end.
    for ends in ((), (0, 5), (x,)):
        matcher = grammar.matcher(ends)
        first = allowed(matcher)
        assert first is not None
        assert not first & {END, 0, 5, x}
        assert not matcher.advance(seven)
        assert allowed(matcher) == first | set(ends)

    # After the last digit nothing can follow: the answer is complete, whether it has an end token or not.
    for ends in ((), (END,)):
        matcher = grammar.matcher(ends)
        matcher.advance(seven)
        matcher.advance(seven)
        assert matcher.allowed() is None
        assert matcher.finished


def test_a_grammar_waits_for_the_end_of_thinking(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    opens, ends, other = 3, 4, 1000
    [yes] = tokenizer.encode("yes", special=False)
    grammar = compiler.compile(StructuredOutput(choice=("yes",)))

    open_already = grammar.matcher((END,), Beginning(after=ends, open=True))
    for token in (other, opens, END):
        assert (open_already.active, open_already.allowed()) == (False, None)
        open_already.advance(token)
    open_already.advance(ends)
    assert open_already.active
    assert yes in (allowed(open_already) or ())

    may_open = grammar.matcher((END,), Beginning(after=ends, opens=opens))
    first = allowed(may_open)
    assert first is not None
    assert {opens, yes} <= first
    assert other not in first
    may_open.advance(opens)
    assert not may_open.active
    may_open.advance(ends)
    assert opens not in (allowed(may_open) or ())
    assert may_open.advance(yes)


def test_completions_of_one_grammar_do_not_know_of_each_other(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    grammar = compiler.compile(StructuredOutput(choice=("yes", "no")))
    [yes], [no] = tokenizer.encode("yes", special=False), tokenizer.encode("no", special=False)
    first, second = grammar.matcher((END,)), grammar.matcher((END,))
    assert first.advance(yes)
    assert not second.finished
    assert second.advance(no)
    third = grammar.matcher(())
    masks = MaskThreads()
    masks.begin([third])
    while not all(masks.collect([None, first, third])):
        pass
    masks.close()
    assert (first.mask, third.mask) == (b"", grammar_mask(grammar.matcher(())))


def grammar_mask(matcher: Matcher) -> bytes:
    words = matcher.allowed()
    assert words is not None
    return words.tobytes()


def test_a_token_that_does_not_match_fails_the_answer(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(StructuredOutput(choice=("yes",))).matcher((END,))
    assert not matcher.advance(1000)
    assert matcher.failure
    assert matcher.allowed() is None


def test_compiled_grammars_are_kept_within_bounds(compiler: GrammarCompiler) -> None:
    same = StructuredOutput(regex="kept")
    assert compiler.compile(same) is compiler.compile(StructuredOutput(regex="kept"))
    for number in range(CACHED + 1):
        compiler.compile(StructuredOutput(choice=(f"other {number}",)))
    assert len(compiler._kept) == CACHED
    assert same not in compiler._kept


def test_why_no_token_is_left_is_said() -> None:
    mask = np.array([0b1110], dtype=np.uint32).tobytes()  # tokens 1, 2, 3
    assert no_token_left(SlotSampling(), mask, []) is None
    assert no_token_left(SlotSampling(allowed_token_ids=(3, 9)), mask, []) is None
    assert "allowed_token_ids forbids" in (no_token_left(SlotSampling(allowed_token_ids=(9,)), mask, []) or "")
    words = SlotSampling(bad_words=((1,), (7, 2), (3,)))
    assert no_token_left(words, mask, [8]) is None
    assert "bad_words forbids" in (no_token_left(words, mask, [7]) or "")
    early = SlotSampling(min_tokens=2, end_token_ids=(1, 2, 3))
    assert "min_tokens forbids" in (no_token_left(early, mask, [7]) or "")
    assert no_token_left(early, mask, [7, 7]) is None
    assert "leaves no token" in (no_token_left(SlotSampling(), bytes(4), []) or "")


LOOK = {
    "type": "function",
    "function": {
        "name": "look up",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "n": {"$ref": "#/$defs/n"}},
            "required": ["city"],
            "$defs": {"n": {"type": "integer"}},
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def test_the_grammar_of_calls_lets_calls_through_alone(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    look = '<tool_call>\n{"name": "look up", "arguments": {"city": "a </tool_call> \\" b", "n": 3}}\n</tool_call>'
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    several, one = tool_grammar([LOOK, NOW]), tool_grammar([LOOK, NOW], parallel=False)
    named = tool_grammar([LOOK, NOW], ["now"])
    for text in (look, now):
        assert accepts(compiler, tokenizer, several, text)
        assert accepts(compiler, tokenizer, one, text)
        assert accepts(compiler, tokenizer, named, text) == (text == now)
    assert accepts(compiler, tokenizer, several, f"{look}\n{now}")
    assert not accepts(compiler, tokenizer, one, f"{look}\n{now}")
    for text in ("hi", now.replace("{}", '{"a": 1}'), now.replace("now", "then"), look.replace("3", '"x"')):
        assert not accepts(compiler, tokenizer, several, text)


def test_tools_that_cannot_be_called_are_refused(compiler: GrammarCompiler) -> None:
    for tools, names in (([], None), ([LOOK], ["other"]), ([{"type": "function"}], None)):
        with pytest.raises(ApiError):
            tool_grammar(tools, names)  # type: ignore[arg-type]
    bad = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(InvalidRequest, match=r"structures\[0\].schema.properties.a.not"):
        compiler.compile(tool_grammar([bad]))


def test_an_answer_that_spends_the_lexer_it_shares_hurts_no_other(compiler: GrammarCompiler) -> None:
    greedy = StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}")
    grammar = compiler.compile(greedy)

    def follow(matcher: Matcher) -> list[int]:
        """Tokens of an answer that goes on as long as it may."""
        chance, taken = np.random.default_rng(0), []
        while len(taken) < 50 and (tokens := allowed(matcher)) is not None:
            taken.append(int(chance.choice(sorted(tokens - {END}))))
            matcher.advance(taken[-1])
        return taken

    first, second = grammar.matcher((END,)), grammar.matcher((END,))
    taken = follow(first)
    assert grammar.spent
    assert first.failure is not None
    assert "too complex to be followed" in first.failure
    assert follow(second) == taken  # with the lexer of its own that it got, for the shared one lets nothing through
    assert compiler.compile(greedy) is not grammar

    # So it is on the threads that make masks.
    third = grammar.matcher((END,))
    masks = MaskThreads()
    for token in taken[:3]:
        third.advance(token)
        masks.begin([third])
        while not all(masks.collect([third])):
            pass
        assert third.failure is None
        assert third.mask
    masks.close()
