"""Numbers in a JSON Schema that are too large for the library, which reads them as doubles."""

from __future__ import annotations

from typing import Any

EXACT = 2**53
"""Up to here each integer is a double of its own."""
LARGEST = 2**63 - 1
"""The library's integers end here, and at the negative of it."""
_LEAST = -(2**63 - 1024)
"""The least double that the library takes as a minimum."""
_WHY = "is not supported: an integer above 2^53 may not be kept exactly"


def why_inexact(schema: dict[str, Any]) -> str | None:
    """The keyword and the number in it that the library would read as another one; None if all are kept."""
    enum = schema.get("enum")
    for keyword, values in (("const", [schema.get("const")]), ("enum", enum if isinstance(enum, list) else [])):
        inexact = _first_inexact(values)
        if inexact is not None:
            return f"{keyword} with {_shown(inexact)} {_WHY}; use a string"

    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        value = schema.get(keyword)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or _is_no_bound(keyword, value):
            continue
        if not _is_exact(value) or (keyword.startswith("exclusive") and abs(value) >= EXACT):
            return f"{keyword}={_shown(value)} {_WHY}"
    return None


def for_library(schema: dict[str, Any]) -> None:
    """Change a minimum that no integer of 64 bits is below to one that the library takes."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "integer" not in kinds or "number" in kinds:
        return
    for keyword in ("minimum", "exclusiveMinimum"):
        value = schema.get(keyword)
        if isinstance(value, int | float) and value <= -LARGEST:
            schema[keyword] = _LEAST


def _is_no_bound(keyword: str, value: int) -> bool:
    """Whether integers of 64 bits are all on its right side: the library ends there by itself."""
    return value <= -LARGEST if keyword.endswith("inimum") else value >= LARGEST


def _is_exact(value: int) -> bool:
    return abs(value) <= LARGEST and int(float(value)) == value


def _first_inexact(values: list[Any]) -> int | float | None:
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, float):
            if abs(value) > LARGEST:
                return value
        elif isinstance(value, int) and not _is_exact(value):
            return value
    return None


def _shown(value: float) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
