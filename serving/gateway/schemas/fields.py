"""Request fields that several routes have, and what they mean to the sampler."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ....engine.errors import InvalidRequest
from ....engine.protocol.messages import ModelInfo
from ....engine.protocol.sampling_params import LOGPROBS_LIMIT, REPETITION_PENALTIES, SamplingParams
from ..config import GatewayConfig
from ..http.errors import ApiError, from_engine, invalid
from .structured import ResponseFormat, StructuredOutputs

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream holds beside the answer."""

    include_usage: Annotated[bool, Meta(description="End with a chunk that has the usage and no choices.")] | None = (
        None
    )
    continuous_usage_stats: Annotated[bool, Meta(description="Put the usage so far into every chunk.")] | None = None
    include_obfuscation: (
        Annotated[bool, Meta(description="Only false: padding against traffic analysis is not added.")] | None
    ) = None


class CacheControl(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where a prefix may be cached. Every prefix is, so that it has no effect."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class CacheBreakpoint(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where OpenAI's API ends a cached prefix. Every prefix is cached, so that it has no effect."""

    mode: Literal["explicit"]


Parsed = Annotated[Any, Meta(description="What OpenAI's client made of the text; it is left out of the prompt.")]
"""It is in an answer that the client's `parse` or `stream` has read, and comes back with it."""


class DirectCaller(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Who called a tool: the model."""

    type: Literal["direct"]


class SamplingFields(msgspec.Struct, kw_only=True):
    """How tokens are chosen, and when to stop."""

    # How to choose.
    temperature: (
        Annotated[
            float,
            Meta(ge=0, description="0 is greedy. Absent: default_temperature, the model's own, or else 1."),
        ]
        | None
    ) = None
    top_p: (
        Annotated[float, Meta(gt=0, le=1, description="Keep the likeliest tokens that together reach top_p.")] | None
    ) = None
    top_k: Annotated[int, Meta(ge=-1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")] | None = None
    min_p: (
        Annotated[float, Meta(ge=0, le=1, description="Keep tokens at least min_p times as likely as the likeliest.")]
        | None
    ) = None
    presence_penalty: (
        Annotated[Penalty, Meta(description="Subtracted from the logits of tokens already in the answer.")] | None
    ) = None
    frequency_penalty: (
        Annotated[Penalty, Meta(description="Subtracted from a token's logit for each time it is in the answer.")]
        | None
    ) = None
    repetition_penalty: (
        Annotated[
            float,
            Meta(
                ge=REPETITION_PENALTIES[0],
                le=REPETITION_PENALTIES[1],
                description="Divides the logits of tokens in prompt and answer.",
            ),
        ]
        | None
    ) = None
    logit_bias: Annotated[dict[TokenId, Bias], Meta(description="Added to the logits of these token ids.")] | None = (
        None
    )
    allowed_token_ids: (
        Annotated[list[TokenId], Meta(min_length=1, description="The only token ids that may be sampled.")] | None
    ) = None
    bad_words: Annotated[list[str], Meta(description="Texts that may not be sampled.")] | None = None
    seed: (
        Annotated[
            int,
            Meta(ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer, whatever else runs."),
        ]
        | None
    ) = None
    n: Annotated[int, Meta(ge=1, description="Completions of each prompt.")] | None = None

    # When to stop.
    stop: Annotated[str | list[str], Meta(description="Texts at which to stop; they are not returned.")] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(description="Token ids at which to stop.")] | None = None
    include_stop_str_in_output: Annotated[bool, Meta(description="Return the stop string, too.")] | None = None
    ignore_eos: Annotated[bool, Meta(description="Go on past the model's end-of-sequence.")] | None = None
    min_tokens: Annotated[int, Meta(ge=0, description="New tokens before the answer may end.")] | None = None

    # What the answer holds.
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text (true).")] | None = None
    prompt_logprobs: (
        Annotated[
            int,
            Meta(ge=0, le=LOGPROBS_LIMIT, description="Log-probabilities of the prompt's tokens and the k likeliest."),
        ]
        | None
    ) = None


ModelName = Annotated[str, Meta(description="A name of /v1/models; the only model if absent.")]
Stream = Annotated[bool, Meta(description="Send the answer as server-sent events while it is computed.")]
ReturnTimings = Annotated[bool, Meta(description="Return how long the request waited and was computed, in seconds.")]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1, description="Lower runs first, where the engine allows it.")]
CacheSalt = Annotated[
    str, Meta(min_length=1, max_length=256, description="Cached prefixes are shared only with the same salt.")
]
RequestId = Annotated[
    str, Meta(min_length=1, max_length=256, description="Returned in the answer's id and in X-Request-Id.")
]
TruncatePromptTokens = Annotated[
    int,
    Meta(ge=-1, description="Keep the last k tokens of the prompt; -1 keeps those that fit beside max_tokens."),
]
TimeoutS = Annotated[
    float, Meta(ge=0.1, description="Seconds until the request is given up; the server's request_timeout_s holds, too.")
]


class CommonFields(SamplingFields, kw_only=True):
    """What the routes that answer with text take."""

    model: ModelName | None = None
    stream: Stream | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: Annotated[bool, Meta(description="Return the token ids of prompt and answer.")] | None = None
    return_timings: ReturnTimings | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    request_id: RequestId | None = None
    timeout: TimeoutS | None = None


class OpenAIFields(CommonFields, kw_only=True):
    """What OpenAI's two routes take beside it."""

    user: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    metadata: Annotated[dict[str, str], Meta(description="Accepted; nothing is stored.")] | None = None
    service_tier: Annotated[Literal["auto", "default"], Meta(description="Accepted; there is one tier.")] | None = None
    store: Annotated[bool, Meta(description="Only false: nothing is stored.")] | None = None
    safety_identifier: Annotated[str, Meta(description="Accepted; has no effect.")] | None = None
    prompt_cache_key: Annotated[str, Meta(description="Requests with the same key go to the same engine.")] | None = (
        None
    )
    response_format: (
        Annotated[ResponseFormat, Meta(description="The answer is JSON, by a schema or not, or a text with tags.")]
        | None
    ) = None
    structured_outputs: (
        Annotated[StructuredOutputs, Meta(description="A schema, a regular expression, choices, or a grammar.")] | None
    ) = None
    return_tokens_as_token_ids: (
        Annotated[bool, Meta(description='Name tokens in log-probabilities "token_id:123".')] | None
    ) = None
    add_special_tokens: (
        Annotated[bool, Meta(description="Add the tokenizer's special tokens: true for a text, false for messages.")]
        | None
    ) = None
    truncate_prompt_tokens: TruncatePromptTokens | None = None


def to_sampling(
    fields: SamplingFields,
    config: GatewayConfig,
    info: ModelInfo,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    max_tokens_field: str = "max_tokens",
    logprobs_field: str = "logprobs",
    prefix: str = "",
) -> SamplingParams:
    """The sampler's parameters. Raises ApiError naming the request's field, whose path begins with `prefix`."""
    try:
        check_bounds(fields, config)
    except ApiError as error:
        raise invalid(prefix + error.info.message, prefix + (error.info.param or "")) from None

    values = {
        name: value
        for name in SamplingParams.__struct_fields__
        if (value := getattr(fields, name, None)) is not None and name not in _OWN
    }
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    for name in _TUPLES & values.keys():
        values[name] = tuple(values[name])
    values = {**_defaults(config, info), **values}
    if max_tokens is not None and max_tokens > info.max_model_len:
        field = prefix + max_tokens_field
        bound = f"it must be in [1, {info.max_model_len}] (max_model_len)"
        raise invalid(f"{field}={max_tokens} is out of range: {bound}", field)
    try:
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **values)
    except InvalidRequest as error:
        own = {name: prefix + name for name in fields.__struct_fields__}
        raise from_engine(
            error, {**own, "max_tokens": prefix + max_tokens_field, "logprobs": prefix + logprobs_field}
        ) from None


def _defaults(config: GatewayConfig, info: ModelInfo) -> dict[str, float | int]:
    """What a request gets that leaves a field unset: the model's own defaults, and OpenAI's temperature of 1."""
    values: dict[str, float | int] = {"temperature": 1.0, **info.sampling_defaults}
    if config.default_temperature is not None:
        values["temperature"] = config.default_temperature
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    return values


_OWN = {"max_tokens", "logprobs", "prompt_logprobs"}
_TUPLES = {"stop", "stop_token_ids", "bad_words", "allowed_token_ids"}


def check_bounds(fields: SamplingFields, config: GatewayConfig) -> None:
    """Raise ApiError for what the schema allows and the server's bounds or the other fields do not."""
    if (fields.n or 1) > config.max_n:
        raise invalid(f"n={fields.n} is out of range: it must be in [1, {config.max_n}] (max_n)", "n")
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    for name, texts in (("stop", stop), ("bad_words", fields.bad_words or [])):
        if len(texts) > config.max_stop_strings:
            most = f"at most {config.max_stop_strings} (max_stop_strings)"
            raise invalid(f"{name} has {len(texts)} texts; it may have {most}", name)
        for index, text in enumerate(texts):
            if not 1 <= len(text) <= config.max_stop_chars:
                bound = f"1 to {config.max_stop_chars} (max_stop_chars)"
                raise invalid(f"{name}[{index}] has {len(text)} characters; it must have {bound}", f"{name}[{index}]")
    for name, entries in (
        ("logit_bias", fields.logit_bias),
        ("stop_token_ids", fields.stop_token_ids),
    ):
        if entries is not None and len(entries) > config.max_logit_bias:
            most = f"at most {config.max_logit_bias} (max_logit_bias)"
            raise invalid(f"{name} has {len(entries)} entries; it may have {most}", name)


def check_stream(stream: bool | None, options: StreamOptions | None, prompt_logprobs: int | None) -> None:
    """Raise ApiError for what does not go with stream, or without it."""
    if options is not None and not stream and any(getattr(options, name) for name in options.__struct_fields__):
        raise invalid("stream_options is only for stream=true", "stream_options")
    if options is not None and options.include_obfuscation:
        raise invalid("stream_options.include_obfuscation=true is not supported", "stream_options.include_obfuscation")
    if stream and prompt_logprobs is not None:
        raise invalid("prompt_logprobs cannot be streamed; set stream=false", "prompt_logprobs")


def check_store(fields: OpenAIFields) -> None:
    """Raise ApiError where something would have to be stored."""
    if fields.store:
        raise invalid("store=true is not supported: nothing is stored", "store", "unsupported_value")


def kept_tokens(wanted: int | None, info: ModelInfo, new_tokens: int) -> int | None:
    """Tokens at the end of a prompt that truncate_prompt_tokens keeps; None for all.

    With -1 it keeps what fits beside `new_tokens`. Raises ApiError for a number that no prompt can have.
    """
    longest = info.max_model_len
    if wanted is None:
        return None
    kept = longest - new_tokens if wanted == -1 else wanted
    if not 1 <= kept <= longest:
        why = f" beside {new_tokens} new tokens" if wanted == -1 else ""
        raise invalid(
            f"truncate_prompt_tokens={wanted} keeps {kept} tokens{why}; it must keep 1 to {longest} (max_model_len)",
            "truncate_prompt_tokens",
        )
    return kept


def timeout_of(timeout_s: float | None, config: GatewayConfig) -> float:
    """Seconds until a request is given up; 0 for no limit."""
    if timeout_s is None:
        return config.request_timeout_s
    return min(timeout_s, config.request_timeout_s or timeout_s)
