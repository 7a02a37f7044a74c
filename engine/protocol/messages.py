"""The protocol between a client and the coordinator: msgspec structs, tagged, never pickle."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ..errors import InvalidRequest
from .logprobs import TokenLogprobs
from .sampling_params import SamplingParams
from .structured import StructuredOutput

PROTOCOL_VERSION = 3
"""Both sides of a wire must have the same one; a Ping tells a client which one the engine has."""
MESSAGE_BYTES = 32 * 2**20
"""Most bytes of a command. ZeroMQ cuts the connection of whoever sends more, before it has taken it all in."""
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that are no message; RecursionError for lists nested a thousand deep."""


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """What a request begins with: exactly one of prompt, messages and token_ids is set."""

    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    token_ids: list[int] | None = None
    add_special_tokens: bool = True
    """With `prompt`: whether the tokenizer adds the special tokens that it adds by itself."""
    truncate_prompt_tokens: int | None = None
    """How many tokens at the end of what was encoded are kept, at least 1; None keeps all."""

    # What the chat template gets beside `messages`.
    tools: list[dict[str, object]] | None = None
    chat_template_kwargs: dict[str, object] | None = None
    """Variables of the template, such as enable_thinking."""
    add_generation_prompt: bool = True
    """Whether the rendered text ends with the beginning of an answer."""
    continue_final_message: bool = False
    """Whether the answer continues the last message; add_generation_prompt is false then."""


class ResumedCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """What a client has of one completion, from the Deltas of an engine that has gone."""

    token_ids: list[int] = []
    characters: int = 0
    """Characters of `Delta.text` that it has."""
    reasoning_characters: int = 0
    """Characters of `Delta.reasoning` that it has."""


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """Go on with a request that another engine had accepted: the Deltas begin where those of that engine ended.

    The Submit is the same otherwise, with the seed that Accepted told. Log-probabilities and timings count what was
    before, and a completion that has all its tokens ends as it did there.
    """

    completions: list[ResumedCompletion]
    """One for each of the n completions, by index."""
    age_s: float = 0.0
    """Seconds since the request was first sent."""
    ttft_s: float | None = None
    """Seconds from then to its first output token; None if there is none yet."""
    cached_tokens: int | None = None
    """What its first Delta told of the prefix cache; None if there was none yet."""


class Submit(Prompt, frozen=True, kw_only=True, tag="submit"):
    """One request."""

    id: str
    sampling: SamplingParams = SamplingParams()
    priority: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] = 0
    """Lower runs first."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    structured: StructuredOutput | None = None
    """What each answer must match; of an answer that begins with thinking, what comes after it."""
    return_prompt_token_ids: bool = False
    """Whether Finished holds the prompt's token ids."""
    split_reasoning: bool = False
    """Whether a model's thinking (<think>...</think>) comes as `Delta.reasoning`, without its tags, apart from the
    answer's text. Without it both are text, tags included."""
    stop_in_reasoning: bool = False
    """Whether sampling.stop also ends an answer within its thinking, of a request that splits it off."""
    resume: Resume | None = None
    """What the client has of the answer already, from an engine that has gone."""


class Tokenize(Prompt, frozen=True, kw_only=True, tag="tokenize"):
    """Ask for the token ids of a prompt or a conversation; Tokenized or Failed comes back."""

    id: str


class Detokenize(msgspec.Struct, frozen=True, kw_only=True, tag="detokenize"):
    """Ask for the text of token ids, special tokens included; Detokenized or Failed comes back."""

    id: str
    token_ids: list[int]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop computing a request; it ends with Finished and finish_reason "abort". An unknown id is ignored."""

    id: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the group: what is running is aborted."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    reasoning_tokens: int = 0
    """Completion tokens of thinking, its tags included; 0 unless the request splits it off."""


class Timings(msgspec.Struct, frozen=True):
    """Times of one request, measured at the coordinator from the moment it arrived there."""

    queued_s: float
    """Seconds until its first token was scheduled."""
    ttft_s: float
    """Seconds until its first output token was known (TTFT)."""
    tpot_ms: float
    """Mean milliseconds between output tokens after the first (TPOT); 0 with fewer than two."""
    total_s: float
    """Seconds until it finished."""


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """The first message of a request that will be computed."""

    id: str
    prompt_tokens: int
    seed: int
    """What its draws depend on: its own seed, or the one that the engine gave it."""
    max_tokens: int
    """Most new tokens of each completion, every default resolved."""


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """New text and tokens of one completion (`index` of n).

    `text` is exactly what `token_ids` add to the text: a token is kept back while its text is an unfinished character,
    or while any of it may be the beginning of a stop string. The last Delta of a completion has all that is left, cut
    at the stop string. Bytes that are no UTF-8 are the exception: their U+FFFD come with these tokens or the next.
    """

    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    position: int = 0
    """Output tokens of the completion before the first of `token_ids`."""
    reasoning: str = ""
    """New text of thinking, of a request that splits it off. It comes before `text`."""
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache; the request's first Delta tells them, the others have 0."""


class Completion(msgspec.Struct, frozen=True):
    """How one of the n completions ended."""

    index: int
    finish_reason: str
    """"stop" (end-of-sequence, stop token or stop string), "length" or "abort"."""
    stop_reason: str | int | None = None
    """The stop string, or the id of the stop token if it is not the model's own end-of-sequence."""
    thinking: bool = False
    """Whether it ended within thinking, so that there is no answer."""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last message of a request that was accepted; every Delta came before it."""

    id: str
    completions: list[Completion]
    usage: Usage
    timings: Timings
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last message of a request that was refused or could not go on. `error` names a type of engine/errors.py."""

    id: str
    error: str
    message: str


class Tokenized(msgspec.Struct, frozen=True, kw_only=True, tag="tokenized"):
    """The answer to a Tokenize."""

    id: str
    token_ids: list[int]
    text: str | None
    """What the chat template made of the messages; the prompt itself; None for token ids."""
    token_bytes: list[bytes]
    """The bytes each token stands for."""


class Detokenized(msgspec.Struct, frozen=True, kw_only=True, tag="detokenized"):
    """The answer to a Detokenize."""

    id: str
    text: str


class ModelInfoRequest(msgspec.Struct, frozen=True, tag="model_info_request"):
    """Ask for a ModelInfo."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, tag="model_info"):
    """What does not change while the engine runs."""

    version: str
    """phalanx's."""
    model: str
    """As the setting `model` names it."""
    dtype: str
    ranks: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    total_blocks: int
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer_class: str | None
    """None without a tokenizer."""
    chat_template: str | None
    prefix_cache: bool
    report: list[str]
    """What was chosen at the start, in words."""
    sampling_defaults: dict[str, float] = {}
    """What the settings sampling.*, or else generation_config, say of temperature, top_k, top_p, min_p and
    repetition_penalty, do_sample left aside: what a server gives to requests that leave them unset."""


class StatusRequest(msgspec.Struct, frozen=True, tag="status_request"):
    """Ask for a Status."""


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """The engine at this moment. The first one a client receives says that the engine is ready."""

    ready: bool
    ranks: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    total_blocks: int
    free_blocks: int
    running: int
    waiting: int
    steps: int
    preemptions: int
    prefix_hits: int
    """Prompt tokens served from the prefix cache since the start."""
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache since the start."""
    prompt_tokens: int = 0
    """Prompt tokens computed since the start, those from the prefix cache not counted."""
    generation_tokens: int = 0
    """Tokens sampled since the start."""
    waiting_tokens: int = 0
    """Prompt tokens of the requests that wait."""
    stalled_s: float = 0.0
    """Seconds since the step loop last went on although it has work; 0 while it has none."""
    phase_seconds: dict[str, float] = {}
    """Seconds that the step loop has spent since the start in each of its phases: schedule, launch, wait, commit."""
    peak_memory: list[int]
    """Bytes, for each rank, when the engine became ready."""
    rank_wait_seconds: list[float] = []
    """Seconds, for each rank, that it has waited for the others in sums and gathers since the start; the one that the
    others wait for has least. Empty where it is not measured, as on GPUs."""
    report: list[str]
    """What was chosen at the start, in words: dtype, backends, threads, KV tokens, generation_config defaults."""


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Ask whether the engine's process is there; its transport answers, whatever the engine does. See liveness.py."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to a Ping."""

    epoch: str
    """Differs between any two engines, also at one address."""
    client: str
    """The name under which the engine knows the connection that asked."""
    version: int = 1
    """The engine's PROTOCOL_VERSION."""


Command = Submit | Abort | Shutdown | StatusRequest | ModelInfoRequest | Tokenize | Detokenize
Event = Accepted | Delta | Finished | Failed | Status | ModelInfo | Tokenized | Detokenized

ENCODER = msgspec.msgpack.Encoder()
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_CHECKED = ("sampling", "structured")
"""Fields whose values are plain and frozen since they were made."""


def encode_command(command: Command | dict[str, Any]) -> bytes:
    """Return the bytes of a command. Raises InvalidRequest for what has none, or more than MESSAGE_BYTES."""
    try:
        data = ENCODER.encode(command)
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the {_unsendable(command)} is not valid Unicode text: {error}") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        where = _unsendable(command)
        raise InvalidRequest(f"the request holds a value that cannot be sent, in its {where}: {error}") from error
    if len(data) > MESSAGE_BYTES:
        raise InvalidRequest(
            f"the request has {len(data)} bytes; a message may have at most {MESSAGE_BYTES}: shorten it"
        )
    return data


def _unsendable(command: Command | dict[str, Any]) -> str:
    """The name of the field of a command that has no bytes."""
    values = command if isinstance(command, dict) else msgspec.structs.asdict(command)
    for name, value in values.items():
        try:
            ENCODER.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            return name
    return "fields"


def as_received(command: Command) -> Command:
    """Return a command as the other side of a wire would have it.

    So a client in the engine's process sends what any other could: nothing that its caller still changes, or that only
    looks like a number or a text. Raises InvalidRequest for what no wire carries.
    """
    if not isinstance(command, Submit | Tokenize | Detokenize):
        return command
    values = {"type": command.__struct_config__.tag, **msgspec.structs.asdict(command)}
    checked = {name: values.pop(name) for name in _CHECKED if name in values}
    try:
        return msgspec.structs.replace(_COMMANDS.decode(encode_command(values)), **checked)
    except UNDECODABLE as error:
        raise InvalidRequest(f"the request is ill-typed: {error}") from error
