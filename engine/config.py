"""The engine's configuration: one frozen dataclass, checked where it is made."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..kernels import ATTENTION_BACKENDS, weight_formats
from ..parallel.loading.json_files import shown
from .errors import ConfigError
from .protocol.sampling_params import MAX_FLOAT, SEED_LIMIT, SamplingParams, exact, listed, plain

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
MAX_TIMEOUT_S = 7 * 24 * 3600
MOST_THREADS = 256
"""Most threads of one rank: the kernels share their work among no more."""
KV_CACHE_DTYPES = ("auto", "int8")
WEIGHTS = ("auto", "keep", "read")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
GRAPHS = ("auto", "none", "all", "lazy", "eager")
CLIENT_PRIORITIES = ("auto", "always", "never")
BIND_CPUS = ("auto", "always", "never")
COLLECTIVES = ("auto", "shared_memory", "gloo", "nccl", "symmetric_memory")
_CHOICES = {
    "dtype": DTYPES,
    "device": DEVICES,
    "collectives": COLLECTIVES,
    "client_priorities": CLIENT_PRIORITIES,
    "bind_cpus": BIND_CPUS,
    "attention": ATTENTION_BACKENDS,
    "graphs": GRAPHS,
    "quantization": weight_formats.NAMES,
    "kv_cache_dtype": KV_CACHE_DTYPES,
    "load_format": LOAD_FORMATS,
    "weights": WEIGHTS,
}
"""By the name of a field: the names it may have."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes an engine. Every rank of a group holds the same one."""

    model: str
    """A local model folder, or a hub name found in the local hub cache."""
    tokenizer: str | None = None
    """A tokenizer folder; None uses the model's. "none" loads none: requests then carry token ids."""
    tokenizer_store: str = "auto"
    """A folder that keeps the last tokenizers as transformers made them, so that the next start need not import it:
    auto (~/.cache/phalanx/tokenizers) or a path. "none" keeps none."""
    dtype: str = "auto"
    """Dtype of weights and activations: auto (the checkpoint's own), bfloat16, float16 or float32."""
    ranks: int = 1
    """Tensor-parallel ranks, 1 to the number of query heads; nothing has to divide."""
    rank_weights: tuple[float, ...] | None = None
    """Relative share of each rank, for cards of different size; None makes all shares equal."""
    device: str = "auto"
    """auto (cuda where there is one), cpu or cuda."""
    collectives: str = "auto"
    """How ranks exchange tensors: auto (the fastest that works here), shared_memory (in one host), gloo (also between
    hosts), nccl, or symmetric_memory (nccl, and for small sums memory that the GPUs of one host share). nccl and
    symmetric_memory need device=cuda. shared_memory and gloo copy a GPU's tensors through the host, which is slow, but
    lets several ranks share a GPU."""
    threads: int = 0
    """CPU threads of each rank, at most 256; 0 divides the physical cores of this host among its ranks (hyperthreads of
    one core share its arithmetic units)."""
    bind_cpus: str = "auto"
    """Bind CPU ranks to NUMA nodes, and each thread that computes to a core: auto (where this process may use CPUs of
    several nodes), always (on one node too), or never (also for ranks that somebody else has bound, with numactl or
    torchrun --numa-binding: set threads as well then). In a process of the caller's own, only the kernels' threads are
    bound. Several engines on one host would choose the same CPUs: start each on CPUs of its own, by taskset or
    numactl."""
    max_model_len: int | None = None
    """Most prompt and output tokens of one request; None takes the model's own limit."""
    max_num_seqs: int = 64
    """Most sequences computed in one step."""
    max_num_batched_tokens: int = 2048
    """Most tokens computed in one step: the step's budget."""
    client_priorities: str = "auto"
    """Whether requests run in the order of the priorities that clients give them: auto (those of clients in the
    engine's process or on its host, over ipc://, not those over tcp://), always, or never."""
    max_queue: int = 16384
    """Requests that may wait; more are refused with CapacityExceeded."""
    block_size: int | None = None
    """Tokens of one KV block; None lets the attention backend choose: 16 with cpu and torch, 64 with triton, 128 with
    flash_attn_3, 256 with flash_attn_2. With cpu and flash_attn_* a set value must be a multiple of that default, with
    triton a power of two from 16; torch takes any."""
    kv_memory: float = 0.9
    """Size of one rank's KV cache: bytes if above 1, else the fraction of a GPU's memory that the whole engine may use.
    On a CPU the fraction applies to the memory that is free once the weights are loaded. The cache is never larger than
    max_num_seqs sequences of max_model_len tokens need."""
    kv_cache_dtype: str = "auto"
    """Format of the KV cache: auto (same as dtype) or int8 (8 bits for each number, and a scale for each head of a
    token; half of bfloat16's memory). int8 needs phalanx's own kernels on a CPU."""
    prefix_cache: bool = True
    """Reuse the KV blocks of equal prompt beginnings."""
    attention: str = "auto"
    """Attention backend: auto (the best that can serve; the engine's report says which and why), torch, cpu (phalanx's
    own kernels for CPUs), triton (its own for GPUs), or flash_attn_2 or flash_attn_3 (packages, where installed)."""
    graphs: str = "auto"
    """CUDA graphs of decode steps: auto (all, where device and attention allow it), none, all (captured at the start),
    lazy (captured while serving, so that the start is faster), or eager (padded like a graph's steps, but their
    operations run one by one: to find faults)."""
    overlap: bool | None = None
    """Plan and send the next step while one is computed; tokens stay on the device meanwhile. None: only on a GPU."""
    quantization: str = "none"
    """Format of the weights: none (same as dtype), int8 (8 bits and a scale for each 32 inputs), w8a8 (8 bits and a
    scale for each output; activations of 8 bits too) or int4 (4 bits and a scale for each 64 inputs). All but none need
    a CPU and round the weights while a bfloat16 checkpoint loads. The head, and an embedding tied to it, keep at least
    8 bits."""
    deterministic: bool = False
    """Compute a token's logits to the same bits whatever else its step computes: whole prompts or chunks of them, alone
    or in a batch. On a CPU phalanx's own kernels do so anyway, and the setting changes nothing, except for int8 weights
    on Xeons with AMX (quantization=int8, and the head of w8a8 and int4): there more than 16 rows are multiplied in
    bfloat16, no more than 16 in integers; true has all in integers, and prompts take about four times as long. It is
    refused where those kernels do not serve, and with three ranks and more that gloo connects."""
    load_format: str = "auto"
    """auto and safetensors read the model folder; dummy fills the weights with seeded random numbers."""
    weights: str = "read"
    """What a group of its own processes does with its weights when a rank dies: keep (on a CPU they stand, packed, in
    shared memory of the supervisor's, and the next ranks map them; they take no more memory), read (they are read and
    packed again), or auto (keep where that costs a step nothing, which is where the system makes huge pages of shared
    memory: Linux 6.1 and later). On a GPU, and where torchrun starts the ranks, they are read again, from the system's
    page cache as far as it holds them."""
    seed: int = 0
    """Seed of the requests that bring none, and of dummy weights."""
    timeout_s: float = 300.0
    """Seconds a rank waits for another inside one operation before it gives up."""
    max_restarts: int = 5
    """How often a group of its own processes (ranks above 1, or launch.serve) is started again within restart_window_s
    when a rank dies or hangs; its requests go on where they were. 0: the group's end is that of the engine."""
    restart_window_s: float = 600.0
    """Seconds in which max_restarts is counted."""
    step_timeout_s: float = 30.0
    """Seconds without any progress within a step after which such a group counts as hung; more, up to timeout_s, where
    its steps are seen to take long. Its ranks' stacks are written to standard error, and it is started again."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """max_tokens, temperature, top_k, top_p, min_p and repetition_penalty of requests that leave them unset (None). The
    launch programs take the other fields too, as the defaults of every request."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = exact(plain(getattr(self, each.name)))
            is_path = each.name in ("model", "tokenizer", "tokenizer_store") and isinstance(value, os.PathLike)
            object.__setattr__(self, each.name, os.fspath(value) if is_path else value)
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError(f"model={shown(self.model)} must be a folder or a hub name")

        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        for name, allowed in _CHOICES.items():
            _one_of(name, getattr(self, name), allowed)
        for name in ("ranks", "max_num_seqs", "max_num_batched_tokens", "max_queue"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_model_len", "block_size"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _at_least("threads", self.threads, 0)
        if self.threads > MOST_THREADS:
            raise ConfigError(f"threads={self.threads} must be at most {MOST_THREADS}, or 0 for this host's cores")
        _at_least("max_restarts", self.max_restarts, 0)

        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: "
                f"each running sequence needs one token of the budget a step; "
                f"raise max_num_batched_tokens or lower max_num_seqs"
            )

        if not _is_positive(self.kv_memory):
            raise ConfigError(f"kv_memory={shown(self.kv_memory)} must be bytes (above 1) or a fraction in (0, 1]")
        if not _is_positive(self.timeout_s):
            raise ConfigError(f"timeout_s={shown(self.timeout_s)} must be a number of seconds above 0")
        if self.timeout_s > MAX_TIMEOUT_S:
            raise ConfigError(f"timeout_s={shown(self.timeout_s)} must be at most {MAX_TIMEOUT_S} seconds, a week")

        for name in ("restart_window_s", "step_timeout_s"):
            if not _is_positive(getattr(self, name)):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be a number of seconds above 0")

        if not isinstance(self.overlap, bool | None):
            raise ConfigError(f"overlap={shown(self.overlap)} must be true, false or null (on a GPU)")
        for name in ("prefix_cache", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={shown(getattr(self, name))} must be true or false")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not abs(self.seed) <= SEED_LIMIT:
            raise ConfigError(f"seed={shown(self.seed)} must be an integer in [-{SEED_LIMIT}, {SEED_LIMIT}]")
        if not isinstance(self.tokenizer, str | None):
            raise ConfigError(f'tokenizer={shown(self.tokenizer)} must be a folder, a hub name or "none"')
        if not isinstance(self.tokenizer_store, str) or not self.tokenizer_store:
            raise ConfigError(f'tokenizer_store={shown(self.tokenizer_store)} must be "auto", a folder, or "none"')
        for name in ("model", "tokenizer", "tokenizer_store"):
            _check_unicode(name, getattr(self, name))
        if self.sampling is None or isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", SamplingParams.from_dict(dict(self.sampling or {})))
        if not isinstance(self.sampling, SamplingParams):
            raise ConfigError(f"sampling={shown(self.sampling)} must be a mapping of sampling fields")

        if self.rank_weights is not None:
            self._check_rank_weights(self.rank_weights)

    def _check_rank_weights(self, weights: Any) -> None:
        if not isinstance(weights, set | frozenset):  # which has no order
            weights = listed(weights, self.ranks + 1)
        if isinstance(weights, list):
            weights = [exact(weight) for weight in weights]
        if not isinstance(weights, list | tuple) or len(weights) != self.ranks or not all(map(_is_positive, weights)):
            raise ConfigError(
                f"rank_weights={shown(weights)} must be {self.ranks} positive numbers, one for each of "
                f"ranks={self.ranks}"
            )
        object.__setattr__(self, "rank_weights", tuple(map(float, weights)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Build from plain data (`sampling` a dict); an unknown name raises ConfigError with the nearest right one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ConfigError(unknown_name("configuration key", name, names))
        return cls(**values)


def seconds(name: str, value: Any) -> float:
    """Return a time that a caller gives, as a float that the system can wait for.

    Raises ConfigError for what is no number, or below 0.
    """
    number = exact(plain(value))
    if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
        raise ConfigError(f"{name}={shown(value)} must be a number of seconds of at least 0")
    return float(min(number, threading.TIMEOUT_MAX))


def unknown_name(kind: str, name: str, allowed: list[str]) -> str:
    """A message for a name that is not one of `allowed`, with the nearest that is."""
    import difflib

    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"unknown {kind} {shown(name)}{hint} the allowed ones are {', '.join(allowed)}"


def _dtype_name(value: Any) -> Any:
    """Return the name of a dtype of numpy or torch; anything else as it is."""
    is_dtype = type(value).__module__.partition(".")[0] in ("numpy", "torch") and not isinstance(value, str)
    return str(value).removeprefix("torch.") if is_dtype else value


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    # Another type's value may equal a name, and no message to a rank holds it.
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={shown(value)} is not supported; it must be one of {', '.join(allowed)}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_FLOAT


def _check_unicode(name: str, text: str | None) -> None:
    """Raise ConfigError for a path that no message to a rank, and no tokenizer, can hold."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}={shown(text)} is not valid Unicode ({error}): rename the folder") from error


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}={shown(value)} must be an integer of at least {low}")
    if value > SEED_LIMIT:
        raise ConfigError(f"{name}={shown(value)} must be at most {SEED_LIMIT}")
