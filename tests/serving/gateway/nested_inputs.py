"""Wrong values of each field of what requests hold by its type: items, blocks, parts, tools, choices, forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect
from phalanx.serving.gateway.schemas.chat import PARTS
from phalanx.serving.gateway.schemas.messages_api import request as messages_api
from phalanx.serving.gateway.schemas.responses_api import request as responses_api
from phalanx.serving.gateway.schemas.sealed import seal
from phalanx.tests.serving.gateway.bad_inputs import Case, wrong_values

Place = Callable[[dict[str, Any]], dict[str, Any]]
Kinds = Mapping[str, type[msgspec.Struct]]

_CHAT, _RESPONSES, _MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
_FUNCTION = {"type": "function", "name": "f"}
_TOOL = {"name": "f", "input_schema": {"type": "object"}}
_RIGHT: dict[str, Any] = {
    "text": "Hi", "refusal": "No", "role": "user", "content": "Hi", "call_id": "c", "tool_use_id": "c", "id": "c",
    "tool_name": "f", "name": "f", "arguments": "{}", "output": "1", "thinking": "hm", "data": "x", "input": {},
    "tools": [_FUNCTION], "encrypted_content": seal("hm"),
    "input_schema": {"type": "object"}, "schema": {"type": "object"}, "mode": "auto", "budget_tokens": 1,
}  # fmt: skip
"""A right value of each field that some type requires."""


def _user(content: list[Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2}


def _assistant(content: list[Any]) -> dict[str, Any]:
    turns = [{"role": "assistant", "content": content}, {"role": "user", "content": "Hi"}]
    return {"messages": turns, "max_tokens": 2}


PLACES: list[tuple[str, str, Kinds, Place]] = [
    (_CHAT, "messages[0].content[0]", PARTS, lambda value: _user([value])),
    (_RESPONSES, "input[0]", responses_api.ITEMS, lambda value: {"input": [value]}),
    (
        _RESPONSES, "input[0].content[0]", responses_api.MESSAGE_PARTS,
        lambda value: {"input": [{"role": "user", "content": [value]}]},
    ),
    (
        _RESPONSES, "input[0].summary[0]", responses_api.REASONING_PARTS,
        lambda value: {"input": [{"type": "reasoning", "summary": [value]}]},
    ),
    (_RESPONSES, "tools[0]", responses_api.TOOLS, lambda value: {"input": "Hi", "tools": [value]}),
    (
        _RESPONSES, "tools[0].tools[0]", {"function": responses_api.FunctionTool},
        lambda value: {"input": "Hi", "tools": [{"type": "namespace", "name": "n", "tools": [value]}]},
    ),
    (
        _RESPONSES, "tool_choice", responses_api.CHOICES,
        lambda value: {"input": "Hi", "tools": [_FUNCTION], "tool_choice": value},
    ),
    (
        _RESPONSES, "text.format", responses_api.FORMATS,
        lambda value: {"input": "Hi", "text": {"format": value}},
    ),
    (_MESSAGES, "messages[0].content[0]", messages_api.USER_BLOCKS, lambda value: _user([value])),
    (_MESSAGES, "messages[0].content[0]", messages_api.ASSISTANT_BLOCKS, lambda value: _assistant([value])),
    (
        _MESSAGES, "messages[0].content[0].content[0]", messages_api.RESULT_BLOCKS,
        lambda value: _user([{"type": "tool_result", "tool_use_id": "c", "content": [value]}]),
    ),
    (_MESSAGES, "system[0]", messages_api.TEXT_BLOCKS, lambda value: {**_user([_RIGHT_TEXT]), "system": [value]}),
    (
        _MESSAGES, "tools[0]", {"custom": messages_api.CustomTool},
        lambda value: {**_user([_RIGHT_TEXT]), "tools": [value]},
    ),
    (
        _MESSAGES, "tool_choice", messages_api.CHOICES,
        lambda value: {**_user([_RIGHT_TEXT]), "tools": [_TOOL], "tool_choice": value},
    ),
    (
        _MESSAGES, "thinking", messages_api.THINKING,
        lambda value: {**_user([_RIGHT_TEXT]), "thinking": value},
    ),
]  # fmt: skip
"""A route, the path at which it has an object that says its type, the types, and how a body with it is made."""
_RIGHT_TEXT = {"type": "text", "text": "Hi"}


def nested_cases() -> Iterator[Case]:
    """For each field of each type, values of another type and out of range; a field and a type that there are not."""
    for route, path, kinds, place in PLACES:
        for name, kind in kinds.items():
            info = inspect.type_info(kind)
            assert isinstance(info, inspect.StructType)
            right = {field.name: _RIGHT[field.name] for field in info.fields if field.required}
            for field in info.fields:
                seen: set[str] = set()
                for value in wrong_values(field.type):
                    text = json.dumps(value)
                    if text not in seen and _is_wrong({**right, field.name: value}, kind):
                        seen.add(text)
                        yield Case(route, f"{path}.{field.name}", place({"type": name, **right, field.name: value}))
            yield Case(route, f"{path}.no_such_field", place({"type": name, **right, "no_such_field": 1}))
            for missing in right:
                rest = {field: value for field, value in right.items() if field != missing}
                yield Case(route, f"{path}.{missing}", place({"type": name, **rest}))
        yield Case(route, f"{path}.type", place({"type": "no_such_type"}))
        yield Case(route, f"{path}.type", place({"type": 5}))


def _is_wrong(values: dict[str, Any], kind: type[msgspec.Struct]) -> bool:
    try:
        msgspec.convert(values, kind, strict=True, str_keys=True)
    except msgspec.ValidationError:
        return True
    return False
