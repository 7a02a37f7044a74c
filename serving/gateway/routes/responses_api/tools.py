"""The tools of a request of /v1/responses as chat has them: functions, those of namespaces under a joined name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...http.errors import invalid
from ...http.json_body import shown
from ...schemas.responses_api.request import (
    CHOICES,
    TOOLS,
    AllowedTools,
    FunctionTool,
    NamedFunction,
    NamespaceTool,
    ResponsesRequest,
)
from ...schemas.typed import typed

_ONLY_FUNCTIONS = "only functions, and those of namespaces, can be called: this server runs no tools itself"
_FUNCTION = {"function": FunctionTool}
_NAMED = {"function": NamedFunction}


def joined_name(namespace: str | None, name: str) -> str:
    """The name under which the model knows a function: that of its namespace goes before it."""
    return name if namespace is None else f"{namespace}__{name}"


@dataclass(frozen=True)
class _Offered:
    """A function of a request, and where it is there."""

    path: str
    namespace: NamespaceTool | None
    tool: FunctionTool

    @property
    def name(self) -> str:
        return joined_name(self.namespace.name if self.namespace else None, self.tool.name)


def add_tools(request: ResponsesRequest, values: dict[str, Any], paths: dict[str, str]) -> None:
    """Put tools and the choice among them into chat's request. Raises ApiError for what is none of either."""
    offered = list(_offered(request))
    _check_names(offered)
    choice: str | dict[str, Any] | None = None
    allowed: set[str] | None = None
    if isinstance(request.tool_choice, str):
        choice = request.tool_choice
    elif request.tool_choice is not None:
        chosen = typed(request.tool_choice, CHOICES, "tool_choice", _ONLY_FUNCTIONS)
        if isinstance(chosen, NamedFunction):
            choice = {"type": "function", "function": {"name": joined_name(chosen.namespace, chosen.name)}}
        elif isinstance(chosen, AllowedTools):
            choice = chosen.mode
            allowed = _allowed(chosen, {one.name for one in offered})

    tools: list[dict[str, Any]] = []
    described: set[str] = set()
    for one in offered:
        if allowed is not None and one.name not in allowed:
            continue
        chat_path = f"tools[{len(tools)}]"
        paths[chat_path] = paths[f"{chat_path}.function"] = one.path
        tools.append({"type": "function", "function": _function(one, described)})
    if tools:
        values["tools"] = tools
    if choice is not None:
        values["tool_choice"] = choice


def namespaces(request: ResponsesRequest) -> dict[str, tuple[str, str]]:
    """The namespace and the name of each function that has one, by the name under which the model knows it."""
    return {one.name: (one.namespace.name, one.tool.name) for one in _offered(request) if one.namespace is not None}


def echoed_tools(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The tools as the response shows them: with every field."""
    return [
        {
            "type": "namespace",
            "name": tool["name"],
            "description": tool.get("description"),
            "tools": [_echoed(inner) for inner in tool["tools"]],
        }
        if tool["type"] == "namespace"
        else _echoed(tool)
        for tool in request.tools or ()
    ]


def _echoed(tool: dict[str, Any]) -> dict[str, Any]:
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", **{field: tool.get(field) for field in fields}}


def _offered(request: ResponsesRequest) -> Iterator[_Offered]:
    for index, given in enumerate(request.tools or []):
        path = f"tools[{index}]"
        tool = typed(given, TOOLS, path, _ONLY_FUNCTIONS)
        if isinstance(tool, FunctionTool):
            yield _Offered(path, None, tool)
        elif isinstance(tool, NamespaceTool):
            for inner, values in enumerate(tool.tools):
                where = f"{path}.tools[{inner}]"
                function = typed(values, _FUNCTION, where, _ONLY_FUNCTIONS)
                assert isinstance(function, FunctionTool)
                yield _Offered(where, tool, function)


def _check_names(offered: list[_Offered]) -> None:
    """Raise ApiError for a name that two functions would have, one of them in a namespace."""
    seen: dict[str, _Offered] = {}
    for one in offered:
        other = seen.setdefault(one.name, one)
        if other is not one and (one.namespace or other.namespace):
            why = f"the model would know it as {shown(one.name)}, as it does {other.path}"
            raise invalid(f"{one.path}.name={shown(one.tool.name)} is taken: {why}", f"{one.path}.name")


def _function(one: _Offered, described: set[str]) -> dict[str, Any]:
    """The function as chat has it. What its namespace is for stands before the first one's description."""
    made: dict[str, Any] = {"name": one.name}
    for field in ("description", "parameters", "strict"):
        if (value := getattr(one.tool, field)) is not None:
            made[field] = value
    space = one.namespace
    if space is not None and space.name not in described:
        described.add(space.name)
        made["description"] = "\n\n".join(text for text in (space.description, made.get("description")) if text)
    return made


def _allowed(chosen: AllowedTools, known: set[str]) -> set[str]:
    names = set()
    for index, given in enumerate(chosen.tools):
        path = f"tool_choice.tools[{index}]"
        tool = typed(given, _NAMED, path, _ONLY_FUNCTIONS)
        assert isinstance(tool, NamedFunction)
        name = joined_name(tool.namespace, tool.name)
        if name not in known:
            raise invalid(f"{path}.name={tool.name[:100]!r} is not the name of a tool in tools", f"{path}.name")
        names.add(name)
    if not names:
        raise invalid("tool_choice.tools is empty: name at least one tool", "tool_choice.tools")
    return names
