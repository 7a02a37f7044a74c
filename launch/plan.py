"""What a model needs on N ranks: `python -m phalanx.launch.plan model=qwq_32b_preview ranks=3 device_memory=48GiB`.

Reads a preset or a folder's config.json; no weights, no GPU, no torch.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from ..engine.config import EngineConfig, unknown_name
from ..engine.errors import ConfigError, PhalanxError
from ..engine.memory.host_memory import available_memory
from ..engine.memory.planner import CPU_BUDGET
from ..engine.models.spec import ModelSpec, read_config, spec_from_config
from ..kernels.weight_formats import get_weight_format
from .cli.plan_table import GIB, Plan, Setup, make_plan, remedies
from .cli.presets import load_preset, presets
from .cli.program import run_tool
from .cli.schema import describe_type, field_docs, from_words, parse_size

MINIMUM_WIDTH = 100
"""Fewest columns to print for: a narrower terminal wraps lines instead of cutting numbers."""


@dataclass
class Options:
    """The keys of launch.plan; those of EngineConfig mean what they mean there."""

    model: str = ""
    """A preset's name, or a model folder with a config.json."""
    ranks: int = 1
    """Tensor-parallel ranks, 1 to the number of query heads; nothing has to divide."""
    rank_weights: list[float] | None = None
    """Relative share of each rank, for cards of different size; null makes all shares equal."""
    device: str = "auto"
    """What the ranks compute on: cpu, or a GPU for cuda and auto (the plan may be for another machine)."""
    device_memory: Any = None
    """Memory of each rank's GPU: 48GiB, 80GB, bytes, or a list, one for each rank; null says nothing about fitting.
    With device=cpu it is the memory of the host that all ranks share, or a list of hosts, one for each rank; null
    then takes what is available here now, within the limit of a container."""
    dtype: str = "auto"
    """auto (the checkpoint's own), bfloat16, float16 or float32."""
    quantization: str = "none"
    """Format of the weights: none, int8, w8a8 or int4. All but none need device=cpu and dtype=bfloat16."""
    kv_cache_dtype: str = "auto"
    """Format of the KV cache: auto (as dtype) or int8, which needs device=cpu."""
    max_model_len: int | None = None
    """Most prompt and output tokens of one request; null takes the model's own limit."""
    max_num_seqs: int = 64
    """Most sequences computed in one step."""
    max_num_batched_tokens: int = 2048
    """Most tokens computed in one step."""
    kv_memory: Any = 0.9
    """The fraction of a GPU's memory that the whole engine may use, or the bytes (4GiB) of the KV cache alone. On a CPU
    the fraction applies to the memory that is free once the weights are loaded, and the cache takes at most 4GiB of a
    host, or one sequence."""
    block_size: int | None = None
    """Tokens of one KV block. null takes 16 on a CPU; on a GPU, where the attention backend chooses, tokens are then
    not rounded to blocks."""


def main(arguments: Sequence[str]) -> int:
    """Run the command. Exit code: 0 if the model fits or no memory was named, 1 if it does not, 2 for bad input."""
    if {"-h", "--help"} & set(arguments):
        print(_help())
        return 0
    try:
        setup = read_setup(arguments)
        plan = make_plan(read_spec(setup.config.model), setup)
    except PhalanxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(plan)
    return 1 if plan.fits is False else 0


def read_setup(arguments: Sequence[str]) -> Setup:
    """Read a setup from key=value arguments. Raises ConfigError naming the key, its value and what it may be."""
    options = _read_options(arguments)
    if not options.model:
        raise ConfigError(f"model is missing: give model=FOLDER, or a preset: {', '.join(presets())}")

    values = dataclasses.asdict(options)
    given = values.pop("device_memory")
    kv_memory = values["kv_memory"]
    values["kv_memory"] = _size("kv_memory", kv_memory) if isinstance(kv_memory, str) else kv_memory

    config = EngineConfig.from_dict(values)
    on_cpu = config.device == "cpu"
    if given is None:
        return Setup(config, (available_memory(),) if on_cpu else None)

    # One number is each GPU's memory, or that of the host which all CPU ranks share.
    listed = given if isinstance(given, list) else [given] * (1 if on_cpu else config.ranks)
    sizes = [_size("device_memory", size) for size in listed]
    if min(sizes, default=0) < 1 or (isinstance(given, list) and len(sizes) != config.ranks):
        raise ConfigError(
            f"device_memory={given!r} must be one size, or a list with one for each of ranks={config.ranks}"
        )
    return Setup(config, tuple(sizes))


def _read_options(arguments: Sequence[str]) -> Options:
    names = [field.name for field in dataclasses.fields(Options)]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no key=value; the keys are {', '.join(names)}")
        if name not in names:
            raise ConfigError(unknown_name("key", name, names))

    try:
        return from_words(Options, arguments)
    except OmegaConfBaseException as error:
        # full_key may be an element of a list: rank_weights[0].
        key = str(error.full_key).partition("[")[0]
        given = [argument for argument in arguments if argument.startswith(f"{key}=")]
        hint = typing.get_type_hints(Options)[key]
        raise ConfigError(f"{given[-1]}: {key} must be {describe_type(hint)}") from error


def _size(name: str, value: object) -> int:
    try:
        return parse_size(str(value))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def read_spec(model: str) -> ModelSpec:
    """Read the spec of a preset or of a folder. Raises ConfigError or CheckpointError if there is none."""
    if model in presets():
        return spec_from_config(load_preset(model)["shape"], f"preset {model}")
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        return spec_from_config(read_config(folder), model)
    same = [name for name in presets() if load_preset(name)["model"] == model]
    raise ConfigError(
        f"model={model!r} is neither a preset nor a folder with a config.json, and nothing is fetched for a plan; "
        + (f"write model={same[0]}, its preset" if same else f"the presets are {', '.join(presets())}")
    )


def _help() -> str:
    lines = ["usage: python -m phalanx.launch.plan model=... [key=value ...]", ""]
    for name, meaning in field_docs(Options).items():
        lines.append(f"  {name}")
        lines += textwrap.wrap(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", *textwrap.wrap(f"presets: {', '.join(presets())}", 106, subsequent_indent=" " * 6)]
    return "\n".join(
        [*lines, "", "exit code: 0 if it fits or no memory was named, 1 if it does not fit, 2 for bad input"]
    )


def show(plan: Plan) -> None:
    """Print a plan, its table and what there is to say of it, to standard output."""
    console = Console(highlight=False, width=max(MINIMUM_WIDTH, Console().width))
    console.print(_table(plan))
    for line in describe(plan):
        console.print(line, soft_wrap=True)


def describe(plan: Plan) -> list[str]:
    """Return the lines below the table: a sentence or two on each thing worth knowing."""
    lines = [_memory(plan), *_host(plan), *_refused(plan), _evenness(plan), *_kv_evenness(plan)]
    if plan.kv_tokens is not None:
        lines.append(
            f"KV tokens of the group: {plan.kv_tokens:,}; concurrent requests of {plan.request_tokens:,} tokens that "
            f"fit: {0 if _lacks(plan) else plan.kv_tokens // plan.request_tokens}."
        )
        lines.append(_smallest(plan))
    if plan.fits is False:
        lines += _unfit(plan)
    return lines


def _table(plan: Plan) -> Table:
    table = Table(title=_title(plan), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in (
        *("rank", "query\nheads", "KV\nheads", "MLP\ncolumns", "vocab\nrows"),
        *("weights\nGiB", "reserve\nGiB", "KV bytes\nper token", "KV\ntokens"),
    ):
        table.add_column(heading, justify="right", no_wrap=True)

    for share, need in zip(plan.parts.shares, plan.needs, strict=True):
        counts = (len(part) for part in (share.query_heads, share.kv_heads, share.mlp, share.vocab))
        table.add_row(
            str(share.rank),
            *map(str, counts),
            f"{need.weights / GIB:.2f}",
            f"{need.activations / GIB:.2f}",
            f"{need.kv_token:,}",
            "-" if need.kv_tokens is None else f"{need.kv_tokens:,}",
        )
    return table


def _title(plan: Plan) -> str:
    config = plan.setup.config
    ranks = len(plan.needs)
    weights = f", weights in {config.quantization}" if get_weight_format(config.quantization).rounds else ""
    cache = "" if config.kv_cache_dtype == "auto" else f", KV cache in {config.kv_cache_dtype}"
    device = "CPU " if plan.setup.on_cpu else ""
    return f"{config.model} in {plan.dtype}{weights}{cache} on {ranks} {device}rank{'s' * (ranks > 1)}"


def _memory(plan: Plan) -> str:
    weights = sum(need.weights for need in plan.needs)
    return f"Weights of all ranks: {_gib(weights)}. The reserve is for a step's tensors and for the runtime."


def _host(plan: Plan) -> list[str]:
    """What a plan for CPUs assumes."""
    setup = plan.setup
    if not setup.on_cpu or setup.device_memory is None:
        return []

    sharers = f", shared by {setup.config.ranks} ranks" if setup.config.ranks > 1 else ""
    host = f"Memory of the host: {_gib(setup.device_memory[0])}{sharers}."
    lines = [host if setup.one_host else "Each rank has a host of its own."]

    if setup.config.kv_memory <= 1:
        lines.append(
            f"The KV cache takes at most {_gib(CPU_BUDGET)} of a host, or one sequence of max_model_len on each rank; "
            f"kv_memory in bytes sets it."
        )

    if plan.dtype == "bfloat16" and not get_weight_format(setup.config.quantization).rounds:
        lines.append(
            "Weights are counted with 16 bits. CPUs with AVX-512 keep most of them in 12, which an engine knows only "
            "after it has packed them: it measures what is free then, and may have more room than this."
        )
    return lines


def _refused(plan: Plan) -> list[str]:
    """Settings that an engine refuses on such a device: the numbers are for one that does not."""
    config = plan.setup.config
    lines = []
    if get_weight_format(config.quantization).rounds and (not plan.setup.on_cpu or plan.dtype != "bfloat16"):
        lines.append(
            f"An engine takes quantization={config.quantization} with device=cpu and dtype=bfloat16 alone, and refuses "
            f"it here."
        )
    if config.kv_cache_dtype != "auto" and not plan.setup.on_cpu:
        lines.append(
            f"An engine takes kv_cache_dtype={config.kv_cache_dtype} with device=cpu alone, and refuses it here."
        )
    return lines


def _evenness(plan: Plan) -> str:
    held = [need.weights for need in plan.needs]
    given = plan.setup.config.rank_weights
    if given is not None:
        over = max(size / weight for size, weight in zip(held, given, strict=True)) * sum(given) / sum(held)
        return f"By rank_weights: the rank that holds most for its weight has {over:.3f} times its share."

    busiest = plan.parts.busiest_share
    if busiest < 1.0005:
        return "The weights are even over the ranks: the busiest holds 1.000 times an even share."
    return (
        f"The busiest rank holds {busiest:.3f} times an even share of the weights: a step of few tokens takes about "
        f"{100 * (busiest - 1):.1f}% longer than on {len(held)} ranks with nothing uneven and nothing held twice."
    )


def _kv_evenness(plan: Plan) -> list[str]:
    kv = [need.kv_token for need in plan.needs]
    if plan.parts.kv_replicas > 1:
        heads = plan.spec.num_kv_heads
        held = len(kv)
        return [
            f"There are more ranks than KV heads: up to {plan.parts.kv_replicas} ranks hold the same one, and the "
            f"cache takes {held / heads:.2f} times the memory."
        ]
    if plan.setup.config.rank_weights is None and max(kv) > min(kv):
        return [
            f"KV heads are not even: the fullest rank keeps {max(kv) * len(kv) / sum(kv):.2f} times its share of the "
            f"cache, which bounds the tokens of all."
        ]
    return []


def _smallest(plan: Plan) -> str:
    fewest = plan.fewest_ranks
    memory = plan.setup.device_memory
    devices = "" if memory is None or len(set(memory)) == 1 else ", on devices like the smallest"
    if fewest is None:
        return f"Smallest number of ranks that fits: none from 1 to {plan.spec.num_query_heads}{devices}."
    return f"Smallest number of ranks that fits: {fewest}{devices}."


def _unfit(plan: Plan) -> list[str]:
    """Why it does not fit, and what to change to which value."""
    kv_memory = plan.setup.config.kv_memory
    if _lacks(plan):
        cache = f"and kv_memory={_gib(int(kv_memory))}" if kv_memory > 1 else f"within kv_memory={kv_memory:g} of it"
        owner, lacking, weights, reserve = _shortest(plan)
        lines = [
            f"It does not fit: {owner} lacks {_gib(lacking)} for {_gib(weights)} of weights and {_gib(reserve)} of "
            f"reserve {cache}."
        ]
    else:
        lines = [
            f"It does not fit: one sequence of max_model_len={plan.max_model_len} tokens needs more KV cache than the "
            f"{plan.kv_tokens or 0:,} tokens there is room for."
        ]

    changes = remedies(plan)
    if not changes:
        return [*lines, "No one setting alone makes it fit: change several."]
    lines.append(f"Set {changes[0]}")
    return lines + [f" or {change}" for change in changes[1:]]


def _shortest(plan: Plan) -> tuple[str, int, int, int]:
    """The device that lacks most: its name, the bytes it lacks, and those of its weights and its reserve."""
    rank, need = max(enumerate(plan.needs), key=lambda pair: pair[1].lacking)
    if not plan.setup.one_host:
        return f"rank {rank}'s device", need.lacking, need.weights, need.activations
    sums = (sum(values) for values in zip(*((n.lacking, n.weights, n.activations) for n in plan.needs), strict=True))
    lacking, weights, reserve = sums
    return "the host", lacking, weights, reserve


def _lacks(plan: Plan) -> bool:
    return any(need.lacking for need in plan.needs)


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


if __name__ == "__main__":
    run_tool(main)
