"""The requests of /v1/messages and /v1/messages/count_tokens: fields, content blocks, tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ..fields import CacheControl, DirectCaller, ModelName, Stream

Blocks = list[dict[str, Any]]


class TextBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text."""

    text: str
    cache_control: CacheControl | None = None
    citations: Annotated[list[Any], Meta(max_length=0)] | None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Thinking of the model. A signature that this server made of omitted thinking is read, any other is not looked
    at."""

    thinking: str
    signature: str = ""


class RedactedThinkingBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Thinking that only another server can read; it is left out of the prompt."""

    data: str


class ToolUseBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: DirectCaller | None = None


class ToolResultBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a call returned."""

    tool_use_id: str
    content: str | Blocks = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ToolReferenceBlock(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that a search has found: from here on the model knows it, though its loading was deferred."""

    tool_name: str
    cache_control: CacheControl | None = None


TEXT_BLOCKS: dict[str, type[msgspec.Struct]] = {"text": TextBlock}
RESULT_BLOCKS: dict[str, type[msgspec.Struct]] = {"text": TextBlock, "tool_reference": ToolReferenceBlock}
USER_BLOCKS: dict[str, type[msgspec.Struct]] = {"text": TextBlock, "tool_result": ToolResultBlock}
ASSISTANT_BLOCKS: dict[str, type[msgspec.Struct]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
}


class AnthropicMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class CustomTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that may be called."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    input_examples: (
        Annotated[list[dict[str, Any]], Meta(description="The model knows them as the schema's examples.")] | None
    ) = None
    defer_loading: (
        Annotated[bool, Meta(description="The model knows it once a tool_result has a tool_reference to it.")] | None
    ) = None


class AutoChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool_choice of the types auto and any."""

    disable_parallel_tool_use: bool | None = None


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool_choice of the type tool."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool_choice of the type none."""


CHOICES: dict[str, type[msgspec.Struct]] = {
    "auto": AutoChoice,
    "any": AutoChoice,
    "tool": ToolChoice,
    "none": NoChoice,
}

Display = Annotated[
    Literal["summarized", "omitted"],
    Meta(description='With "omitted" a block of thinking is empty, and its signature has the thinking, encoded.'),
]


class EnabledThinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model thinks. Its thinking is not cut at the budget: max_tokens is for thinking and answer together."""

    budget_tokens: Annotated[int, Meta(ge=1)]
    display: Display | None = None


class AdaptiveThinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model thinks as its template has it."""

    display: Display | None = None


class DisabledThinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model does not think, if its template can turn that off."""


THINKING: dict[str, type[msgspec.Struct]] = {
    "enabled": EnabledThinking,
    "adaptive": AdaptiveThinking,
    "disabled": DisabledThinking,
}


class JsonOutput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An output_config.format of the type json_schema."""

    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer."""

    effort: (
        Annotated[
            Literal["low", "medium", "high", "xhigh", "max"],
            Meta(description="The template gets it as reasoning_effort."),
        ]
        | None
    ) = None
    format: Annotated[dict[str, Any], Meta(description='Only {"type": "json_schema", "schema": ...}.')] | None = None


class ClearThinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one edit of a context that is accepted: it clears nothing."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What to clear of a long context: nothing."""

    edits: list[ClearThinking] = []


class AnthropicMetadata(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The user whose request this is. It has no effect."""

    user_id: str | None = None


class CountTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation whose tokens are to be counted."""

    messages: Annotated[list[AnthropicMessage], Meta(min_length=1)]
    model: ModelName | None = None
    system: Annotated[str | Blocks, Meta(description="A text, or blocks of text.")] | None = None
    tools: Annotated[list[dict[str, Any]], Meta(description="Tools that may be called.")] | None = None
    tool_choice: (
        Annotated[dict[str, Any], Meta(description="Its type is auto, any, tool (with a name) or none.")] | None
    ) = None
    thinking: (
        Annotated[
            dict[str, Any],
            Meta(
                description="Its type is enabled (with budget_tokens, at which thinking is not cut), adaptive or "
                "disabled (the default); the template gets enable_thinking."
            ),
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None
    context_management: Annotated[ContextManagement, Meta(description="Only what clears nothing.")] | None = None
    cache_control: Annotated[CacheControl, Meta(description="Accepted; every prefix is cached.")] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """A conversation to be continued. A last message of the assistant is continued."""

    max_tokens: Annotated[int, Meta(ge=1, description="Most new tokens, those of thinking included.")]
    stop_sequences: Annotated[list[str], Meta(description="Texts at which to stop; they are not returned.")] | None = (
        None
    )
    temperature: Annotated[float, Meta(ge=0, description="0 is greedy.")] | None = None
    top_p: (
        Annotated[float, Meta(gt=0, le=1, description="Keep the likeliest tokens that together reach top_p.")] | None
    ) = None
    top_k: Annotated[int, Meta(ge=-1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")] | None = None
    stream: Stream | None = None
    metadata: Annotated[AnthropicMetadata, Meta(description="Accepted; has no effect.")] | None = None
    user_profile_id: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    service_tier: (
        Annotated[Literal["auto", "standard_only"], Meta(description="Accepted; there is one tier.")] | None
    ) = None


_REFUSED_BOTH = {
    "container": "this server runs no code",
    "mcp_servers": "this server calls no tools; call them yourself",
    "inference_geo": "the server is where it is",
    "speed": "there is one speed",
    "stop": "its name is stop_sequences here",
    "thread": "conversations are not kept; send all messages",
    "compaction": "the server compacts nothing; shorten the messages yourself",
    "fallbacks": "the model that is asked answers",
    "diagnostics": "prompts are not compared; usage says what was cached",
}
REFUSED_COUNT_TOKENS = {**_REFUSED_BOTH, "max_tokens": "it has no part in the count"}
REFUSED_MESSAGES = {
    **_REFUSED_BOTH,
    "max_completion_tokens": "its name is max_tokens here",
    "output_format": "its name is output_config.format here",
    "n": "an answer is one message; use /v1/chat/completions",
}
