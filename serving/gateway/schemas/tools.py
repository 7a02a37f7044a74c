"""The tools of a request, and which of them the answer may or must call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..generation.call_scanner import NAME_LIMIT
from ..http.errors import ApiError, invalid
from ..http.json_body import shown, to_struct
from .typed import at

Mode = Literal["none", "auto", "required"]

_TOOL_FIELDS = ("type", "function")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


class FunctionName(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The tools that an answer may or must call, of those that the request has."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


class AllowedToolsChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool_choice of the type allowed_tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


@dataclass(frozen=True)
class ToolChoice:
    """Whether the answer may call tools ("auto"), must ("required"), or may not ("none")."""

    mode: Mode
    names: list[str] | None = None
    """The tools that it must call one of; None leaves all."""


def check_tools(tools: list[dict[str, Any]]) -> None:
    """Raise ApiError for a tool that is no function with a name, and for fields of it of a wrong type."""
    for index, tool in enumerate(tools):
        path = f"tools[{index}]"
        _check_fields(tool, _TOOL_FIELDS, path)
        if tool.get("type") != "function":
            why = 'tools are functions: {"type": "function", "function": {"name": ...}}'
            raise _wrong(f"{path}.type", tool.get("type"), why)
        function = tool.get("function")
        if not isinstance(function, dict):
            raise _wrong(f"{path}.function", function, "it must be an object with a name")
        _check_fields(function, _FUNCTION_FIELDS, f"{path}.function")

        name = function.get("name")
        if not isinstance(name, str) or not 1 <= len(name) <= NAME_LIMIT:
            raise _wrong(f"{path}.function.name", name, f"it must be a text of 1 to {NAME_LIMIT} characters")
        kinds = {"description": (str, "a text"), "parameters": (dict, "a JSON Schema"), "strict": (bool, "a boolean")}
        for field, (kind, form) in kinds.items():
            value = function.get(field)
            if value is not None and not isinstance(value, kind):
                raise _wrong(f"{path}.function.{field}", value, f"it must be {form}")


def allowed_tools(tools: list[dict[str, Any]], choice: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(the tools that a tool_choice of the type allowed_tools leaves, the choice among them)

    `tools` have been checked. Raises ApiError for a choice of another form, and for a name that no tool has.
    """
    with at("tool_choice"):
        allowed = to_struct(choice, AllowedToolsChoice).allowed_tools
    known = {tool["function"]["name"] for tool in tools}
    for index, tool in enumerate(allowed.tools):
        if tool.function.name not in known:
            path = f"tool_choice.allowed_tools.tools[{index}].function.name"
            raise _wrong(path, tool.function.name, "tools has none of that name")
    names = {tool.function.name for tool in allowed.tools}
    return [tool for tool in tools if tool["function"]["name"] in names], allowed.mode


def tool_choice_of(tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> ToolChoice:
    """What a request's tool_choice means. Raises ApiError for one that there is not, or that names no tool."""
    if choice is None or choice in ("none", "auto"):
        return ToolChoice("none" if choice == "none" or not tools else "auto")
    names = None
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            forms = '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
            raise _wrong("tool_choice", choice, f"it must be {forms}")
        assert isinstance(choice, dict)
        assert isinstance(function, dict)
        _check_fields(choice, _TOOL_FIELDS, "tool_choice")
        _check_fields(function, ("name",), "tool_choice.function")
        names = [name]

    known = [tool["function"]["name"] for tool in tools or ()]
    if not known:
        raise _wrong("tool_choice", choice, "it needs tools")
    if names and names[0] not in known:
        raise _wrong("tool_choice.function.name", names[0], "tools has none of that name")
    return ToolChoice("required", names)


def _check_fields(values: dict[str, Any], known: tuple[str, ...], path: str) -> None:
    """Raise ApiError for a field that there is not. A type of tool that there is not is told by its type."""
    if values.get("type") not in ("function", None) and "type" in known:
        return
    for name, value in values.items():
        if name not in known and value is not None:
            raise invalid(f"unknown field {shown(name)}", f"{path}.{name[:100]}", "unknown_parameter")


def _wrong(path: str, value: object, why: str) -> ApiError:
    if value is None:
        return invalid(f"{path} is required: {why}", path, "missing_required_parameter")
    return invalid(f"{path}={shown(value)} is not acceptable: {why}", path, "invalid_value")
