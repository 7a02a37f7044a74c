"""What a JSON Schema must be before it is compiled, and where in it something is that cannot be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import InvalidRequest
from . import large_numbers
from .formats import as_schemas, why_refused
from .patterns import from_ecma
from .schema_size import SchemaSize

_PLAIN = re.compile(r"[\w$-]{1,100}", re.ASCII)
DEPTH = 64
"""Objects and lists of a schema within one another, at most."""
PATTERN_CHARACTERS = 1024
"""Characters of a regular expression in a schema, at most."""
TRIES = 300
"""Parts of a schema that are compiled alone, at most, to find the one that is wrong."""
OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLE = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
UNSUPPORTED = {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties", "dependentSchemas", "dependentRequired", "dependencies", "uniqueItems", "$dynamicRef",
    "$recursiveRef", "x-guidance", "extends", "disallow", "divisibleBy",
}  # fmt: skip
"""Keywords that would constrain the answer, and that no grammar can express here."""
MOST_NAMES = 200
"""Names that propertyNames may list, at most."""
_ANNOTATIONS = {"title", "description", "examples", "default", "deprecated", "$comment"}


COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}


def decode_json(text: str, field: str) -> Any:
    """Return the value of JSON text. Raises InvalidRequest for what is none, is nested too deeply, or no Unicode."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{field} holds half of a surrogate pair, which is no Unicode text") from None
    except (ValueError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else f"is not JSON: {error}"
        raise InvalidRequest(f"{field} {why}") from None
    _check_depth(value, field)
    return value


def check_schema(schema: Any, field: str) -> None:
    """Raise InvalidRequest, with the path, for a keyword that is not supported or a part that is no schema."""
    pending = [(field, schema)]
    size = SchemaSize()
    while pending:
        path, part = pending.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise InvalidRequest(f"{path} must be a schema, an object or a boolean, not {type(part).__name__}")
        for keyword in part:
            if keyword in UNSUPPORTED and not _says_nothing(keyword, part):
                raise InvalidRequest(f"{path}.{keyword} is not supported: no grammar can be made of it")
        _check_values(part, path)
        size.add(part, path)
        pending += subschemas(part, path)
    size.check(schema, field)


def _check_values(schema: dict[str, Any], path: str) -> None:
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidRequest(f"{path}.required must be a list of names, not {json.dumps(required)[:100]}")
    fewest = schema.get("minProperties", 0)
    if isinstance(fewest, int | float) and fewest > len(set(required)) + 1:
        why = "a grammar does not see that a name occurs twice, so that it may be at most one above those required"
        raise InvalidRequest(f"{path}.minProperties={fewest} is not supported: {why}")
    refused = why_refused(schema)
    if refused is not None:
        raise InvalidRequest(f"{path}.format={str(schema['format'])[:100]!r} {refused}")
    inexact = large_numbers.why_inexact(schema)
    if inexact is not None:
        raise InvalidRequest(f"{path}.{inexact}")
    patterns = schema.get("patternProperties")
    for pattern in [schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]:
        if isinstance(pattern, str) and len(pattern) > PATTERN_CHARACTERS:
            most = f"a pattern may have at most {PATTERN_CHARACTERS}"
            raise InvalidRequest(f"{path} has a pattern of {len(pattern)} characters; {most}")


def find_path(schema: Any, field: str, error: str, compile_alone: Callable[[Any], str]) -> str:
    """Return the path of the smallest part of a schema for which `compile_alone` returns the same `error`.

    References of a part to the whole are not followed: a fault behind one is found at its definition.
    """
    path = field
    part = schema
    tries = 0
    while True:
        for below, child in subschemas(part, path):
            tries += 1
            if tries > TRIES:
                return path
            if compile_alone(child) == error:
                path = below
                part = child
                break
        else:
            return path


def subschemas(schema: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of each schema directly within a schema."""
    if not isinstance(schema, dict):
        return
    for keyword in OF_SCHEMAS:
        if isinstance(schema.get(keyword), dict):
            for name, child in schema[keyword].items():
                yield f"{path}.{keyword}{_step(name)}", child
    for keyword in LISTS:
        if isinstance(schema.get(keyword), list):
            for index, child in enumerate(schema[keyword]):
                yield f"{path}.{keyword}[{index}]", child
    for keyword in SINGLE:
        if isinstance(schema.get(keyword), dict | bool):
            yield f"{path}.{keyword}", schema[keyword]


def for_library(schema: Any) -> Any:
    """Return a checked schema as the library takes it rightly.

    Unsupported keywords that constrain nothing are left out, counts are integers, formats are regular expressions, and
    these are in the library's syntax.
    """
    if not isinstance(schema, dict):
        return schema
    made = {name: value for name, value in schema.items() if name not in UNSUPPORTED}
    for keyword in COUNTS & made.keys():
        if isinstance(made[keyword], float) and made[keyword].is_integer():
            made[keyword] = int(made[keyword])
    large_numbers.for_library(made)
    if isinstance(made.get("pattern"), str):
        made["pattern"] = from_ecma(made["pattern"])
    if isinstance(made.get("patternProperties"), dict):
        patterns = {from_ecma(name): child for name, child in made["patternProperties"].items()}
        if len(patterns) == len(made["patternProperties"]):
            made["patternProperties"] = patterns
    for keyword in OF_SCHEMAS:
        if isinstance(made.get(keyword), dict):
            made[keyword] = {name: for_library(child) for name, child in made[keyword].items()}
    for keyword in LISTS:
        if isinstance(made.get(keyword), list):
            made[keyword] = [for_library(child) for child in made[keyword]]
    for keyword in SINGLE:
        if isinstance(made.get(keyword), dict):
            made[keyword] = for_library(made[keyword])

    more = as_schemas(made.pop("format", None)) + (_of_names(schema.get("propertyNames", True)) or [])
    if more and isinstance(made.setdefault("allOf", []), list):
        made["allOf"] += more
    return made


def _step(name: str) -> str:
    """A name as a part of a path: in brackets and quotes if it is no plain word."""
    return f".{name}" if _PLAIN.fullmatch(name) else f"[{json.dumps(name[:100])}]"


def _says_nothing(keyword: str, schema: dict[str, Any]) -> bool:
    """Whether a keyword that is not supported constrains nothing as it stands."""
    value = schema[keyword]
    if keyword in ("then", "else"):
        return "if" not in schema
    if keyword == "if":
        return "then" not in schema and "else" not in schema
    if keyword in ("minContains", "maxContains"):
        return "contains" not in schema
    if keyword == "uniqueItems":
        return value is False or schema.get("maxItems") in (0, 1)
    if keyword == "not":
        return value is False
    if keyword.startswith("depend"):
        return bool(value == {})
    if keyword == "propertyNames":
        return _of_names(value) is not None
    return value is True and keyword in ("unevaluatedItems", "unevaluatedProperties")


def _of_names(names: Any) -> list[dict[str, Any]] | None:
    """What a `propertyNames` says of objects by other keywords, as schemas that all hold; None if none says it.

    Names are texts. Libraries write so the keys of a map: any texts, a list of them, or those that match a pattern.
    """
    if names is True:
        return []
    if not isinstance(names, dict):
        return None
    rest = {keyword: value for keyword, value in names.items() if keyword not in _ANNOTATIONS}
    if rest.pop("type", "string") != "string" or len(rest) > 1:
        return None
    listed = rest.get("enum", [rest["const"]] if "const" in rest else None)
    if isinstance(listed, list) and len(listed) <= MOST_NAMES:
        allowed = {name: True for name in listed if isinstance(name, str)}
        return [{"properties": allowed, "additionalProperties": False}]
    if isinstance(rest.get("pattern"), str):
        return [{"patternProperties": {from_ecma(rest["pattern"]): True}, "additionalProperties": False}]
    return None if rest else []


def _check_depth(value: Any, field: str) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise InvalidRequest(f"{field} is nested more than {DEPTH} deep")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
