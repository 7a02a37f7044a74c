"""The request of /v1/responses: fields, items of the input, tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..fields import CacheBreakpoint, CacheSalt, DirectCaller, ModelName, Parsed, Penalty, Priority, Stream, TimeoutS

MAX_TOP_LOGPROBS = 20
ENCRYPTED, LOGPROBS = "reasoning.encrypted_content", "message.output_text.logprobs"
Include = list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]]

Metadata = dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]]


class ReasoningConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How the model thinks, and how its thinking is returned."""

    effort: (
        Annotated[
            Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"],
            Meta(description='"none" turns thinking off. The template gets any other as reasoning_effort.'),
        ]
        | None
    ) = None
    summary: (
        Annotated[
            Literal["auto", "detailed"],
            Meta(description="Return the thinking as the item's summary, whole, in place of its content."),
        ]
        | None
    ) = None
    context: Annotated[Literal["auto"], Meta(description='Only "auto": the template chooses what it shows.')] | None = (
        None
    )
    mode: Annotated[Literal["standard"], Meta(description='Only "standard": there is one mode.')] | None = None
    generate_summary: Annotated[Literal["auto", "detailed"], Meta(description="The older name of summary.")] | None = (
        None
    )


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text.format of the type json_schema."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class PlainFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text.format of the type text or json_object."""


FORMATS: dict[str, type[msgspec.Struct]] = {
    "text": PlainFormat,
    "json_object": PlainFormat,
    "json_schema": JsonSchemaFormat,
}


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: Annotated[dict[str, Any], Meta(description="Its type is text, json_object or json_schema.")] | None = None
    verbosity: Annotated[Literal["medium"], Meta(description='Only "medium": ask for it in the input.')] | None = None


class ResponsesStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream holds beside the answer."""

    include_obfuscation: (
        Annotated[Literal[False], Meta(description="Only false: padding against traffic analysis is not added.")] | None
    ) = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is to be answered."""

    input: (
        Annotated[
            str | list[dict[str, Any]],
            Meta(
                description="A text of the user, or items: message, function_call, function_call_output, reasoning, "
                "compaction, item_reference. Without previous_response_id it is required."
            ),
        ]
        | None
    ) = None
    model: ModelName | None = None
    instructions: (
        Annotated[str, Meta(description="A system message before everything else; not carried on to later responses.")]
        | None
    ) = None
    previous_response_id: (
        Annotated[str, Meta(description="A stored response; its input and its output come before this input.")] | None
    ) = None
    tools: (
        Annotated[list[dict[str, Any]], Meta(description="Functions that may be called, and namespaces of them.")]
        | None
    ) = None
    tool_choice: (
        Annotated[
            Literal["none", "auto", "required"] | dict[str, Any],
            Meta(description='Or {"type": "function", "name": ...}, or {"type": "allowed_tools", "mode", "tools"}.'),
        ]
        | None
    ) = None
    parallel_tool_calls: Annotated[bool, Meta(description="Whether one answer may call several functions.")] | None = (
        None
    )
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: (
        Annotated[
            Include,
            Meta(
                description="With reasoning.encrypted_content each reasoning item has its thinking, encoded, in a "
                "field that clients send back as it is; it is read where the item has no content."
            ),
        ]
        | None
    ) = None

    # How to choose.
    max_output_tokens: Annotated[int, Meta(ge=1, description="Most new tokens, those of thinking included.")] | None = (
        None
    )
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy.")] | None = None
    top_p: (
        Annotated[float, Meta(gt=0, le=1, description="Keep the likeliest tokens that together reach top_p.")] | None
    ) = None
    top_k: Annotated[int, Meta(ge=-1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")] | None = None
    min_p: (
        Annotated[float, Meta(ge=0, le=1, description="Keep tokens at least min_p times as likely as the likeliest.")]
        | None
    ) = None
    presence_penalty: Annotated[Penalty, Meta(description="As in /v1/chat/completions.")] | None = None
    frequency_penalty: Annotated[Penalty, Meta(description="As in /v1/chat/completions.")] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="As in /v1/chat/completions.")] | None = None
    top_logprobs: (
        Annotated[
            int,
            Meta(ge=0, le=MAX_TOP_LOGPROBS, description="Log-probabilities of the text's tokens and the k likeliest."),
        ]
        | None
    ) = None
    chat_template_kwargs: (
        Annotated[dict[str, Any], Meta(description="Variables of the template, such as enable_thinking.")] | None
    ) = None

    # How it is run and answered.
    stream: Stream | None = None
    stream_options: ResponsesStreamOptions | None = None
    store: Annotated[bool, Meta(description="Whether it is kept (true where responses are).")] | None = None
    background: (
        Annotated[bool, Meta(description="Answer at once, and compute meanwhile; needs store, and no stream.")] | None
    ) = None
    truncation: (
        Annotated[
            Literal["auto", "disabled"],
            Meta(
                description='With "auto" items leave the beginning of a conversation that is too long, those of the '
                "responses before it first, until it fits beside max_output_tokens, or else beside a quarter of the "
                'model\'s context. With "disabled" it is refused.'
            ),
        ]
        | None
    ) = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    timeout: TimeoutS | None = None

    # Accepted; returned in the response.
    metadata: Annotated[Metadata, Meta(max_length=16, description="Kept with the response.")] | None = None
    user: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    safety_identifier: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    prompt_cache_key: Annotated[str, Meta(description="Requests with the same key go to the same engine.")] | None = (
        None
    )
    service_tier: Annotated[Literal["auto", "default"], Meta(description="Accepted; there is one tier.")] | None = None
    max_tool_calls: (
        Annotated[int, Meta(ge=1, description="Accepted; it counts calls of built-in tools, which there are none of.")]
        | None
    ) = None
    client_metadata: Annotated[dict[str, str], Meta(description="Accepted; has no effect.")] | None = None


class CompactRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation of which the model is to write a summary."""

    input: Annotated[str | list[dict[str, Any]], Meta(description="As in /v1/responses.")] | None = None
    model: ModelName | None = None
    instructions: Annotated[str, Meta(description="A system message before everything else.")] | None = None
    previous_response_id: (
        Annotated[str, Meta(description="A stored response; its input and its output come before this input.")] | None
    ) = None
    prompt_cache_key: Annotated[str, Meta(description="Requests with the same key go to the same engine.")] | None = (
        None
    )
    service_tier: Annotated[Literal["auto", "default"], Meta(description="Accepted; there is one tier.")] | None = None


REFUSED_RESPONSES = {
    "conversation": "conversations are not kept; use previous_response_id",
    "prompt": "prompt templates are not kept; use instructions and input",
    "context_management": "the server compacts nothing by itself; use /v1/responses/compact",
    "moderation": "this server moderates nothing",
    "background_options": "background responses are computed as soon as there is room",
    "prompt_cache_retention": "cached prefixes stay while there is room",
    "prompt_cache_options": "cached prefixes stay while there is room",
    "personality": "ask for it in instructions",
    "access_programs": "there are no such programs here",
    "image": "the models of this server read text",
    "n": "a response is one answer; use /v1/chat/completions",
    "stop": "use /v1/chat/completions",
    "response_format": "its name is text.format here",
    "messages": "use input, or /v1/chat/completions",
    "max_tokens": "its name is max_output_tokens here",
    "max_completion_tokens": "its name is max_output_tokens here",
}


REFUSED_COMPACT = {
    **{name: REFUSED_RESPONSES[name] for name in ("prompt_cache_retention", "prompt_cache_options", "image")},
    "stream": "a summary is answered whole",
    "max_output_tokens": "a summary takes at most a quarter of the model's context",
}


Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    id: str | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that the model made."""

    call_id: str
    name: str
    namespace: str | None = None
    arguments: str
    id: str | None = None
    status: Status | None = None
    caller: DirectCaller | None = None
    parsed_arguments: Parsed = None


class FunctionCallOutputItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a call returned."""

    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: Status | None = None
    caller: DirectCaller | None = None
    name: str | None = None
    namespace: str | None = None


class ReasoningItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Thinking of the model: its content is read, or else encrypted_content, or else the summary."""

    summary: list[dict[str, Any]] = []
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: Status | None = None


class CompactionItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation's summary, as /v1/responses/compact answers it."""

    encrypted_content: str
    id: str | None = None
    created_by: str | None = None


class ItemReference(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An item of a stored response's output, by its id."""

    id: str


ITEMS: dict[str, type[msgspec.Struct]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
    "compaction": CompactionItem,
    "item_reference": ItemReference,
}


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of content that is a text."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None
    parsed: Parsed = None


class RefusalPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of content by which the model refused."""

    refusal: str


MESSAGE_PARTS: dict[str, type[msgspec.Struct]] = {
    "input_text": TextPart,
    "output_text": TextPart,
    "text": TextPart,
    "refusal": RefusalPart,
}
OUTPUT_PARTS: dict[str, type[msgspec.Struct]] = {"input_text": TextPart, "output_text": TextPart, "text": TextPart}
REASONING_PARTS: dict[str, type[msgspec.Struct]] = {"reasoning_text": TextPart, "summary_text": TextPart}


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that may be called."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Annotated[Literal[False], Meta(description="Only false: every tool is known.")] | None = None


class NamespaceTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Functions that belong together. The model knows each by the names of both: namespace__name."""

    name: Annotated[str, Meta(min_length=1, max_length=126)]
    tools: list[dict[str, Any]]
    description: str | None = None


TOOLS: dict[str, type[msgspec.Struct]] = {"function": FunctionTool, "namespace": NamespaceTool}


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function by its name, in tool_choice."""

    name: str
    namespace: str | None = None


class AllowedTools(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The tools of a tool_choice of the type allowed_tools."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


CHOICES: dict[str, type[msgspec.Struct]] = {"function": NamedFunction, "allowed_tools": AllowedTools}


_KEPT = "As include[]=...: encrypted_content is added; log-probabilities are there if the response was made with them."


class ResponseQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query of GET /v1/responses/{response_id}."""

    stream: Annotated[bool, Meta(description="Only false: stored responses are not streamed.")] | None = None
    include: Annotated[Include, Meta(description=_KEPT)] | None = None
    include_obfuscation: Annotated[bool, Meta(description="Only false: there is no padding.")] | None = None


class InputItemsQuery(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The query of GET /v1/responses/{response_id}/input_items."""

    limit: Annotated[int, Meta(ge=1, le=100, description="Most items (20).")] | None = None
    order: Annotated[Literal["asc", "desc"], Meta(description="The newest first (desc) or last.")] | None = None
    after: Annotated[str, Meta(description="The id of the item after which to begin.")] | None = None
    include: Annotated[Include, Meta(description=_KEPT)] | None = None
