"""The protocol between a client and the coordinator: msgspec structs, tagged, never pickle."""

from __future__ import annotations

import msgspec

from .logprobs import TokenLogprobs
from .sampling_params import SamplingParams


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """One request: exactly one of prompt, messages and token_ids is set."""

    id: str
    prompt: str | None = None
    messages: list[dict[str, object]] | None = None
    token_ids: list[int] | None = None
    sampling: SamplingParams = SamplingParams()
    priority: int = 0
    """Lower runs first."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""


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


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """New text and tokens of one completion (`index` of n).

    Text is kept back while it may be part of an unfinished character or stop string.
    """

    id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


class Completion(msgspec.Struct, frozen=True):
    """How one of the n completions ended."""

    index: int
    finish_reason: str
    """"stop" (end-of-sequence, stop token or stop string), "length" or "abort"."""
    stop_reason: str | int | None = None
    """The stop string, or the id of the stop token if it is not the model's own end-of-sequence."""


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """The last message of a request that was accepted; every Delta came before it."""

    id: str
    completions: list[Completion]
    usage: Usage
    timings: Timings
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs] | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The last message of a request that was refused or could not go on. `error` names a type of engine/errors.py."""

    id: str
    error: str
    message: str


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
    peak_memory: list[int]
    """Bytes, for each rank, when the engine became ready."""
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


Command = Submit | Abort | Shutdown | StatusRequest
Event = Delta | Finished | Failed | Status
