"""How many regular expressions one string of a JSON Schema must match at once: the library's time doubles with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .formats import as_schemas

STEPS = 300_000
"""Parts that are looked at before a schema counts as too complex."""
_CHILDREN = ("items", "additionalProperties", "additionalItems")

Part = dict[str, Any]


class Intersections:
    """Follows allOf and references of one schema, as the library does when it makes one schema of several."""

    def __init__(self, target: Callable[[str], Any]) -> None:
        """`target` returns what a reference points to, None where that cannot be told."""
        self._target = target
        self._steps = 0
        self._counts: dict[frozenset[int], int] = {}

    def most(self, part: Part) -> int | None:
        """The most expressions that one string within `part` must match at once; None if there is no telling."""
        found = self._most([part])
        return found if self._steps <= STEPS else None

    def _most(self, parts: list[Any]) -> int:
        base = list(self._together(parts))
        key = frozenset(map(id, base))
        if key in self._counts:
            return self._counts[key]
        if self._steps > STEPS:
            return 0
        self._counts[key] = 0  # what leads back here adds nothing

        most = sum(map(self._of_part, base))
        for children in _by_place(base):
            if len(children) > 1:
                most = max(most, self._most(children))
        self._counts[key] = most
        return most

    def _of_part(self, part: Part) -> int:
        own = isinstance(part.get("pattern"), str) + len(as_schemas(part.get("format")))
        for keyword in ("anyOf", "oneOf"):
            branches = part.get(keyword)
            if isinstance(branches, list):
                own += max((self._most([branch]) for branch in branches), default=0)
        return own

    def _together(self, parts: list[Any]) -> Iterator[Part]:
        """All parts that hold at once, each one time."""
        seen: set[int] = set()
        pending = list(parts)
        while pending and self._steps <= STEPS:
            part = pending.pop()
            self._steps += 1
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            yield part
            if isinstance(part.get("allOf"), list):
                pending += part["allOf"]
            if isinstance(part.get("$ref"), str):
                pending.append(self._target(part["$ref"]))


def _by_place(parts: list[Part]) -> list[list[Any]]:
    """The schemas of each property, and of what else an instance holds, of parts that hold at once."""
    by_keyword: dict[str, list[Any]] = {}
    for part in parts:
        for keyword in ("properties", "patternProperties"):
            if isinstance(part.get(keyword), dict):
                for name, child in part[keyword].items():
                    by_keyword.setdefault(f"{keyword}.{name}", []).append(child)
        for keyword in _CHILDREN:
            if isinstance(part.get(keyword), dict):
                by_keyword.setdefault(keyword, []).append(part[keyword])
        if isinstance(part.get("prefixItems"), list):
            for index, child in enumerate(part["prefixItems"]):
                by_keyword.setdefault(f"prefixItems.{index}", []).append(child)
    return list(by_keyword.values())
