"""From a request of /v1/messages to one of chat."""

from __future__ import annotations

from typing import Any

import msgspec

from ...config import GatewayConfig
from ...http.errors import ApiError, invalid
from ...http.json_body import to_struct
from ...schemas.chat import ChatRequest
from ...schemas.messages_api.answer import INVALID_JSON
from ...schemas.messages_api.request import (
    ASSISTANT_BLOCKS,
    CHOICES,
    RESULT_BLOCKS,
    TEXT_BLOCKS,
    THINKING,
    USER_BLOCKS,
    AdaptiveThinking,
    Blocks,
    CountTokensRequest,
    CustomTool,
    EnabledThinking,
    JsonOutput,
    MessagesRequest,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ...schemas.sealed import PREFIX, unseal
from ...schemas.typed import check_count, parts_text, rename, typed
from ..turns import Turns

_TEXT_ONLY = "the models of this server read text"
_USER_ONLY = f"{_TEXT_ONLY}, and a user's message may hold {', '.join(USER_BLOCKS)}"
_ASSISTANT_ONLY = f"an assistant's message may hold {', '.join(ASSISTANT_BLOCKS)}"
_OWN_TOOLS = 'only tools of the type "custom" can be called: this server runs none itself'


def to_chat(request: CountTokensRequest, config: GatewayConfig) -> tuple[ChatRequest, dict[str, str]]:
    """Chat's request, and where the request has what chat's fields name.

    Raises ApiError with the path of the field that is wrong.
    """
    check_count(request.messages, config.max_messages, "max_messages", "messages")
    turns = Turns()
    found: dict[str, str] = {}
    if request.system:
        turns.add("system", _texts(request.system, "system"), "system", content_path="system")
    for index, message in enumerate(request.messages):
        path = f"messages[{index}].content"
        # A turn may be spread over several messages of one role.
        if not index or request.messages[index - 1].role != message.role:
            turns.end()
        if message.role == "assistant":
            _add_assistant(turns, message.content, path)
        elif message.role == "user":
            _add_user(turns, message.content, path, found)
        else:
            turns.add("system", _texts(message.content, path), f"messages[{index}]", content_path=path)

    values: dict[str, Any] = {
        "model": request.model,
        "messages": turns.messages,
        "chat_template_kwargs": _template_variables(request),
        "reasoning_effort": request.output_config.effort if request.output_config else None,
    }
    if request.messages[-1].role == "assistant":
        _continue_last(turns, values, len(request.messages) - 1)
    paths = {**turns.paths, **_PATHS}
    _add_tools(request, values, paths, found)
    if request.output_config and request.output_config.format is not None:
        form = typed(
            request.output_config.format, {"json_schema": JsonOutput}, "output_config.format", "use json_schema"
        )
        assert isinstance(form, JsonOutput)
        made = {"name": "answer", "schema": form.schema, "strict": True}
        values["response_format"] = {"type": "json_schema", "json_schema": made}
    if isinstance(request, MessagesRequest):
        values |= {name: getattr(request, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
        values["stop"] = request.stop_sequences
    try:
        return to_struct(values, ChatRequest), paths
    except ApiError as error:
        rename(error, paths)
        raise


_PATHS = {
    "prompt": "messages",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "tool_choice.function": "tool_choice",
}


def display_of(request: CountTokensRequest) -> str | None:
    """How thinking is to be shown."""
    if request.thinking is None:
        return None
    return getattr(typed(request.thinking, THINKING, "thinking", f"use {', '.join(THINKING)}"), "display", None)


def _texts(content: str | Blocks, path: str) -> str | list[dict[str, str]]:
    return parts_text(content, TEXT_BLOCKS, path, _TEXT_ONLY)


def _add_user(turns: Turns, content: str | Blocks, path: str, found: dict[str, str]) -> None:
    """Results of tools are messages of their own; the texts between them are the user's.

    `found` gets the names of tools that results refer to, each with its path.
    """
    if isinstance(content, str):
        turns.extend_user([{"type": "text", "text": content}], path)
        return
    if not content:
        raise invalid(f"{path} is empty: give a text, or a block at least", path)
    for index, given in enumerate(content):
        where = f"{path}[{index}]"
        block = typed(given, USER_BLOCKS, where, _USER_ONLY)
        if isinstance(block, TextBlock):
            turns.extend_user([{"type": "text", "text": block.text}], path)
        elif isinstance(block, ToolResultBlock):
            result = _result(block.content, f"{where}.content", found)
            if block.is_error:
                # Templates have no other way to tell.
                result = [{"type": "text", "text": "Error:"}, *_parts(result)]
            turns.add("tool", result, where, content_path=f"{where}.content", tool_call_id=block.tool_use_id)


def _result(content: str | Blocks, path: str, found: dict[str, str]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    parts = []
    for index, given in enumerate(content):
        block = typed(given, RESULT_BLOCKS, f"{path}[{index}]", _TEXT_ONLY)
        if isinstance(block, ToolReferenceBlock):
            found[block.tool_name] = f"{path}[{index}].tool_name"
            parts.append({"type": "text", "text": f"The tool {block.tool_name} can be called now."})
        elif isinstance(block, TextBlock):
            parts.append({"type": "text", "text": block.text})
    return parts


def _parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _add_assistant(turns: Turns, content: str | Blocks, path: str) -> None:
    if isinstance(content, str):
        turns.extend_said([{"type": "text", "text": content}], path)
        return
    for index, given in enumerate(content):
        where = f"{path}[{index}]"
        block = typed(given, ASSISTANT_BLOCKS, where, _ASSISTANT_ONLY)
        if isinstance(block, TextBlock):
            turns.extend_said([{"type": "text", "text": block.text}], path)
        elif isinstance(block, ThinkingBlock):
            text = block.thinking
            if not text and block.signature.startswith(PREFIX):
                text = unseal(block.signature, f"{where}.signature")
            turns.think(text, where)
        elif isinstance(block, ToolUseBlock):
            arguments = msgspec.json.encode(block.input).decode()
            if block.input.keys() == {INVALID_JSON} and isinstance(block.input[INVALID_JSON], str):
                arguments = block.input[INVALID_JSON]  # as the answer had them
            turns.call(block.id, block.name, arguments, where, arguments_path=f"{where}.input")
        else:
            assert isinstance(block, RedactedThinkingBlock)


def _continue_last(turns: Turns, values: dict[str, Any], index: int) -> None:
    last = turns.messages[-1] if turns.messages else {}
    if last.get("tool_calls"):
        why = "ends with a tool_use: send a user's message with its tool_result"
        raise invalid(f"messages[{index}] {why}", f"messages[{index}]")
    if last.get("role") != "assistant" or "content" not in last:
        raise invalid(f"messages[{index}] has no text to go on with", f"messages[{index}]")
    values |= {"continue_final_message": True, "add_generation_prompt": False}


def _template_variables(request: CountTokensRequest) -> dict[str, Any]:
    made: dict[str, Any] = {}
    thinking = None
    if request.thinking is not None:
        thinking = typed(request.thinking, THINKING, "thinking", f"use {', '.join(THINKING)}")
    if not isinstance(thinking, AdaptiveThinking):
        made["enable_thinking"] = isinstance(thinking, EnabledThinking)
    most = request.max_tokens if isinstance(request, MessagesRequest) else None
    if most is not None and isinstance(thinking, EnabledThinking) and thinking.budget_tokens >= most:
        bound = f"it must be below max_tokens={most}"
        field = "thinking.budget_tokens"
        raise invalid(f"{field}={thinking.budget_tokens} is out of range: {bound}", field)
    return made


def _add_tools(
    request: CountTokensRequest, values: dict[str, Any], paths: dict[str, str], found: dict[str, str]
) -> None:
    """Put tools and the choice among them into chat's request: those that are deferred only if they were `found`."""
    given_tools = [_tool(given, f"tools[{index}]") for index, given in enumerate(request.tools or [])]
    for name in found.keys() - {tool.name for tool in given_tools}:
        raise invalid(f"{found[name]}={name[:100]!r} is not the name of a tool in tools", found[name])
    tools: list[dict[str, Any]] = []
    for index, tool in enumerate(given_tools):
        if tool.defer_loading and tool.name not in found:
            continue
        path = f"tools[{index}]"
        schema = tool.input_schema
        if tool.input_examples:
            schema = {**schema, "examples": tool.input_examples}
        function: dict[str, Any] = {"name": tool.name, "parameters": schema}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.strict is not None:
            function["strict"] = tool.strict
        chat_path = f"tools[{len(tools)}]"
        paths[chat_path] = paths[f"{chat_path}.function"] = path
        paths[f"{chat_path}.function.parameters"] = f"{path}.input_schema"
        tools.append({"type": "function", "function": function})
    if tools:
        values["tools"] = tools

    if request.tool_choice is None:
        return
    choice = typed(request.tool_choice, CHOICES, "tool_choice", f"use {', '.join(CHOICES)}")
    kind = request.tool_choice["type"]
    if not tools and kind in ("any", "tool"):
        raise invalid(f"tool_choice.type={kind!r} is not acceptable: it needs tools", "tool_choice.type")
    if isinstance(choice, ToolChoice):
        values["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        values["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}[kind]
    if getattr(choice, "disable_parallel_tool_use", None):
        values["parallel_tool_calls"] = False


def _tool(given: dict[str, Any], path: str) -> CustomTool:
    tool = typed(given, {"custom": CustomTool}, path, _OWN_TOOLS, "custom")
    assert isinstance(tool, CustomTool)
    return tool
