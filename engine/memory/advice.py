"""Advice where memory does not suffice: which setting to change to which value, by the arithmetic of planner.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from ..config import EngineConfig
from .planner import MemoryRequirements, RankMemory, fewest_ranks, kv_bytes, least_fraction, like

TOKEN_STEP = 64
"""Numbers of tokens above it are advised in multiples of it."""
MARGIN = 1.25
"""A step that failed is assumed to need this many times what was free: its real need is not known."""


def refusal(requirements: MemoryRequirements, memory: RankMemory) -> str:
    """Say why a rank's KV cache does not fit, and name changes each of which is enough."""
    available = requirements.available_bytes(memory)
    needed = requirements.blocks_of_sequence * memory.block
    fits = max(0, available) // memory.block * requirements.block_size
    state = (
        f"the KV cache has room for {fits} tokens ({max(0, available):,} bytes), but one sequence of max_model_len="
        f"{requirements.max_model_len} needs {needed:,} bytes on a rank"
    )

    if not memory.total:
        lower = f"lower max_model_len to {fits} or " if fits else ""
        return f"{state}: {lower}raise kv_memory to at least {needed} (bytes), or use more ranks"

    if memory.in_use > memory.total * min(1.0, requirements.config.kv_memory):
        state = f"rank {memory.rank}'s weights of {memory.weights:,} bytes do not fit"
    elif available >= needed:
        named = int(requirements.config.kv_memory)
        state = f"the KV cache has {available:,} bytes, but kv_memory={named} (bytes) asks for more"

    changes = list(_changes(requirements, memory))
    advice = f"set {', or '.join(changes)}" if changes else "take a smaller model or GPUs with more memory"
    return f"{state}: {describe(requirements.config, memory)}; {advice}"


def describe(config: EngineConfig, memory: RankMemory) -> str:
    """Say in a sentence what a GPU's memory is used for."""
    allowed = f" (kv_memory={config.kv_memory:g} allows {int(memory.total * config.kv_memory):,})"
    return (
        f"rank {memory.rank}'s GPU has {memory.total:,} bytes{allowed if config.kv_memory <= 1 else ''}, "
        f"{memory.in_use:,} are taken with the weights' {memory.weights:,}, "
        f"a step takes up to {memory.activations:,} and CUDA graphs {memory.reserve:,}"
    )


def out_of_memory_advice(
    config: EngineConfig, *, total: int, kept: int, elsewhere: int, activations: int, cache: int, spare: int = 0
) -> str:
    """Say why a step found no memory on a GPU of `total` bytes, and name values with which the next one may.

    All sizes are bytes. `kept` is what the weights, the KV cache and everything else that lasts from step to step take;
    `elsewhere` is what CUDA itself and other processes take. `activations` is what the largest step took when it was
    measured, 0 if it never was. `cache` is the KV cache's size, for which `spare` bytes more were available.

    The step is assumed to need MARGIN times what was left, or MARGIN times its measured size if that is more.
    Activations grow with the tokens and the rows of a step, so fewer of these save the same part of the activations.
    """
    left = max(0, total - kept - elsewhere)
    needed = math.ceil(max(left, activations) * MARGIN)

    changes = []
    if (fewer := _scaled(config, left / needed if needed else 0.0)) is not None:
        changes.append(fewer)

    lacking = needed - left
    if config.kv_memory > 1 and cache > lacking:
        changes.append(f"kv_memory from {int(config.kv_memory)} to {cache - lacking} (bytes)")
    elif config.kv_memory <= 1:
        fraction = math.floor((config.kv_memory - (spare + lacking) / total) * 100) / 100
        if fraction > 0:
            changes.append(f"kv_memory from {config.kv_memory:g} to {fraction:g}")

    advice = f"lower {', or '.join(changes)}" if changes else "use more ranks"
    measured = f" (the largest step took {activations:,} when the engine started)" if activations else ""
    return (
        f"out of GPU memory: of {total:,} bytes, {kept:,} are kept by weights and KV cache and {elsewhere:,} are taken "
        f"by CUDA and other processes; the step needed more than the {left:,} that are left{measured}: {advice}"
    )


def _changes(requirements: MemoryRequirements, memory: RankMemory) -> Iterator[str]:
    """Yield changes, each of which alone makes the KV cache fit on this rank's GPU."""
    config = requirements.config
    in_bytes = requirements.config.kv_memory > 1
    sequence = requirements.blocks_of_sequence * memory.block
    available = kv_bytes(memory, min(1.0, config.kv_memory))
    needed = requirements.wanted_bytes(memory)

    more = len(requirements.parts.shares) + 1
    if memory.sharers == 1:
        ranks = fewest_ranks(requirements, partial(like, requirements, memory), more)
        if ranks is not None:
            yield f"ranks to at least {ranks}"

    fits = max(0, requirements.available_bytes(memory)) // memory.block * requirements.block_size
    if sequence <= available < needed:
        yield f"kv_memory to at most {available} (bytes)"
    elif 0 < fits < requirements.max_model_len:
        lower = f" and kv_memory to at most {available} (bytes)" if in_bytes and available < config.kv_memory else ""
        yield f"max_model_len to at most {fits}{lower}"

    if in_bytes and needed < sequence:
        # The named bytes are too few for one sequence, and no change below adds to them.
        if sequence <= available:
            yield f"kv_memory to at least {sequence} (bytes)"
        return

    if not in_bytes and (fraction := least_fraction(requirements, memory)) is not None:
        yield f"kv_memory to at least {fraction:g}"

    if 0 < needed - available < memory.activations:
        fewer = _scaled(config, 1 - (needed - available) / memory.activations)
        if fewer is not None:
            yield fewer

    # Keys and values halve with the weights; named bytes do not.
    if requirements.element_bytes == 4 and available + memory.weights // 2 >= (needed if in_bytes else sequence // 2):
        yield "dtype to bfloat16"


def _scaled(config: EngineConfig, keep: float) -> str | None:
    """Advise a step of `keep` times the present tokens and rows; None if that is no token at all, or no fewer."""
    tokens = int(config.max_num_batched_tokens * keep)
    rows = int(config.max_num_seqs * keep)
    if tokens > TOKEN_STEP:
        tokens = tokens // TOKEN_STEP * TOKEN_STEP
    rows = max(1, min(rows, tokens))
    if not 0 < tokens < config.max_num_batched_tokens:
        return None
    return (
        f"max_num_batched_tokens from {config.max_num_batched_tokens} to {tokens} and max_num_seqs from "
        f"{config.max_num_seqs} to {rows}"
    )
