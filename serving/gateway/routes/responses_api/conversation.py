"""From a request of /v1/responses to one of chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...config import GatewayConfig
from ...http.errors import ApiError, invalid
from ...http.json_body import to_struct
from ...schemas.chat import ChatRequest
from ...schemas.responses_api.request import (
    FORMATS,
    ITEMS,
    LOGPROBS,
    MESSAGE_PARTS,
    OUTPUT_PARTS,
    REASONING_PARTS,
    CompactionItem,
    FunctionCallItem,
    FunctionCallOutputItem,
    ItemReference,
    JsonSchemaFormat,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
)
from ...schemas.sealed import unseal
from ...schemas.typed import check_count, parts_text, rename, text_of, typed
from ..turns import Turns
from .tools import add_tools, joined_name

Item = dict[str, Any]

SUMMARY = "This is a summary of the conversation up to here:"
"""What comes before a summary in the prompt. Its role is the user's: templates take other roles in some places only."""

_TEXT_ONLY = "the models of this server read text"
_ITEMS = f"the input may hold {', '.join(ITEMS)}"


def input_items(request: ResponsesRequest, find: Callable[[str], Item | None]) -> list[Item]:
    """The items of a request's input, each with its type; references are replaced by what they name.

    `find` returns an item of a stored response by its id. Raises ApiError for a reference to what is not stored.
    """
    if request.input is None:
        if request.previous_response_id is None:
            why = "one of input and previous_response_id must be given"
            raise invalid(f"input is required: {why}", "input", "missing_required_parameter")
        return []
    if isinstance(request.input, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": request.input}]}]
    items = []
    for index, item in enumerate(request.input):
        path = f"input[{index}]"
        checked = typed(item, ITEMS, path, _ITEMS, "message")
        if isinstance(checked, ItemReference):
            found = find(checked.id)
            if found is None:
                why = "no stored response has it; send the item itself"
                raise invalid(f"{path}.id={checked.id[:100]!r} is not known: {why}", f"{path}.id", "item_not_found")
            items.append(found)
        else:
            items.append(item if item.get("type") is not None else {"type": "message", **item})
    return items


def to_chat(
    request: ResponsesRequest, before: Sequence[Item | None], items: Sequence[Item | None], config: GatewayConfig
) -> tuple[ChatRequest, dict[str, str]]:
    """Chat's request, and where the request has what chat's fields name.

    `before` are the items of the previous response, `items` those of this input; None stands for one that is left out.
    Raises ApiError with the path of the field that is wrong.
    """
    turns = Turns()
    if request.instructions:
        turns.add("system", request.instructions, "instructions", content_path="instructions")
    for index, item in enumerate(before):
        if item is not None:
            _add(turns, item, f"previous_response_id.input[{index}]")
    written = isinstance(request.input, list)
    for index, item in enumerate(items):
        if item is not None:
            _add(turns, item, f"input[{index}]" if written else "input")
    if not turns.messages:
        raise invalid("input is empty: give a text or items", "input", "missing_required_parameter")
    check_count(turns.messages, config.max_messages, "max_messages", "input")

    values: dict[str, Any] = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    values["messages"] = turns.messages
    values["max_completion_tokens"] = request.max_output_tokens
    values["reasoning_effort"] = request.reasoning.effort if request.reasoning else None
    if wants_logprobs(request):
        values |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    paths = {**turns.paths, **_PATHS}
    add_tools(request, values, paths)
    _add_format(request, values)
    try:
        return to_struct(values, ChatRequest), paths
    except ApiError as error:
        rename(error, paths)
        raise


_SAME = (
    "model", "parallel_tool_calls", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "seed", "stream", "chat_template_kwargs", "priority", "cache_salt", "timeout", "prompt_cache_key",
)  # fmt: skip
_PATHS = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "response_format.json_schema.schema": "text.format.schema",
    "tool_choice.function": "tool_choice",
}


def wants_logprobs(request: ResponsesRequest) -> bool:
    """Whether texts have log-probabilities."""
    return bool(request.top_logprobs) or LOGPROBS in (request.include or ())


def _add(turns: Turns, item: Item, path: str) -> None:
    checked = typed(item, ITEMS, path, _ITEMS, "message")
    if isinstance(checked, MessageItem):
        content = parts_text(checked.content, MESSAGE_PARTS, f"{path}.content", _TEXT_ONLY)
        if checked.role == "assistant":
            turns.say(content, path, content_path=f"{path}.content")
        else:
            turns.add(checked.role, content, path, content_path=f"{path}.content")
    elif isinstance(checked, ReasoningItem):
        turns.think(_thinking(checked, path), path)
    elif isinstance(checked, FunctionCallItem):
        where = f"{path}.arguments"
        name = joined_name(checked.namespace, checked.name)
        turns.call(checked.call_id, name, checked.arguments, path, arguments_path=where)
    elif isinstance(checked, CompactionItem):
        where = f"{path}.encrypted_content"
        content = f"{SUMMARY}\n{unseal(checked.encrypted_content, where)}"
        turns.add("user", content, path, content_path=where)
    elif isinstance(checked, FunctionCallOutputItem):
        content = parts_text(checked.output, OUTPUT_PARTS, f"{path}.output", _TEXT_ONLY)
        turns.add("tool", content, path, content_path=f"{path}.output", tool_call_id=checked.call_id)


def _thinking(item: ReasoningItem, path: str) -> str:
    def joined(name: str, parts: list[Item]) -> str:
        return "".join(
            text_of(typed(part, REASONING_PARTS, f"{path}.{name}[{index}]", _TEXT_ONLY))
            for index, part in enumerate(parts)
        )

    summary = joined("summary", item.summary)
    if item.content:
        return joined("content", item.content)
    if item.encrypted_content:
        return unseal(item.encrypted_content, f"{path}.encrypted_content")
    return summary


def _add_format(request: ResponsesRequest, values: dict[str, Any]) -> None:
    form = request.text.format if request.text else None
    if form is None:
        return
    why = f"it must be one of {', '.join(FORMATS)}"
    checked = typed(form, FORMATS, "text.format", why)
    if isinstance(checked, JsonSchemaFormat):
        fields = {"name": checked.name, "schema": checked.schema, "description": checked.description}
        made: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        if checked.strict is not None:
            made["strict"] = checked.strict
        values["response_format"] = {"type": "json_schema", "json_schema": made}
    elif form["type"] != "text":
        values["response_format"] = {"type": form["type"]}


def echoed_format(request: ResponsesRequest) -> dict[str, Any]:
    """The form of the text as the response shows it."""
    form = request.text.format if request.text and request.text.format else {"type": "text"}
    if form.get("type") == "json_schema":
        form = {"description": None, "strict": False, **form}
    return {"format": form}


def check_together(request: ResponsesRequest) -> None:
    """Raise ApiError for fields that exclude each other."""
    if request.background and request.stream:
        raise invalid("background=true cannot be streamed: set stream=false, and ask for the response later", "stream")
    if request.background and request.store is False:
        raise invalid("background=true needs store=true: the response is fetched later", "background")
