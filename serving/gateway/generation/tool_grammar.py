"""The grammar of calls of tools, in the form of Hermes, which Qwen2.5 and Qwen3 write too.

<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ....engine.protocol.structured import StructuredOutput
from ..http.errors import invalid
from ..http.json_body import shown

TRIGGER = "<tool_call>"
BEGIN, END = f"{TRIGGER}\n", "\n</tool_call>"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS = {"type": "object"}


@dataclass(frozen=True)
class _Function:
    """A function, and where it is in the request."""

    path: str
    name: str
    parameters: dict[str, Any] | None
    strict: bool


def tool_grammar(
    tools: Sequence[dict[str, Any]], names: Collection[str] | None = None, *, parallel: bool = True
) -> StructuredOutput:
    """What an answer must match that is one call, or with `parallel` one or more, and nothing else.

    `tools` are OpenAI's function tools; only those in `names` may be called, None stands for all. A function's
    `parameters` are enforced, and without any it takes no arguments. Raises ApiError for a name that no tool has, for
    tools that are none, and for parameters that are no object.
    """
    functions = _functions(tools)
    for name in names or ():
        if name not in functions:
            raise invalid(f"tool_choice names {name!r}, which no tool has", "tool_choice")
    wanted = [function for name, function in functions.items() if names is None or name in names]
    if not wanted:
        raise invalid("tool_choice asks for a call, and tools has none", "tools")
    return _structural_tag(map(_structure, wanted), alone="many" if parallel else "one")


def strict_grammar(tools: Sequence[dict[str, Any]]) -> StructuredOutput | None:
    """What an answer must match that may call tools of which some are strict; None if none is.

    It is any text, in which a call has the name of a tool. The arguments of a strict one are valid by its parameters,
    those of the others are any JSON object.
    """
    functions = _functions(tools)
    if not any(function.strict for function in functions.values()):
        return None
    structures = [
        _structure(function if function.strict else replace(function, parameters=_ANY_ARGUMENTS))
        for function in functions.values()
    ]
    return _structural_tag(structures, triggers=[TRIGGER])


def call_or_answer(tools: Sequence[dict[str, Any]], answer: StructuredOutput) -> StructuredOutput:
    """What an answer must match that is one call, or else a text of the form that `answer` says.

    Raises ApiError for a form that is no JSON: it does not go together with calls.
    """
    if answer.json_schema is None and not answer.json_object:
        why = 'it leaves no room for calls of tools; set tool_choice="none"'
        raise invalid(f"structured_outputs.{answer.kind} does not go with tools: {why}", "structured_outputs")
    schema = _ANY_ARGUMENTS if answer.json_schema is None else _decoded(answer.json_schema)
    calls = map(_structure, _functions(tools).values())
    return _structural_tag([*calls, {"begin": "", "schema": schema, "end": ""}], alone="one")


def _functions(tools: Sequence[dict[str, Any]]) -> dict[str, _Function]:
    """The functions by their names. Raises ApiError for a tool without one."""
    functions = {}
    for index, tool in enumerate(tools):
        path = f"tools[{index}].function"
        given = tool.get("function")
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise invalid(f"{path} must have a name", f"{path}.name")
        function = _Function(path, given["name"], given.get("parameters"), bool(given.get("strict")))
        functions[function.name] = function
    return functions


def _structure(function: _Function) -> dict[str, Any]:
    return {
        "begin": f'{BEGIN}{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": ',
        "schema": _NO_ARGUMENTS if function.parameters is None else _object_schema(function),
        "end": f"}}{END}",
    }


def _object_schema(function: _Function) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object also where it does not say so."""
    schema = function.parameters or {}
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        path = f"{function.path}.parameters.type"
        raise invalid(f'{path}={shown(kind)} is not acceptable: arguments are an "object"', path, "invalid_value")
    return {**schema, "type": "object"}


def _structural_tag(structures: Iterable[dict[str, Any]], **how: Any) -> StructuredOutput:
    tag = {"structures": list(structures), **how}
    return StructuredOutput(structural_tag=json.dumps(tag, ensure_ascii=False))


def _decoded(schema: str) -> Any:
    """A schema that was given as text. Raises ApiError for what is no JSON."""
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise invalid(f"structured_outputs.json is no JSON: {error}", "structured_outputs.json") from None
