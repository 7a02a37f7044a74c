"""The numbers of launch.plan: what each rank of a model needs, what fits, and which changes would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...engine.config import EngineConfig
from ...engine.errors import ConfigError
from ...engine.models.spec import ModelSpec, dimensions, position_limit
from ...kernels.weight_formats import WeightFormat, get_weight_format
from ...parallel.partition import Partition, PartitionError, RankShard, partition

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
RUNTIME_BYTES = 2**29
"""Of a rank, beside tensors: the CUDA context, communication buffers, library workspaces."""
SCALE_BYTES = 4
"""Of a head's key or value of one token in a KV cache of int8."""
REQUEST_TOKENS = 32768
HIGHEST_FRACTION = 0.97
"""Of a device's memory that kv_memory is ever advised to be: the rest is the driver's."""
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Setup:
    """What to plan for: the engine's settings, and the bytes of each rank's device, if it is to be seen what fits."""

    config: EngineConfig
    device_memory: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RankNeeds:
    """One rank's memory, in bytes."""

    weights: int
    activations: int
    kv_token: int
    """Of the KV cache, for each token."""
    kv_room: int | None
    """For the KV cache; None if neither device_memory nor kv_memory in bytes says how much."""
    lacking: int = 0
    """By which the device is too small for all that comes before the KV cache, or is given to it in bytes."""

    @property
    def used(self) -> int:
        """Bytes of all but the KV cache."""
        return self.weights + self.activations

    @property
    def kv_tokens(self) -> int | None:
        """Tokens of KV cache that there is room for."""
        return None if self.kv_room is None else self.kv_room // self.kv_token

    def needed(self, tokens: int) -> int:
        """Bytes of everything, with a KV cache of so many tokens."""
        return self.used + tokens * self.kv_token


@dataclass(frozen=True)
class Plan:
    """A model on N ranks."""

    spec: ModelSpec
    setup: Setup
    parts: Partition
    needs: tuple[RankNeeds, ...]
    max_model_len: int

    @property
    def request_tokens(self) -> int:
        """Of one long request: 32k, or max_model_len if that is less."""
        return min(self.max_model_len, REQUEST_TOKENS)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that every rank has room for."""
        tokens = [need.kv_tokens for need in self.needs if need.kv_tokens is not None]
        return min(tokens) if tokens else None

    @property
    def fits(self) -> bool | None:
        """Whether an engine would start: everything has its place, and one sequence of max_model_len too.

        None if it was not said how much memory there is.
        """
        if self.kv_tokens is None:
            return None
        return self.kv_tokens >= self.max_model_len and not any(need.lacking for need in self.needs)


def make_plan(spec: ModelSpec, setup: Setup) -> Plan:
    """The needs of every rank. Raises ConfigError for ranks or max_model_len out of the model's range."""
    config, weight_format = setup.config, get_weight_format(setup.config.quantization)
    item = ITEM_BYTES[spec.dtype if config.dtype == "auto" else config.dtype]
    try:
        parts = partition(dimensions(spec), config.ranks, config.rank_weights, weight_format)
    except PartitionError as error:
        raise ConfigError(str(error)) from error
    limit = position_limit(spec)
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's {limit} positions; lower max_model_len to at "
            f"most {limit}"
        )
    needs = []
    for share in parts.shares:
        weights = weight_bytes(parts, share, weight_format, item)
        activations = activation_bytes(spec, share, config, item)
        memory = None if setup.device_memory is None else setup.device_memory[share.rank]
        room, lacking = kv_room(memory, weights + activations, config.kv_memory)
        kv_token = parts.kv_elements_per_token(share.rank) * item
        if config.kv_cache_dtype == "int8":
            kv_token = parts.kv_elements_per_token(share.rank) // spec.head_dim * (spec.head_dim + SCALE_BYTES)
        needs.append(RankNeeds(weights, activations, kv_token, room, lacking))
    return Plan(spec, setup, parts, tuple(needs), config.max_model_len or limit)


def weight_bytes(parts: Partition, share: RankShard, weight_format: WeightFormat, item: int) -> int:
    """What a rank's weights take, of `item` bytes each where they are not in a format.

    In a format are the layers' matrices and, in its format for heads, the head; a table of embeddings only where it is
    the head. (The norms, of less than a thousandth, are counted like the layers, whose rows all count as of hidden_size
    columns.)
    """
    d, vocab = parts.dimensions, len(share.vocab)
    rows = parts.parameters(share.rank) // d.hidden_size - vocab * (1 if d.tied_embeddings else 2)
    embeddings = 0 if d.tied_embeddings else vocab * d.hidden_size * item
    head = weight_format.for_head().nbytes(vocab, d.hidden_size, item)
    return weight_format.nbytes(rows, d.hidden_size, item) + head + embeddings


def activation_bytes(spec: ModelSpec, share: RankShard, config: EngineConfig, item: int) -> int:
    """What a rank needs for one full step, in bytes: a reserve, rather too large than too small.

    For each of max_num_batched_tokens: the float32 residual and its normalised float32 copy, three hidden vectors (a
    block's input, its output, one in the all-reduce), and the larger of attention (q, k, v, the rotated q and k, the
    output) and MLP (gate, up, their product). For each of max_num_seqs: this rank's logits, and three float32 copies
    of them while sampling. And RUNTIME_BYTES. `item` is the bytes of an activation.
    """
    queries, kv = len(share.query_heads), len(share.kv_heads)
    attention = 3 * (queries + kv) * spec.head_dim
    token = (2 * 4 + 3 * item) * spec.hidden_size + item * max(attention, 3 * len(share.mlp))
    row = (item + 3 * 4) * len(share.vocab)
    return config.max_num_batched_tokens * token + config.max_num_seqs * row + RUNTIME_BYTES


def kv_room(memory: int | None, used: int, kv_memory: float) -> tuple[int | None, int]:
    """(bytes for the KV cache, bytes lacking) on a device of `memory` bytes of which `used` are taken otherwise.

    `kv_memory` is EngineConfig's: bytes above 1, else the fraction of the device that may be used in all.
    """
    if kv_memory > 1:
        given = int(kv_memory)
        return given, 0 if memory is None else max(0, used + given - memory)
    if memory is None:
        return None, 0
    room = int(memory * kv_memory) - used
    return max(0, room), max(0, -room)


def smallest_fit(spec: ModelSpec, setup: Setup) -> int | None:
    """The fewest ranks that fit, evenly dealt over devices like the smallest one; None if no number does."""
    for ranks in range(1, spec.num_query_heads + 1):
        config = dataclasses.replace(setup.config, ranks=ranks, rank_weights=None)
        memory = None if setup.device_memory is None else (min(setup.device_memory),) * ranks
        if make_plan(spec, Setup(config, memory)).fits:
            return ranks
    return None


def remedies(plan: Plan) -> list[str]:
    """Changes, each of which alone would make it fit, as one would write them on the command line."""
    return [
        " ".join(f"{name}={_written(name, value)}" for name, value in change.items())
        for change in _changes(plan)
        if _after(plan, **change).fits
    ]


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Changes that may make a plan fit."""
    config, memory, longest = plan.setup.config, plan.setup.device_memory, plan.max_model_len
    if memory is not None and len(set(memory)) > 1:
        yield {"rank_weights": tuple(round(size / min(memory), 2) for size in memory)}
    elif (ranks := smallest_fit(plan.spec, plan.setup)) is not None:
        yield {"ranks": ranks} | ({} if config.rank_weights is None else {"rank_weights": None})
    if plan.kv_tokens and plan.kv_tokens < longest:
        yield {"max_model_len": plan.kv_tokens // 256 * 256 or plan.kv_tokens}
    if memory is None:
        yield {"kv_memory": -(-max(need.kv_token for need in plan.needs) * longest // MIB) * MIB}
        return
    if config.kv_memory > 1:
        room = min(size - need.used for size, need in zip(memory, plan.needs, strict=True))
        if room > MIB:
            yield {"kv_memory": room // MIB * MIB}
        needed = max(need.used for need in plan.needs) + int(config.kv_memory)
    else:
        fraction = max(need.needed(longest) / size for size, need in zip(memory, plan.needs, strict=True))
        if fraction <= HIGHEST_FRACTION:
            yield {"kv_memory": math.ceil(fraction * 100) / 100}
        needed = math.ceil(max(need.needed(longest) for need in plan.needs) / config.kv_memory)
    yield {"device_memory": int(math.ceil(needed * 10 / GIB) / 10 * GIB)}


def _after(plan: Plan, device_memory: int | None = None, **change: Any) -> Plan:
    config, memory = dataclasses.replace(plan.setup.config, **change), plan.setup.device_memory
    if device_memory is not None:
        memory = (device_memory,) * config.ranks
    elif memory is not None and len(memory) != config.ranks:
        memory = memory[:1] * config.ranks
    return make_plan(plan.spec, Setup(config, memory))


def _written(name: str, value: Any) -> str:
    if name == "device_memory":
        return f"{value / GIB:.1f}GiB"
    if name == "kv_memory" and value > 1:
        return f"{value // MIB}MiB"
    if isinstance(value, tuple):
        return f"[{','.join(f'{part:g}' for part in value)}]"
    return "null" if value is None else str(value)
