"""The request of /v1/chat/completions, and its messages as the chat template gets them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ....engine.protocol.sampling_params import LOGPROBS_LIMIT
from ..config import GatewayConfig
from ..http.errors import invalid
from ..http.json_body import json_object
from .fields import CacheBreakpoint, CacheControl, OpenAIFields, Parsed
from .tools import allowed_tools, check_tools
from .typed import text_of, typed


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content that is a text."""

    text: str
    cache_control: Annotated[CacheControl, Meta(description="Accepted; every prefix is cached.")] | None = None
    prompt_cache_breakpoint: (
        Annotated[CacheBreakpoint, Meta(description="Accepted; every prefix is cached.")] | None
    ) = None


class RefusalPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message's content by which the model refused."""

    refusal: str


PARTS: dict[str, type[msgspec.Struct]] = {"text": TextPart, "refusal": RefusalPart}


class FunctionCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that a message of the past called."""

    name: str
    arguments: Annotated[str, Meta(description="A JSON object as text, or what a model wrote in its place.")] | None = (
        None
    )
    parsed_arguments: Parsed = None


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call in a message of the past."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    # What an answer has that a client sends back as it came.
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: Annotated[None, Meta(description="Only null: the models of this server read text.")] = None
    function_call: Annotated[None, Meta(description="Only null: use tool_calls.")] = None
    parsed: Parsed = None


class ChatRequest(OpenAIFields, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be continued."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, description="Most new tokens.")] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, description="The same, under OpenAI's newer name.")] | None = None
    logprobs: Annotated[bool, Meta(description="Return the log-probabilities of the answer's tokens.")] | None = None
    top_logprobs: (
        Annotated[int, Meta(ge=0, le=LOGPROBS_LIMIT, description="And those of the k likeliest tokens.")] | None
    ) = None
    echo: Annotated[bool, Meta(description="Begin with the last message if it is of the answer's role.")] | None = None

    # What the template gets.
    add_generation_prompt: Annotated[bool, Meta(description="End with the beginning of an answer (true).")] | None = (
        None
    )
    continue_final_message: (
        Annotated[bool, Meta(description="Continue the last message; needs add_generation_prompt=false.")] | None
    ) = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Meta(description="Variables of the template, such as enable_thinking.")] | None
    ) = None
    tools: (
        Annotated[list[dict[str, Any]], Meta(description="Functions that the answer may call, as OpenAI has them.")]
        | None
    ) = None
    tool_choice: (
        Annotated[
            str | dict[str, Any],
            Meta(description='"auto" (with tools), "none", "required", the one that must be called, or allowed_tools.'),
        ]
        | None
    ) = None
    parallel_tool_calls: (
        Annotated[bool, Meta(description="Several calls in one answer (true); otherwise those after the first go.")]
        | None
    ) = None
    include_reasoning: (
        Annotated[bool, Meta(description="Return the model's thinking (true); its tokens count in any case.")] | None
    ) = None
    reasoning_effort: (
        Annotated[
            Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
            Meta(description='A variable of the template; "none" sets enable_thinking=false, too.'),
        ]
        | None
    ) = None
    stop_in_reasoning: Annotated[bool, Meta(description="Let stop also end an answer in its thinking.")] | None = None
    verbosity: Annotated[Literal["medium"], Meta(description='Only "medium": ask for it in the messages.')] | None = (
        None
    )
    modalities: Annotated[list[Literal["text"]], Meta(description='Only ["text"].')] | None = None


def check_chat(request: ChatRequest, config: GatewayConfig) -> None:
    """Raise ApiError for what the schema allows and this server does not do."""
    if len(request.messages) > config.max_messages:
        most = f"at most {config.max_messages} (max_messages)"
        raise invalid(f"messages has {len(request.messages)} messages; it may have {most}", "messages")
    check_tools(request.tools or [])
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")

    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise invalid("max_tokens and max_completion_tokens differ; give one of them", "max_completion_tokens")
    if request.add_special_tokens:
        why = "the model's template places the special tokens of a conversation"
        raise invalid(f"add_special_tokens=true is not supported with messages: {why}", "add_special_tokens")
    if request.continue_final_message and request.add_generation_prompt:
        why = "needs add_generation_prompt=false"
        raise invalid(f"continue_final_message=true {why}", "continue_final_message")


def with_allowed_tools(request: ChatRequest) -> ChatRequest:
    """The request with the tools alone that its tool_choice allows. Raises ApiError for a choice of another form."""
    choice = request.tool_choice
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return request
    check_tools(request.tools or [])
    tools, mode = allowed_tools(request.tools or [], choice)
    return msgspec.structs.replace(request, tools=tools, tool_choice=mode)


def template_variables(request: ChatRequest) -> dict[str, Any] | None:
    """The variables that a request sets for the chat template."""
    if request.reasoning_effort is None:
        return request.chat_template_kwargs
    variables: dict[str, Any] = {"reasoning_effort": request.reasoning_effort}
    if request.reasoning_effort == "none":
        variables["enable_thinking"] = False
    return {**variables, **(request.chat_template_kwargs or {})}


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them: content as one text, arguments of calls as objects if they are some.

    A developer is a system to the templates that there are. Raises ApiError for a part that is no text.
    """
    return [_template_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _template_message(message: Message, path: str) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content = _text(message.content, f"{path}.content")
    if content is None:
        # An assistant's may consist of calls or thinking alone; clients that know no thinking send back nothing of it.
        if message.role != "assistant":
            raise invalid(f"{path}.content is required", f"{path}.content", "missing_required_parameter")
        content = message.refusal or ""

    made: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        made["name"] = message.name
    if message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning != (message.reasoning_content or reasoning):
        raise invalid(f"{path}.reasoning and {path}.reasoning_content differ; give one of them", f"{path}.reasoning")
    if reasoning is not None:
        # Templates use either name.
        made["reasoning"] = made["reasoning_content"] = reasoning
    return made


def _text(content: str | list[dict[str, Any]] | None, path: str) -> str | None:
    if not isinstance(content, list):
        return content
    why = "the models of this server read text"
    return "\n".join(text_of(typed(part, PARTS, f"{path}[{index}]", why)) for index, part in enumerate(content))


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments: Any = {}
    text = call.function.arguments
    if text and text.strip() != "null":
        # A model may write what is no object, or is cut off: its answer is taken back as it came.
        found = json_object(text)
        arguments = text if found is None else found
    made: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
    if call.id is not None:
        made["id"] = call.id
    return made
