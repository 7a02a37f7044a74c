"""What /v1/messages answers: the message, its content blocks, and the events of its stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

INVALID_JSON = "INVALID_JSON"
"""Under this name a tool_use has, as text, arguments that are no JSON object."""

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnswerText(msgspec.Struct, kw_only=True, tag="text"):
    """A block of the answer: text."""

    text: str
    citations: None = None


class AnswerThinking(msgspec.Struct, kw_only=True, tag="thinking"):
    """A block of the answer: thinking."""

    thinking: str
    signature: str


class Caller(msgspec.Struct, kw_only=True, frozen=True):
    """Who calls: the model."""

    type: Literal["direct"] = "direct"


class AnswerToolUse(msgspec.Struct, kw_only=True, tag="tool_use"):
    """A block of the answer: a call. Arguments that are no JSON object are in INVALID_JSON, as text."""

    id: str
    name: str
    input: dict[str, Any]
    caller: Caller = Caller()


AnswerBlock = AnswerText | AnswerThinking | AnswerToolUse


class ThinkingTokens(msgspec.Struct, kw_only=True):
    """What the new tokens are."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct, kw_only=True):
    """Tokens of a message: the prompt's are input_tokens and cache_read_input_tokens together."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens_details: ThinkingTokens | None = None
    cache_creation: None = None
    inference_geo: None = None
    server_tool_use: None = None
    service_tier: Literal["standard"] = "standard"


class MessageAnswer(msgspec.Struct, kw_only=True):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnswerBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    container: None = None
    usage: MessageUsage


class EventDelta(msgspec.Struct, kw_only=True):
    """What is new: of a block, whose type it has, or of the message at its end."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    signature: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET
    stop_details: UnsetType | None = UNSET
    container: UnsetType | None = UNSET


class MessageEvent(msgspec.Struct, kw_only=True):
    """An event of a streamed message: which fields it has follows from its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "ping",
    ]
    message: MessageAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnswerBlock | UnsetType = UNSET
    delta: EventDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET


class TokenCount(msgspec.Struct, kw_only=True):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int
