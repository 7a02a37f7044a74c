"""StructuredOutput: its fields are of their types in a process as on the wire."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from phalanx import InvalidRequest
from phalanx.engine.protocol.structured import StructuredOutput


@pytest.mark.parametrize(
    "values",
    [{"choice": "ab"}, {"choice": memoryview(b"ab")}, {"choice": {"a": 1}}, {"json_object": 1}, {"regex": ("a",)}],
)
def test_a_field_of_another_type_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"structured.{next(iter(values))} must be"):
        StructuredOutput(**values)


@pytest.mark.parametrize("values", [{"json_object": None, "regex": "a"}, {"choice": iter(["a", "b"])}])
def test_what_is_taken_travels(values: dict[str, Any]) -> None:
    form = StructuredOutput(**values)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(form), type=StructuredOutput) == form
