"""The answers of each route. Fields left at their default of UNSET are not sent."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ..config import VERSION

FINGERPRINT = f"phalanx-{VERSION}"
"""What `system_fingerprint` says: answers to equal seeds may differ between two versions."""

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class PromptTokensDetails(msgspec.Struct):
    """Where the prompt's KV came from."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    """What the answer's tokens were."""

    reasoning_tokens: int


class UsageInfo(msgspec.Struct, kw_only=True):
    """Tokens of one HTTP request, all its prompts and completions together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TimingInfo(msgspec.Struct, kw_only=True):
    """Seconds of the engine's work for one prompt; queue, prefill and decode together are the total."""

    queue_s: float
    prefill_s: float
    decode_s: float
    total_s: float


class LogprobItem(msgspec.Struct, kw_only=True):
    """One token of `top_logprobs`."""

    token: str
    logprob: float
    bytes: list[int] | None


class LogprobContent(LogprobItem, kw_only=True):
    """One token of the answer and the likeliest ones in its place."""

    top_logprobs: list[LogprobItem]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities in the form of chat."""

    content: list[LogprobContent] | None
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities in the form of completions; the prompt's first token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, kw_only=True):
    """A token in one place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(msgspec.Struct, kw_only=True):
    """What a call calls."""

    name: str
    arguments: str
    """A JSON object as text, as the model wrote it."""


class AnswerToolCall(msgspec.Struct, kw_only=True):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(msgspec.Struct, kw_only=True):
    """The message that the model answered with."""

    role: str
    content: str | None
    refusal: None = None
    annotations: Annotated[list[str], Meta(max_length=0)] = []
    tool_calls: list[AnswerToolCall] | UnsetType = UNSET

    # Clients know a model's thinking by either name.
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One completion of a conversation."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    ended_in_reasoning: bool | UnsetType = UNSET
    """True of an answer that ended within thinking."""
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    system_fingerprint: str = FINGERPRINT
    service_tier: Literal["default"] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: list[TimingInfo] | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, kw_only=True):
    """What is new of what a call calls."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """What is new of a call; its first one has the id and the name."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True):
    """What is new of a message."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What is new of one completion."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    ended_in_reasoning: bool | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One event of a streamed answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str = FINGERPRINT
    usage: UsageInfo | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    timings: list[TimingInfo] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion of a prompt, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of /v1/completions, and one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo | UnsetType | None = UNSET
    system_fingerprint: str = FINGERPRINT
    timings: list[TimingInfo] | UnsetType = UNSET


class GenerateChoice(msgspec.Struct, kw_only=True):
    """One completion in token ids, or what is new of it."""

    index: int
    token_ids: list[int]
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class GenerateResponse(msgspec.Struct, kw_only=True):
    """The answer of /inference/v1/generate, and one event of a streamed one."""

    request_id: str
    choices: list[GenerateChoice]
    usage: UsageInfo | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    timings: list[TimingInfo] | UnsetType = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """One model of /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "phalanx"
    root: str
    parent: str | None = None
    max_model_len: int

    # As Anthropic's clients have them.
    type: Literal["model"] = "model"
    display_name: str
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of /v1/models: all there are, whatever page is asked for."""

    object: Literal["list"] = "list"
    data: list[ModelCard]

    # As Anthropic's clients have them.
    first_id: str | None
    last_id: str | None
    has_more: Literal[False] = False


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """The answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    """The answer of /detokenize."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """The answer of /tokenizer_info."""

    tokenizer_class: str | None
    chat_template: str | None
    vocab_size: int
    eos_token_ids: list[int]
    model_max_length: int


class VersionInfo(msgspec.Struct, kw_only=True):
    """The answer of /version."""

    version: str


class LoadInfo(msgspec.Struct, kw_only=True):
    """The answer of /load."""

    server_load: int
    """Requests that the gateway holds."""
    prompt_tokens: int
    """Their prompt tokens, about."""


class HealthInfo(msgspec.Struct, kw_only=True):
    """The answer of /health and its kin."""

    status: str
    reason: str = ""
