"""What a model needs on N ranks: `python -m phalanx.launch.plan model=qwq_32b_preview ranks=3 device_memory=48GiB`.

Reads a preset or a folder's config.json; no weights, no GPU, no torch.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from ..engine.config import DTYPES, unknown_name
from ..engine.errors import ConfigError, PhalanxError
from ..engine.models.spec import ModelSpec, dimensions, read_config, spec_from_config
from ..parallel.partition import Partition, PartitionError, partition
from .presets import load_preset, presets
from .schema import parse_size

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
RUNTIME_BYTES = 2**29
"""Of a rank, beside tensors: the CUDA context, communication buffers, library workspaces."""
REQUEST_TOKENS = 32768
GIB = 2**30
TABLE_WIDTH = 110


@dataclass
class Options:
    """The keys of launch.plan."""

    model: str = ""
    """A preset's name or a model folder."""
    ranks: int = 1
    """Tensor-parallel ranks."""
    rank_weights: Any = None
    """Relative share of each rank, for cards of different size."""
    device_memory: Any = None
    """Of each rank's device: 48GiB, 80GB, bytes, or a list, one for each rank. Unset: nothing is said of fitting."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""
    max_model_len: int | None = None
    """Tokens of one request at most; unset takes the model's own limit."""
    max_num_seqs: int = 64
    """Sequences computed in one step at most."""
    max_num_batched_tokens: int = 2048
    """Tokens computed in one step at most."""
    kv_memory: Any = 0.9
    """The fraction of a device's memory the engine may use in all, or the bytes (4GiB) of the KV cache alone."""


@dataclass(frozen=True)
class RankNeeds:
    """Bytes of one rank."""

    weights: int
    activations: int
    kv_token: int
    """Of the KV cache, for each token."""
    kv_room: int | None = None
    """Left for the KV cache; None if no device memory was named, below 0 if the weights alone do not fit."""

    @property
    def kv_tokens(self) -> int | None:
        """Tokens of KV cache that fit."""
        return None if self.kv_room is None else max(0, self.kv_room) // self.kv_token


@dataclass(frozen=True)
class Plan:
    """A model on N ranks."""

    spec: ModelSpec
    parts: Partition
    needs: tuple[RankNeeds, ...]
    request_tokens: int
    """Of one long request: 32k, or max_model_len if that is less."""

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that every rank has room for."""
        tokens = [need.kv_tokens for need in self.needs]
        return None if tokens[0] is None else min(token for token in tokens if token is not None)

    @property
    def fits(self) -> bool | None:
        """Whether one long request fits; None if no device memory was named."""
        return None if self.kv_tokens is None else self.kv_tokens >= self.request_tokens


def activation_bytes(spec: ModelSpec, parts: Partition, rank: int, options: Options, item: int) -> int:
    """Reserve for one step's tensors: per token six hidden vectors and three MLP shards, and per sequence two float32
    rows of this rank's logits (raw and processed); plus RUNTIME_BYTES.
    """
    share = parts.shares[rank]
    tokens = options.max_num_batched_tokens * (6 * spec.hidden_size + 3 * len(share.mlp)) * item
    return tokens + 2 * 4 * options.max_num_seqs * len(share.vocab) + RUNTIME_BYTES


def make_plan(spec: ModelSpec, options: Options) -> Plan:
    """The needs of every rank. Raises ConfigError for options that make no sense."""
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype={options.dtype!r} is not supported; it must be one of {', '.join(DTYPES)}")
    item = ITEM_BYTES[spec.dtype if options.dtype == "auto" else options.dtype]
    try:
        parts = partition(dimensions(spec), options.ranks, options.rank_weights)
    except PartitionError as error:
        raise ConfigError(str(error)) from error
    memory = _device_memory(options)
    needs = []
    for rank in range(options.ranks):
        weights = parts.parameters(rank) * item
        activations = activation_bytes(spec, parts, rank, options, item)
        room = None if memory is None else _kv_room(memory[rank], weights + activations, options.kv_memory)
        needs.append(RankNeeds(weights, activations, parts.kv_elements_per_token(rank) * item, room))
    limit = options.max_model_len or spec.max_position
    return Plan(spec, parts, tuple(needs), min(limit, REQUEST_TOKENS))


def smallest_fit(spec: ModelSpec, options: Options) -> int | None:
    """The fewest ranks on which one long request fits, with devices like the first one; None if no number does."""
    memory = _device_memory(options)
    if memory is None:
        return None
    for ranks in range(1, spec.num_query_heads + 1):
        tried = dataclasses.replace(options, ranks=ranks, rank_weights=None, device_memory=memory[0])
        if make_plan(spec, tried).fits:
            return ranks
    return None


def advice(plan: Plan, options: Options) -> list[str]:
    """In words: what an uneven cut costs, and what to change if it does not fit."""
    lines = []
    busiest = plan.parts.busiest_share
    if options.rank_weights is not None:
        lines.append(f"The busiest rank holds {busiest:.3f} times an even share of the weights, by rank_weights.")
    elif busiest > 1.001:
        lines.append(
            f"The busiest rank holds {busiest:.3f} times an even share of the weights: a step takes about "
            f"{100 * (busiest - 1):.1f}% longer than on {options.ranks} perfectly even ranks."
        )
    else:
        lines.append("The weights are even over the ranks.")
    kv = [need.kv_token for need in plan.needs]
    if max(kv) * len(kv) > sum(kv):
        lines.append(
            f"KV heads are not even: the fullest rank keeps {max(kv) * len(kv) / sum(kv):.2f} times its share of the "
            f"cache, which bounds the tokens of all."
        )
    if plan.parts.kv_replicas > 1:
        lines.append(
            f"Some KV heads are held by {plan.parts.kv_replicas} ranks, since there are more ranks than heads."
        )
    if plan.fits is False:
        lines += _changes(plan, options)
    return lines


def _changes(plan: Plan, options: Options) -> list[str]:
    tokens = plan.kv_tokens or 0
    lines = [
        f"It does not fit: one request of {plan.request_tokens:,} tokens needs more than the {tokens:,} there is "
        f"room for."
    ]
    fewest = smallest_fit(plan.spec, options)
    if fewest is not None:
        lines.append(f"Set ranks={fewest}, the fewest such devices on which it fits.")
    else:
        worst = max(need.weights + need.activations + need.kv_token * plan.request_tokens for need in plan.needs)
        share = 1.0 if _bytes_given(options.kv_memory) else float(options.kv_memory)
        lines.append(
            f"No number of such devices is enough; with ranks={options.ranks} each needs {_gib(int(worst / share))}."
        )
    if tokens >= 1024:
        lines.append(f"Or set max_model_len={tokens // 256 * 256}, the longest request that fits as it is.")
    elif any((need.kv_room or 0) < 0 for need in plan.needs):
        lines.append(
            "The weights and a step's activations alone are more than a device has; max_model_len cannot help."
        )
    return lines


def _kv_room(memory: int, used: int, kv_memory: Any) -> int:
    given = _bytes_given(kv_memory)
    if given is not None:
        return given if used + given <= memory else memory - used
    return int(memory * float(kv_memory)) - used


def _bytes_given(kv_memory: Any) -> int | None:
    size = float(kv_memory) if isinstance(kv_memory, int | float) else float(parse_size(str(kv_memory)))
    if not size > 0:
        raise ConfigError(f"kv_memory={kv_memory!r} must be a fraction in (0, 1] or bytes")
    return int(size) if size > 1 else None


def _device_memory(options: Options) -> list[int] | None:
    given = options.device_memory
    if given is None:
        return None
    sizes = [parse_size(str(size)) for size in given] if isinstance(given, list) else [parse_size(str(given))]
    sizes = sizes * options.ranks if not isinstance(given, list) else sizes
    if len(sizes) != options.ranks or min(sizes) < 1:
        raise ConfigError(
            f"device_memory={given!r} must be one size, or a list with one for each of ranks={options.ranks}"
        )
    return sizes


def read_options(arguments: Sequence[str]) -> Options:
    """Options from key=value arguments. Raises ConfigError naming the nearest right key."""
    names = [field.name for field in dataclasses.fields(Options)]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no key=value; the keys are {', '.join(names)}")
        if name not in names:
            raise ConfigError(unknown_name("key", name, names))
    try:
        given = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(list(arguments)))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    options = OmegaConf.to_object(given)
    assert isinstance(options, Options)
    for name in ("ranks", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    return options


def read_spec(model: str) -> ModelSpec:
    """The spec of a preset or of a folder."""
    if model in presets():
        return spec_from_config(load_preset(model)["shape"], f"preset {model}")
    if model and Path(model).is_dir():
        return spec_from_config(read_config(Path(model)), model)
    raise ConfigError(
        f"model={model!r} is neither a preset nor a folder with a config.json; the presets are {', '.join(presets())}"
    )


def _table(plan: Plan) -> Table:
    table = Table(title=f"{plan.spec.architecture} on {len(plan.needs)} rank(s)")
    for title in (
        *("rank", "query heads", "KV heads", "MLP columns", "vocabulary"),
        *("weights", "activations", "KV per token", "KV tokens"),
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for share, need in zip(plan.parts.shares, plan.needs, strict=True):
        table.add_row(
            str(share.rank),
            str(len(share.query_heads)),
            str(len(share.kv_heads)),
            str(len(share.mlp)),
            str(len(share.vocab)),
            _gib(need.weights),
            _gib(need.activations),
            f"{need.kv_token:,} B",
            "-" if need.kv_tokens is None else f"{need.kv_tokens:,}",
        )
    return table


def show(plan: Plan, options: Options, console: Console) -> None:
    """Print the table and what it means."""
    console.print(_table(plan))
    total = sum(need.weights for need in plan.needs)
    console.print(f"Weights in all: {_gib(total)}; busiest rank: {plan.parts.busiest_share:.3f} of an even share.")
    if plan.kv_tokens is not None:
        console.print(
            f"KV tokens that fit: {plan.kv_tokens:,}; concurrent requests of {plan.request_tokens:,} tokens: "
            f"{plan.kv_tokens // plan.request_tokens}."
        )
        fewest = smallest_fit(plan.spec, options)
        console.print(f"Fewest ranks that fit: {'none' if fewest is None else fewest}.")
    for line in advice(plan, options):
        console.print(line)


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 it fits (or no device was named), 1 it does not, 2 bad input."""
    try:
        options = read_options(arguments)
        plan = make_plan(read_spec(options.model), options)
        show(plan, options, Console(width=TABLE_WIDTH, soft_wrap=True, highlight=False))
    except PhalanxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 1 if plan.fits is False else 0


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
