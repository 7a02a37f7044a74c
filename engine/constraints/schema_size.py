"""How large a JSON Schema may be where the library's time, memory or depth of recursion grows faster than its text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ..errors import InvalidRequest
from .formats import as_schemas
from .intersections import Intersections

MOST = {"properties": 2000, "patternProperties": 64, "required": 2000}
"""Entries of each keyword in all of a schema, at most: compiling them takes a time that grows with the square of their
number."""
COMPOSED = 500
"""Objects and lists in all values of enum and const, at most."""
REFERENCE_DEPTH = 2000
"""Parts of all schemas that are referred to, each at its deepest, at most: the library follows references by recursion,
and may go through all of them in a row."""
PATTERNS = 600
"""Patterns in all of a schema, at most."""
TOGETHER = 10
"""Patterns and formats that one string must match at once, at most; a format may count as two or three."""
MULTIPLE = 20_000
"""The least common multiple of all multipleOf, with the decimal point left out, at most: it is the number of states."""


@dataclass
class SchemaSize:
    """What adds up in a schema, part by part."""

    entries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOST, 0))
    composed: int = 0
    patterns: int = 0
    expressions: int = 0
    anchors: dict[str, dict[str, Any]] = field(default_factory=dict)
    multiple: int = 1
    references: dict[str, str] = field(default_factory=dict)
    """Where each was seen first."""
    parts: dict[int, str] = field(default_factory=dict)
    """The paths of the objects that are schemas, by id."""
    combining: list[dict[str, Any]] = field(default_factory=list)
    """Those that others hold together with."""

    def add(self, part: dict[str, Any], path: str) -> None:
        """Count one part. Raises InvalidRequest with its path if it is one too many."""
        for keyword, most in MOST.items():
            self.entries[keyword] += len(part[keyword]) if isinstance(part.get(keyword), dict | list) else 0
            if self.entries[keyword] > most:
                raise InvalidRequest(f"{path} is one too many: a schema may have {most} {keyword} in all")

        values = part.get("enum", [])
        self.composed += _composed([*(values if isinstance(values, list) else []), part.get("const")])
        if self.composed > COMPOSED:
            raise InvalidRequest(f"{path} is one too many: enum and const may have {COMPOSED} objects and lists in all")
        self.patterns += "pattern" in part
        self.expressions += ("pattern" in part) + len(as_schemas(part.get("format")))
        if self.patterns > PATTERNS:
            raise InvalidRequest(f"{path} is one too many: a schema may have {PATTERNS} patterns in all")
        for keyword in ("$anchor", "$id"):
            if isinstance(part.get(keyword), str):
                self.anchors["#" + part[keyword] if keyword == "$anchor" else part[keyword]] = part
        self._add_multiple(part.get("multipleOf"), path)
        if isinstance(part.get("$ref"), str):
            self.references.setdefault(part["$ref"], path)
        self.parts[id(part)] = path
        if "allOf" in part or "$ref" in part:
            self.combining.append(part)

    def check(self, schema: Any, path: str) -> None:
        """Raise InvalidRequest if references lead too deep or to what is no schema, or too many patterns meet."""
        depth, whole = 0, _depth(schema)
        for reference, where in self.references.items():
            target = _target(schema, reference)
            if isinstance(target, dict) and id(target) not in self.parts:
                raise InvalidRequest(f"{where}.$ref={reference!r} must point to a schema, like those in $defs")
            depth += whole if target is None else _depth(target)
        if depth > REFERENCE_DEPTH:
            raise InvalidRequest(
                f"{path} has {len(self.references)} schemas that are referred to, {depth} deep in all; at most "
                f"{REFERENCE_DEPTH} are allowed"
            )

        if self.expressions <= TOGETHER:
            return
        intersections = Intersections(lambda reference: _target(schema, reference) or self.anchors.get(reference))
        for part in self.combining:
            most, where = intersections.most(part), self.parts[id(part)]
            if most is None:
                raise InvalidRequest(f"{where} is too complex: too many parts hold together by allOf and references")
            if most > TOGETHER:
                together = f"match {most} patterns and formats at once"
                raise InvalidRequest(f"{where} makes one string {together}; at most {TOGETHER} are allowed")

    def _add_multiple(self, value: Any, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            return
        digits = int("".join(map(str, Decimal(repr(value)).normalize().as_tuple().digits)))
        self.multiple = math.lcm(self.multiple, digits)
        if self.multiple > MULTIPLE:
            raise InvalidRequest(
                f"{path}.multipleOf={value} makes {self.multiple} the least common multiple of the schema's "
                f"multipleOf, decimal points left out; it may be at most {MULTIPLE}"
            )


def _composed(values: list[Any]) -> int:
    """The objects and lists in values, those within one another too."""
    count, pending = 0, list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, dict | list):
            count += 1
            pending += value.values() if isinstance(value, dict) else value
    return count


def _target(schema: Any, reference: str) -> Any:
    """What a reference within a schema points to; None where it cannot be found so."""
    if not reference.startswith("#/"):
        return schema if reference == "#" else None
    for step in reference[2:].split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        elif isinstance(schema, dict) and name in schema:
            schema = schema[name]
        else:
            return None
    return schema


def _depth(value: Any) -> int:
    """Objects and lists within one another."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return depth
