"""Keywords of JSON Schema, of this draft and of others: each constrains as a validator says, or is refused by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import jsonschema_rs
import pytest
from phalanx import InvalidRequest, StructuredOutput
from phalanx.benchmarks.parts.json_schema_suite import accepts, texts_of
from phalanx.engine.constraints.compiler import GrammarCompiler
from phalanx.engine.constraints.formats import FORMATS
from phalanx.engine.constraints.patterns import from_ecma
from phalanx.engine.coordinator.tokenizer import Tokenizer
from pydantic import BaseModel, Field

VALUES: list[Any] = [
    None, True, 0, 1, 2, 3, 10, -1, 1.5, 0.1, "", "a", "b", "abc", "2024-01-31", [], [1], [1, 1], ["a"], ["a", 1],
    [1, "a"], [1, 2, 3], {}, {"a": 1}, {"a": "x"}, {"b": 1}, {"a": 1, "b": 2}, {"a": None}, {"kind": "a", "v": 1},
    {"kind": "b", "w": "s"}, {"kind": "a"},
]  # fmt: skip
KEPT: list[dict[str, Any]] = [
    {"type": "string", "nullable": True},  # OpenAPI's, which widens: an answer is valid by both readings
    {"definitions": {"x": {"type": "integer"}}, "$ref": "#/definitions/x"},
    {"$defs": {"x": {"type": "integer"}}, "$ref": "#/$defs/x", "minimum": 2, "description": "beside a reference"},
    {"$defs": {"x": {"$anchor": "y", "type": "integer"}}, "$ref": "#y"},
    {"$id": "http://x/y", "$defs": {"x": {"$id": "z", "type": "integer"}}, "$ref": "z"},
    {"type": "integer", "multipleOf": 2},
    {"type": "number", "multipleOf": 0.5},
    {"exclusiveMinimum": 1},
    {"exclusiveMaximum": 2.5},
    {"type": "integer", "minimum": 0.5, "maximum": 2.5},
    {"const": 1.5},
    {"const": {"a": 1}},
    {"enum": [1, "a", None, True, 1.5, {"a": 1}, [1]]},
    {"type": "string", "enum": ["a", 1]},
    {"const": "a", "enum": ["a", "b"]},
    {"additionalProperties": False, "patternProperties": {"^b": {}}},
    {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
    {"patternProperties": {"^a": {"type": "integer"}}},
    {"uniqueItems": True, "maxItems": 1},
    {"propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
    {"propertyNames": {"description": "any"}},
    {"propertyNames": {"type": "string", "enum": ["a", "c"]}, "additionalProperties": {"type": "integer"}},
    {"propertyNames": {"const": "b"}},
    {"propertyNames": {"enum": ["a"]}, "required": ["a"]},
    {"propertyNames": {"enum": ["a", "b"]}, "properties": {"a": {"type": "string"}, "v": {}}},
    {"propertyNames": {"pattern": "^[ak]"}, "additionalProperties": {"type": ["integer", "string"]}},
    {"propertyNames": {"pattern": "^a$"}, "properties": {"a": {"type": "integer"}, "b": {}}},
    {"minProperties": 1},
    {"minProperties": 1, "required": ["a"]},
    {"minProperties": 2, "required": ["a"], "properties": {"a": {}}},
    {"minProperties": 2, "required": ["a", "b"], "properties": {"a": {}, "b": {}}, "additionalProperties": False},
    {"maxProperties": 1, "additionalProperties": {"type": "integer"}},
    {"prefixItems": [{"type": "integer"}, {"type": "string"}]},
    {"prefixItems": [{"type": "integer"}], "items": False},
    {"type": "integer", "default": 3, "examples": [1], "x-order": 1, "title": "T", "deprecated": True, "$comment": ""},
    {"type": ["string", "null"]},
    {"minLength": 2, "maxLength": 3.0},
    {"pattern": "b$"},
    {"required": ["a"], "properties": {"a": False}},
    {"allOf": [{"required": ["a"]}, {"properties": {"a": {"type": "integer"}}}]},
    {"allOf": [{"pattern": "a"}, {"pattern": "c"}]},
    {"properties": {"a": {"type": "integer"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"type": "integer", "anyOf": [{"minimum": 3}, {"maximum": 1}]},
    {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {
        "discriminator": {"propertyName": "kind"},
        "oneOf": [
            {"type": "object", "properties": {"kind": {"type": "string", "const": name}}, "required": ["kind"]}
            for name in ("a", "b")
        ],
    },
    {"contentEncoding": "base64", "type": "string"},
    {"maxContains": 1, "then": {"minLength": 3}},
    {"type": "integer", "format": "int32"},
    {"type": "number", "format": "double"},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 1, "exclusiveMinimum": True},
    {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 2, "exclusiveMaximum": False},
    {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}], "additionalItems": False},
    {"$schema": "https://json-schema.org/draft/2019-09/schema", "items": [{"type": "integer"}, {"type": "string"}]},
]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"minProperties": 2}, "minProperties=2"),
    ({"items": {"required": ["a", "a"], "minProperties": 3}}, "items.minProperties=3"),
    *(({keyword: value}, keyword) for keyword, value in {
        "not": {"type": "string"}, "contains": {"const": 1}, "propertyNames": {"maxLength": 1}, "uniqueItems": True,
        "dependentRequired": {"a": ["b"]}, "dependencies": {"a": ["b"]}, "dependentSchemas": {"a": {"type": "null"}},
        "unevaluatedProperties": False, "unevaluatedItems": False, "extends": {"type": "string"}, "disallow": "string",
        "divisibleBy": 2, "$dynamicRef": "#a", "$recursiveRef": "#", "x-guidance": {},
    }.items()),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
    ({"properties": {"a": {"type": "integer", "required": True}}}, "properties.a.required must be a list"),
    ({"properties": {"a": {"format": "idn-hostname"}}}, "properties.a.format='idn-hostname' is not supported"),
    ({"$ref": "#/other", "other": {"type": "string"}}, "must point to a schema"),
    ({"$ref": "other.json"}, "not present"),
    ({"type": "any"}, "Invalid type"),
    ({"minProperties": 1, "properties": {"a": {}}}, "min/maxProperties"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"patternProperties": {"a": {"type": "integer"}, "o": {"type": "string"}}}, "not disjoint"),
    ({"pattern": "\\bword"}, "lookarounds not supported"),
    ({"properties": {"a": {"const": [{"b": 2**53 + 1}]}}}, "properties.a.const with 9007199254740993 is not supported"),
    ({"enum": [1, 1e300]}, "enum with 1e+300 is not supported"),
    ({"type": "integer", "minimum": 2**53 + 1}, "minimum=9007199254740993 is not supported"),
    ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum=9007199254740992 is not supported"),
    ({"type": "integer", "exclusiveMaximum": 1e16}, "exclusiveMaximum=10000000000000000 is not supported"),
]  # fmt: skip


class Address(BaseModel):
    street: str = Field(min_length=1, max_length=20)
    kind: Literal["home", "work"] = "home"


class Person(BaseModel):
    """As a client's own code writes it."""

    name: str
    age: int | None = Field(default=None, ge=0, lt=150)
    email: str = Field(json_schema_extra={"format": "email"})
    addresses: list[Address] = Field(max_length=2)
    scores: dict[str, float] = {}


ADA = {"name": "Ada", "age": 36, "email": "ada@example.com", "addresses": [{"street": "S", "kind": "work"}]}
ZOD: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        "at": {"type": "string", "format": "date", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"},
        "kind": {"anyOf": [{"type": "string", "const": "a"}, {"type": "null"}]},
    },
    "required": ["name", "age", "at", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.definition, tokenizer.size, 2)


def _takes(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, value: Any) -> bool:
    grammar = compiler.compile(StructuredOutput(json_schema=json.dumps(schema)))
    return any(accepts(grammar, tokenizer, text) for text in itertools.islice(texts_of(value), 24))


def test_keywords_that_are_let_in_constrain_as_a_validator_says(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    wrong = []
    for schema in KEPT:
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        for value in VALUES:
            if _takes(compiler, tokenizer, schema, value) != validator.is_valid(value):
                wrong.append((schema, value))
    assert wrong == []


def test_keywords_that_no_grammar_expresses_are_refused_by_name(compiler: GrammarCompiler) -> None:
    for schema, why in REFUSED:
        with pytest.raises(InvalidRequest) as raised:
            compiler.compile(StructuredOutput(json_schema=json.dumps(schema)))
        assert why in str(raised.value)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"const": 2**60}, [2**60], [2**60 + 1, 2**60 - 1]),
        ({"enum": [2**53, "a"]}, [2**53, "a"], [2**53 - 1]),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, [-(2**62), 0, 2**63 - 1], [2**63, -(2**64)]),
        ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [0, 2**62], [-1, 2**64]),
        ({"type": ["integer", "null"], "minimum": -(2.0**63)}, [-5, None], [-(2**64), "a"]),
    ],
)
def test_large_integers_are_kept_exactly(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: Any, right: list[Any], wrong: list[Any]
) -> None:
    assert [value for value in right if not _takes(compiler, tokenizer, schema, value)] == []
    assert [value for value in wrong if _takes(compiler, tokenizer, schema, value)] == []


def test_schemas_that_clients_libraries_write_are_kept(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    person = Person.model_json_schema()
    assert _takes(compiler, tokenizer, person, ADA)
    for change in ({"age": 150}, {"email": "ada"}, {"addresses": [{"street": ""}]}, {"scores": {"a": "b"}}):
        assert not _takes(compiler, tokenizer, person, {**ADA, **change})

    bob = {"name": "Bob", "age": 1, "at": "2024-02-29", "kind": None}
    assert _takes(compiler, tokenizer, ZOD, bob)
    for change in ({"name": ""}, {"at": "2023-02-29"}, {"kind": "b"}, {"more": 1}, {"age": 2**60}):
        assert not _takes(compiler, tokenizer, ZOD, {**bob, **change})


EXAMPLES: dict[str, tuple[list[str], list[str]]] = {
    "date": (["2024-02-29"], ["2023-02-29", "2024-2-9"]),
    "time": (["23:59:60Z", "15:59:60.5-08:00", "08:30:06z"], ["23:58:60Z", "24:00:00Z", "12:00:00"]),
    "date-time": (["2024-02-29T01:29:60+01:30", "1990-12-31t00:00:00z"], ["2023-02-29T00:00:00Z", "2024-02-28"]),
    "duration": (["P1Y2M3DT4H5M6S", "P3W", "PT0S"], ["P", "PT1D", "P1DT", "P1W2D"]),
    "email": (['"a b"@example.com', "a@[IPv6:::1]", "x.y@b"], ["a@", ".a@b.c", "a@b_c", "a" * 65 + "@b.c"]),
    "hostname": (["xn--4gbwdl.com", "1host"], ["-a", "a.", "a_b", "x" * 64]),
    "ipv4": (["192.168.0.1"], ["256.0.0.1", "01.2.3.4"]),
    "ipv6": (["::ffff:192.168.0.1", "1::8", "::"], ["1:2:3:4:5:6:7", "::1::", "12345::"]),
    "uri": (["http://a@b.c:80/d?e=f#g", "urn:a:b", "http://[::1]/"], ["/a", "http://a b", "http://2001:db8::1"]),
    "uri-reference": (["//a/b", "#c", ""], ["\\a", "#a\\b"]),
    "iri": (["http://ƒøø.ßår/?∂éœ=πîx#πîüx"], ["/âππ", "http:// "]),
    "iri-reference": (["/âππ", "#ƒrägmênt"], ["#ƒräg\\mênt"]),
    "uri-template": (["a/{b:1}/{?c*,d}"], ["a/{b", "}"]),
    "uuid": (["2eb8aa08-AA98-11ea-b4Aa-73b441D16380"], ["2eb8aa08-aa98-11ea-b4aa-73b441d1638"]),
    "json-pointer": (["", "/a~0/b~1/\"ä"], ["a", "/~2"]),
    "relative-json-pointer": (["0#", "12/a"], ["01", "-1/a", "/a"]),
}  # fmt: skip


def test_formats_are_asserted(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    assert EXAMPLES.keys() == FORMATS.keys()
    for name, (right, wrong) in EXAMPLES.items():
        assert [text for text in right if not _takes(compiler, tokenizer, {"format": name}, text)] == []
        assert [text for text in wrong if _takes(compiler, tokenizer, {"format": name}, text)] == []


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("^\\d\\w$", ["1a"], ["২a", "1é"]),
        ("^.$", ["a", "🙂"], ["\n", "\r", "\u2028"]),
        ("^\\s[^\\s]\\S$", [" ab", "\ufeffab"], ["  b", "a\ufeffb"]),
        ("^[a&&b]$", ["a", "&", "b"], ["c"]),
        ("^[[a~~]$", ["[", "a", "~"], ["]"]),
        ("^[^]\\cJ$", ["\r\n"], ["a"]),
        ("^\\[\\.[.\\]]$", ["[..", "[.]"], ["[.a"]),
        ("^\\x41\\u0042\\/$", ["AB/"], ["AB"]),
        ("^([]a]|b)$", ["b"], ["a", "]", "a]"]),  # a class of no characters, and then two
        ("^[+--]$", ["+", ",", "-"], ["."]),
        ("^[--/]$", ["-", ".", "/"], [","]),
        ("^[-a-c-]$", ["-", "a", "b"], ["d"]),
        ("^[a-\\d][\\w-.]$", ["a-", "-.", "1b"], ["ba", "a,"]),
        ("^[[]][^]]$", ["[]a]"], ["[]]", "[]a"]),
        ('^{"a": x{1}}$', ['{"a": x}'], ['{"a": x{1}}']),
        ("^\\<\\ud83d\\ude42\\>$", ["<🙂>"], ["🙂"]),
        ("^\\0[\\b]$", ["\0\b"], ["0b"]),
    ],
)
def test_patterns_are_read_as_ecma_262_has_them(
    compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not _takes(compiler, tokenizer, {"pattern": pattern}, text)] == []
    assert [text for text in wrong if _takes(compiler, tokenizer, {"pattern": pattern}, text)] == []
    assert from_ecma("plain [a-z]+ \\. (x|y)*$") == "plain [a-z]+ \\. (x|y)*$"
