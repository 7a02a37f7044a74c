"""The requests of the routes about token ids: /tokenize, /detokenize, /inference/v1/generate."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from ....engine.protocol.sampling_params import LOGPROBS_LIMIT
from .chat import Message
from .fields import (
    CacheSalt,
    ModelName,
    Priority,
    RequestId,
    ReturnTimings,
    SamplingFields,
    Stream,
    StreamOptions,
    TimeoutS,
    TokenId,
    TruncatePromptTokens,
)


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation whose token ids are wanted: exactly one of prompt and messages."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    add_special_tokens: (
        Annotated[bool, Meta(description="Add the tokenizer's special tokens; true for prompt, false for messages.")]
        | None
    ) = None
    return_token_strs: Annotated[bool, Meta(description="Return each token's text, too.")] | None = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None
    add_generation_prompt: Annotated[bool, Meta(description="Begin an answer (true).")] | None = None
    continue_final_message: Annotated[bool, Meta(description="Leave the last message open.")] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids whose text is wanted."""

    model: ModelName | None = None
    tokens: list[TokenId]


class GenerateSampling(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """How /inference/v1/generate chooses and stops."""

    max_tokens: Annotated[int, Meta(ge=1, description="Most new tokens.")] | None = None
    logprobs: (
        Annotated[int, Meta(ge=0, le=LOGPROBS_LIMIT, description="Log-probabilities of tokens and the k likeliest.")]
        | None
    ) = None


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids to be continued; the answer is token ids."""

    token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling_params: GenerateSampling | None = None
    model: ModelName | None = None
    stream: Stream | None = None
    stream_options: StreamOptions | None = None
    return_timings: ReturnTimings | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    request_id: RequestId | None = None
    timeout: TimeoutS | None = None
