"""The grammar of calls of tools, in the form of Hermes, which Qwen2.5 and Qwen3 write too.

<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from ....engine.protocol.structured import StructuredOutput
from ..http.errors import invalid

BEGIN, END = "<tool_call>\n", "\n</tool_call>"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def tool_grammar(
    tools: Sequence[dict[str, Any]], names: Collection[str] | None = None, *, parallel: bool = True
) -> StructuredOutput:
    """What an answer must match that is one call, or with `parallel` one or more, and nothing else.

    `tools` are OpenAI's function tools; only those in `names` may be called, None stands for all. A function's
    `parameters` are enforced, and without any it takes no arguments. Raises ApiError for a name that no tool has, and
    for tools that are none.
    """
    functions: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"tools[{index}].function must have a name", f"tools[{index}].function.name")
        functions[function["name"]] = function
    for name in names or ():
        if name not in functions:
            raise invalid(f"tool_choice names {name!r}, which no tool has", "tool_choice")
    wanted = [function for name, function in functions.items() if names is None or name in names]
    if not wanted:
        raise invalid("tool_choice asks for a call, and tools has none", "tools")

    structures = [
        {
            "begin": f'{BEGIN}{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": ',
            "schema": _NO_ARGUMENTS if function.get("parameters") is None else function["parameters"],
            "end": f"}}{END}",
        }
        for function in wanted
    ]
    tag = {"structures": structures, "alone": "many" if parallel else "one"}
    return StructuredOutput(structural_tag=json.dumps(tag, ensure_ascii=False))
