"""The grammar of calls of tools, in the form of Hermes, which Qwen2.5 and Qwen3 write too.

<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ....engine.protocol.structured import StructuredOutput
from ..http.errors import invalid

TRIGGER = "<tool_call>"
BEGIN, END = f"{TRIGGER}\n", "\n</tool_call>"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS = {"type": "object"}


def tool_grammar(
    tools: Sequence[dict[str, Any]], names: Collection[str] | None = None, *, parallel: bool = True
) -> StructuredOutput:
    """What an answer must match that is one call, or with `parallel` one or more, and nothing else.

    `tools` are OpenAI's function tools; only those in `names` may be called, None stands for all. A function's
    `parameters` are enforced, and without any it takes no arguments. Raises ApiError for a name that no tool has, and
    for tools that are none.
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
    if not any(function.get("strict") for function in functions.values()):
        return None
    structures = [
        _structure(function) if function.get("strict") else _structure({**function, "parameters": _ANY_ARGUMENTS})
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


def _functions(tools: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The functions by their names. Raises ApiError for a tool without one."""
    functions = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"tools[{index}].function must have a name", f"tools[{index}].function.name")
        functions[function["name"]] = function
    return functions


def _structure(function: dict[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters")
    return {
        "begin": f'{BEGIN}{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ',
        "schema": _NO_ARGUMENTS if parameters is None else parameters,
        "end": f"}}{END}",
    }


def _structural_tag(structures: Iterable[dict[str, Any]], **how: Any) -> StructuredOutput:
    tag = {"structures": list(structures), **how}
    return StructuredOutput(structural_tag=json.dumps(tag, ensure_ascii=False))


def _decoded(schema: str) -> Any:
    """A schema that was given as text. Raises ApiError for what is no JSON."""
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise invalid(f"structured_outputs.json is no JSON: {error}", "structured_outputs.json") from None
