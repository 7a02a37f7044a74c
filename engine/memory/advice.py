"""What to set to which value where memory does not suffice: words for the arithmetic of engine/memory/planner.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ...parallel.partition import partition
from ..config import EngineConfig
from .planner import Demand, RankMemory, kv_bytes

HIGHEST_FRACTION = 0.97
"""Of a GPU's memory that kv_memory is ever advised to be: the rest is the driver's."""
TOKEN_STEP = 64
"""Numbers of tokens above it are advised in multiples of it."""
MARGIN = 1.25
"""By which a step that failed is taken to need more than there was: how much it would have taken is not known."""


def refusal(demand: Demand, memory: RankMemory) -> str:
    """Why a rank's KV cache does not fit beside what is there, and changes each of which is enough."""
    room, needed = demand.room(memory), demand.blocks_of_sequence * memory.block
    fits = max(0, room) // memory.block * demand.block_size
    state = (
        f"the KV cache has room for {fits} tokens ({max(0, room):,} bytes), but one sequence of max_model_len="
        f"{demand.max_model_len} needs {needed:,} bytes on a rank"
    )
    if not memory.total:
        lower = f"lower max_model_len to {fits} or " if fits else ""
        return f"{state}: {lower}raise kv_memory to at least {needed} (bytes), or use more ranks"
    if memory.in_use > memory.total * min(1.0, demand.config.kv_memory):
        state = f"rank {memory.rank}'s weights of {memory.weights:,} bytes do not fit"
    elif room >= needed:
        state = f"the KV cache has {room:,} bytes, but kv_memory={int(demand.config.kv_memory)} (bytes) asks for more"
    changes = list(_changes(demand, memory))
    advice = f"set {', or '.join(changes)}" if changes else "take a smaller model or GPUs with more memory"
    return f"{state}: {describe(demand.config, memory)}; {advice}"


def describe(config: EngineConfig, memory: RankMemory) -> str:
    """What a GPU's memory is used for, in a sentence."""
    allowed = f" (kv_memory={config.kv_memory:g} allows {int(memory.total * config.kv_memory):,})"
    return (
        f"rank {memory.rank}'s GPU has {memory.total:,} bytes{allowed if config.kv_memory <= 1 else ''}, "
        f"{memory.in_use:,} are taken with the weights' {memory.weights:,}, "
        f"a step takes up to {memory.activations:,} and CUDA graphs {memory.reserve:,}"
    )


def out_of_memory_advice(
    config: EngineConfig, *, total: int, kept: int, elsewhere: int, activations: int, cache: int, spare: int = 0
) -> str:
    """Why a step found no memory on a GPU of `total` bytes, and values with which the next one may.

    `kept` bytes are the weights', the KV cache's and what else lasts from step to step, `elsewhere` what CUDA itself
    and other processes take. `activations` is what the largest step took when it was measured, 0 if it never was.
    `cache` is the KV cache, for which there were `spare` bytes more than it took.

    The step is taken to need MARGIN times what was left, or its measured size if that is more. Of activations, which
    grow with the tokens and the rows of a step, the same part as of these is saved.
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


def fewest_ranks(demand: Demand, memory: RankMemory) -> int | None:
    """The fewest ranks above the present number that would do, evenly dealt over GPUs like this rank's; None if no
    number does.
    """
    parts, kv_memory = demand.parts, demand.config.kv_memory
    room = kv_bytes(memory, min(1.0, kv_memory)) + memory.weights
    d = parts.dimensions
    for ranks in range(len(parts.shares) + 1, min(d.num_query_heads, d.vocab_size, d.intermediate_size) + 1):
        dealt = partition(d, ranks)
        weights = max(dealt.parameters(rank) for rank in range(ranks)) * demand.weight_bytes
        elements = max(dealt.kv_elements_per_token(rank) for rank in range(ranks))
        block = memory.block * elements // parts.kv_elements_per_token(memory.rank)
        sequence = demand.blocks_of_sequence * block
        cache = min(int(kv_memory), demand.config.max_num_seqs * sequence) if kv_memory > 1 else sequence
        if sequence <= cache and weights + cache <= room:
            return ranks
    return None


def _changes(demand: Demand, memory: RankMemory) -> Iterator[str]:
    """Changes, each of which alone makes the KV cache fit on this rank's GPU."""
    config, in_bytes = demand.config, demand.config.kv_memory > 1
    sequence = demand.blocks_of_sequence * memory.block
    room = kv_bytes(memory, min(1.0, config.kv_memory))
    # What the cache must have: bytes that are named are made use of as far as all sequences can.
    needed = demand.wanted_blocks(memory) * memory.block if in_bytes else sequence
    if memory.sharers == 1 and (ranks := fewest_ranks(demand, memory)) is not None:
        yield f"ranks to at least {ranks}"
    if sequence <= room < needed:
        yield f"kv_memory to at most {room} (bytes)"
    elif (fits := max(0, demand.room(memory)) // memory.block * demand.block_size) and fits < demand.max_model_len:
        lower = f" and kv_memory to at most {room} (bytes)" if in_bytes and room < config.kv_memory else ""
        yield f"max_model_len to at most {fits}{lower}"
    if in_bytes and needed < sequence:
        # Whatever else is changed, these stay too few.
        if sequence <= room:
            yield f"kv_memory to at least {sequence} (bytes)"
        return
    if not in_bytes:
        used = memory.in_use + memory.sharers * (sequence + memory.activations + memory.reserve)
        if (fraction := math.ceil(used / memory.total * 100) / 100) <= HIGHEST_FRACTION:
            yield f"kv_memory to at least {fraction:g}"
    if 0 < needed - room < memory.activations:
        fewer = _scaled(config, 1 - (needed - room) / memory.activations)
        if fewer is not None:
            yield fewer
    # The keys and values halve with the weights; bytes that are named do not.
    if demand.weight_bytes == 4 and room + memory.weights // 2 >= (needed if in_bytes else sequence // 2):
        yield "dtype to bfloat16"


def _scaled(config: EngineConfig, keep: float) -> str | None:
    """A step of so small a part of the present one's tokens and rows; None if it would be none, or as large."""
    tokens, rows = int(config.max_num_batched_tokens * keep), int(config.max_num_seqs * keep)
    if tokens > TOKEN_STEP:
        tokens = tokens // TOKEN_STEP * TOKEN_STEP
    rows = max(1, min(rows, tokens))
    if not 0 < tokens < config.max_num_batched_tokens:
        return None
    return (
        f"max_num_batched_tokens from {config.max_num_batched_tokens} to {tokens} and max_num_seqs from "
        f"{config.max_num_seqs} to {rows}"
    )
