"""Schemas, expressions and grammars made to hurt, by name: what a StructuredOutput holds, and a part of the reason why
it is refused; None if it is compiled within bounds."""

from __future__ import annotations

import json
from typing import Any


def _schema(value: Any) -> dict[str, Any]:
    return {"json_schema": json.dumps(value)}


def _chain(length: int, last: Any, link: Any = None) -> dict[str, Any]:
    """Definitions each of which refers to the next one, by `link` times the reference."""
    definitions: dict[str, Any] = {f"d{length}": last}
    for i in range(length):
        reference = {"$ref": f"#/$defs/d{i + 1}"}
        definitions[f"d{i}"] = reference if link is None else link(reference)
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


def _nested(depth: int, key: str = "items", last: str = "true") -> str:
    return f'{{"{key}":' * depth + last + "}" * depth


PROPERTY = {"type": "string", "description": "x" * 50}
OPTIONAL = {f"optional {i}": {"type": "string"} for i in range(1500)}
BRANCHES = [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(4)]
CROSSED = {"allOf": [{"anyOf": [{"pattern": f"^.*a.{{{i}}}b"}, {"pattern": f"^.*c.{{{i}}}d"}]} for i in range(20)]}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {name: {"$ref": "#/$defs/node"} for name in ("left", "right", "up", "down")},
            "additionalProperties": {"$ref": "#/$defs/node"},
        }
    },
    "$ref": "#/$defs/node",
}
TAGS = [{"begin": f"<f{i}>", "schema": {"type": "object"}, "end": f"</f{i}>"} for i in range(1000)]

SCHEMAS: dict[str, tuple[dict[str, Any], str | None]] = {
    "exponential intersections": (_schema({"allOf": [{"anyOf": BRANCHES}] * 20}), "too large"),
    "2^20 choices of strings": (_schema(CROSSED), "at once"),
    "exponential references": (_schema(_chain(20, {"type": "string"}, lambda ref: {"allOf": [ref] * 2})), None),
    "exponential choices": (_schema(_chain(20, {"type": "string"}, lambda ref: {"anyOf": [ref] * 4})), None),
    "exponential properties": (
        _schema(_chain(40, {"type": "string"}, lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}})),
        None,
    ),
    "exponential lists": (_schema(_chain(40, {"type": "null"}, lambda ref: {"prefixItems": [ref] * 8})), None),
    "a long chain of references": (_schema(_chain(5000, {"type": "string"})), "at most 2000 are allowed"),
    "a long chain of properties": (
        _schema(_chain(1500, {"type": "string"}, lambda ref: {"properties": {"a": ref}, "required": ["a"]})),
        "at most 2000 are allowed",
    ),
    "a long chain of anchors": (
        _schema({"$defs": {f"d{i}": {"$anchor": f"a{i}", "$ref": f"#a{i + 1}"} for i in range(2000)}, "$ref": "#a0"}),
        "at most 2000 are allowed",
    ),
    "a chain of properties": (
        _schema(_chain(600, {"type": "string"}, lambda ref: {"properties": {"a": ref}, "required": ["a"]})),
        None,
    ),
    "a chain of lists": (_schema(_chain(900, {"type": "string"}, lambda ref: {"items": ref})), None),
    "a chain of intersections": (_schema(_chain(600, {"type": "string"}, lambda ref: {"allOf": [ref]})), None),
    "a cycle of references": (
        _schema({"$defs": {f"d{i}": {"$ref": f"#/$defs/d{(i + 1) % 50}"} for i in range(50)}, "$ref": "#/$defs/d0"}),
        "cannot be made a grammar|is met by no text",
    ),
    "a cycle of intersections": (
        _schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
        "cannot be made a grammar|is met by no text",
    ),
    "a tree without end": (_schema(TREE), None),
    "a tree that must have no end": (
        _schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        None,
    ),
    "a megabyte": (
        _schema({"properties": {f"property_{i}": PROPERTY for i in range(10_000)}}),
        "bytes; it must have",
    ),
    "3,000 properties": (_schema({"properties": {f"p{i}": {"type": "null"} for i in range(3000)}}), "one too many"),
    "1,500 optional properties": (_schema({"properties": OPTIONAL, "additionalProperties": False}), None),
    "1,500 required properties": (_schema({"properties": OPTIONAL, "required": list(OPTIONAL)}), None),
    "10,000 required names": (_schema({"required": [f"r{i}" for i in range(10_000)]}), "one too many"),
    "100 patternProperties": (
        _schema({"patternProperties": {f"^p{i}x*": {"type": "null"} for i in range(100)}}),
        "one too many",
    ),
    "60 patternProperties that overlap": (
        _schema({"patternProperties": {f"^(a|b)*a(a|b){{{i}}}$": {"type": "null"} for i in range(60)}}),
        "disjoint|cannot be made a grammar",
    ),
    "60 patternProperties": (
        _schema({"patternProperties": {f"^p{i:02}[a-z]*$": {"type": "null"} for i in range(60)}}),
        None,
    ),
    "10,000 values": (_schema({"enum": [f"value number {i}" for i in range(10_000)]}), None),
    "10,000 numbers": (_schema({"enum": [i * 7919 for i in range(10_000)]}), None),
    "5,000 objects": (_schema({"enum": [{"a": i, "b": [i]} for i in range(5000)]}), "one too many"),
    "60 intersections of values": (
        _schema({"allOf": [{"enum": list(range(i, i + 100))} for i in range(60)]}),
        "schema too large",
    ),
    "1,000 oneOf": (_schema({"oneOf": [{"const": f"c{i}"} for i in range(1000)]}), None),
    "5,000 oneOf": (_schema({"oneOf": [{"const": f"c{i}"} for i in range(5000)]}), None),
    "5,000 anyOf": (_schema({"anyOf": [{"const": f"c{i}"} for i in range(5000)]}), None),
    "deep": ({"json_schema": _nested(5000)}, "deep"),
    "60 deep": ({"json_schema": _nested(60)}, None),
    "a million items": (_schema({"type": "array", "items": {"type": "null"}, "minItems": 10**6}), None),
    "a million items of a kind": (_schema({"type": "array", "maxItems": 10**6, "items": {"type": "integer"}}), None),
    "lists of lists": (
        _schema(
            {
                "type": "array",
                "minItems": 1000,
                "maxItems": 10**6,
                "items": {"type": "array", "minItems": 10**5, "items": {"type": "array", "maxItems": 10**6}},
            }
        ),
        None,
    ),
    "a million letters": (_schema({"type": "string", "minLength": 10**6}), None),
    "at most a million letters": (_schema({"type": "string", "maxLength": 10**6}), None),
    "10^18 letters": (_schema({"type": "string", "minLength": 10**18}), "cannot be made a grammar"),
    "10^18 items": (_schema({"type": "array", "minItems": 10**18}), None),
    "a million properties": (
        _schema({"type": "object", "minProperties": 10**6, "additionalProperties": {"type": "null"}}),
        "minProperties=1000000",
    ),
    "30 patterns at once": (_schema({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(30)]}), "at once"),
    "30 patterns at once by references": (
        _schema(
            {
                "$defs": {"d30": {"type": "string"}}
                | {f"d{i}": {"pattern": f"a.{{{i}}}b", "$ref": f"#/$defs/d{i + 1}"} for i in range(30)},
                "items": {"$ref": "#/$defs/d0"},
            }
        ),
        "at once",
    ),
    "30 patterns at once by anchors": (
        _schema(
            {
                "$defs": {
                    f"d{i}": {"$anchor": f"a{i}", "pattern": f"a.{{{i}}}b", "$ref": f"#a{i + 1}"} for i in range(20)
                }
                | {"d20": {"$anchor": "a20"}},
                "$ref": "#a0",
            }
        ),
        "at once",
    ),
    "30 patterns at once of a property": (
        _schema({"allOf": [{"properties": {"x": {"items": {"pattern": f"a.{{{i}}}b"}}}} for i in range(30)]}),
        "at once",
    ),
    "500 patterns": (_schema({"properties": {f"p{i}": {"pattern": f"^x{i}[a-z]*$"} for i in range(500)}}), None),
    "1,000 patterns": (
        _schema({"properties": {f"p{i}": {"pattern": f"^x{i}[a-z]*$"} for i in range(1000)}}),
        "one too many",
    ),
    "a long pattern": (_schema({"pattern": "a?" * 5000}), "10000 characters"),
    "a catastrophic pattern": (_schema({"pattern": "^(a|a)*(a|aa)+(.*)*b$"}), None),
    "a repeated pattern": (_schema({"pattern": "^((a{1,1000}){1,1000}){1,1000}$"}), None),
    "a million letters of a pattern": (_schema({"pattern": "^(ab?){1000000}$"}), None),
    "multiples": (
        _schema({"allOf": [{"multipleOf": 7919}, {"multipleOf": 7907}, {"multipleOf": 7901}]}),
        "may be at most 20000",
    ),
    "a small multiple": (_schema({"type": "number", "multipleOf": 1e-9}), None),
    "a large multiple": (_schema({"type": "integer", "multipleOf": 1_000_003}), "may be at most 20000"),
    "a wide range": (_schema({"type": "number", "minimum": -1e300, "maximum": 1e300}), "cannot be made a grammar"),
    "a huge number": ({"json_schema": '{"minimum": 1' + "0" * 5000 + "}"}, "is not JSON|cannot be made a grammar"),
    "formats": (
        _schema({"allOf": [{"format": name} for name in ("email", "uri", "iri", "date-time", "hostname") * 10]}),
        "at once",
    ),
}

EXPRESSIONS: dict[str, tuple[dict[str, Any], str | None]] = {
    "counts within counts": ({"regex": "((a{1,1000}){1,1000}){1,1000}"}, None),
    "a million times": ({"regex": "a{1000000}"}, None),
    "a million words": ({"regex": "(\\w+ ){1000000}"}, None),
    "2^32 times": ({"regex": "a{4294967296}"}, "regex"),
    "catastrophic": ({"regex": "(x+x+)+y|(a|aa)+$|([a-zA-Z]+)*Z"}, None),
    "a look back": ({"regex": "(.*a.{20})"}, None),
    "a long look back": ({"regex": "(.*a.{1500})(.*b.{1500})"}, None),
    "many optional letters": ({"regex": "a?" * 1300 + "a" * 1300}, "lexer"),
    "many branches": ({"regex": "|".join(f"{i}x*" for i in range(600))}, None),
    "deep brackets": ({"regex": "(" * 60 + "a" + ")*" * 60}, None),
    "all letters": ({"regex": "[\\p{L}\\p{N}]{1,500}[^\\p{L}]{1,500}"}, None),
    "10,000 choices": ({"choice": [f"choice {i * 7919}" for i in range(10_000)]}, None),
    "long choices": ({"choice": ["x" * 4000 + str(i) for i in range(60)]}, None),
    "choices that share a beginning": ({"choice": ["x" * i for i in range(1, 600)]}, None),
}

GRAMMARS: dict[str, tuple[dict[str, Any], str | None]] = {
    "a long expression in a grammar": ({"grammar": "start: /" + "a?" * 10_000 + "/"}, "a line of"),
    "doubling terminals": (
        {"grammar": "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(30)) + '\nT30: "x"?'},
        "too big",
    ),
    "doubling rules": (
        {"grammar": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(30)) + '\nr30: "x"?'},
        None,
    ),
    "a million times a rule": ({"grammar": 'start: a{1000000}\na: "x" | "y"'}, None),
    "rules times rules": ({"grammar": 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"{1000}'}, None),
    "complements": ({"grammar": "start: T\nT: /(.*a.{30}.*)/ & ~/(.*c.{30}.*)/"}, "operator &"),
    "ambiguous": ({"grammar": 'start: a\na: a a | a a a | "x" | "xx"'}, None),
    "empty rules": ({"grammar": 'start: a b a b\na: a b | b a | ""\nb: a a | "x" | ""'}, None),
    "left and right": ({"grammar": 'start: e\ne: e "+" e | e "*" e | "-" e | e "!" | /[0-9]+/'}, None),
    "2,000 rules": (
        {"grammar": "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}?' for i in range(1500)) + '\nr1500: "x"'},
        None,
    ),
    "800 terminals": (
        {"grammar": "start: (" + " | ".join(f"T{i}" for i in range(300)) + ")*\n"
         + "\n".join(f"T{i}: /t{i}[a-z]*/" for i in range(300))},
        None,
    ),
    "1,000 structures": (
        {"structural_tag": json.dumps({"structures": TAGS, "triggers": ["<f"]})},
        None,
    ),
    "1,000 triggers": (
        {"structural_tag": json.dumps({"structures": TAGS, "triggers": [tag["begin"] for tag in TAGS]})},
        None,
    ),
    "a structure that hurts": (
        {
            "structural_tag": json.dumps(
                {"structures": [{"begin": "<f>", "schema": {"allOf": [{"anyOf": BRANCHES}] * 20}, "end": ""}],
                 "triggers": ["<f"]}
            )
        },
        "too large",
    ),
}  # fmt: skip

HURTFUL = SCHEMAS | EXPRESSIONS | GRAMMARS
