"""What the parameters of tools are in JSON, from the tools' schemas, and values in that form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ParameterTypes = Mapping[str, Mapping[str, frozenset[str]]]
"""The types of JSON Schema that a parameter may have, by the tool's name and the parameter's."""
STRING = frozenset({"string"})
_DEPTH = 8  # of schemas within schemas; what is deeper has no type of its own
_TYPES: tuple[tuple[type, frozenset[str]], ...] = (
    (bool, frozenset({"boolean"})),
    (int, frozenset({"integer", "number"})),
    (float, frozenset({"number"})),
    (str, STRING),
    (list, frozenset({"array"})),
    (dict, frozenset({"object"})),
    (type(None), frozenset({"null"})),
)


def parameter_types(tools: list[dict[str, Any]]) -> ParameterTypes:
    """The types of every parameter that has any."""
    found: dict[str, dict[str, frozenset[str]]] = {}
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
            continue
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        if isinstance(schema, dict) and isinstance(properties, dict):
            found[name] = {key: _types_of(value, schema) for key, value in properties.items()}
    return found


def json_value(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that was written as plain text: of one of the types, or else a string."""
    plain = text.strip()
    word = plain.lower()
    if "null" in types and word in ("null", "none"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    try:
        value = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json_string(text)

    kinds = next(names for kind, names in _TYPES if type(value) is kind)
    if isinstance(value, float) and "integer" in types and value.is_integer():
        return str(int(value))
    return plain if kinds & types and kinds != STRING else json_string(text)


def json_string(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _types_of(schema: Any, root: dict[str, Any], depth: int = 0) -> frozenset[str]:
    """The types that a schema allows; none where it says nothing of them."""
    if not isinstance(schema, dict) or depth > _DEPTH:
        return frozenset()
    if isinstance(reference := schema.get("$ref"), str):
        return _types_of(_look_up(reference, root), root, depth + 1)

    named = schema.get("type")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    types = {name for name in names if isinstance(name, str)}
    if not types:
        values = schema.get("enum") if isinstance(schema.get("enum"), list) else []
        values = [*(values or []), *([schema["const"]] if "const" in schema else [])]
        types |= {name for value in values for kind, names in _TYPES if type(value) is kind for name in names}
        for word in ("anyOf", "oneOf", "allOf"):
            members = schema.get(word)
            for member in members if isinstance(members, list) else []:
                types |= _types_of(member, root, depth + 1)
    return frozenset(types | ({"null"} if types and schema.get("nullable") is True else set()))


def _look_up(reference: str, root: dict[str, Any]) -> Any:
    found: Any = root
    for name in reference.removeprefix("#").split("/")[1:]:
        found = found.get(name) if isinstance(found, dict) else None
    return found if reference.startswith("#") else None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")
