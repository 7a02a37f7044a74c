"""How much memory a rank has for its KV cache: arithmetic on what engine/memory/profiler.py measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...parallel.partition import Partition
from ..config import EngineConfig
from ..protocol.sampling_params import LOGPROBS_LIMIT
from ..scheduling.step_plan import SlotSampling, SlotStart, StepPlan

CPU_BUDGET = 4 * 2**30
"""Bytes of KV cache on one host, over its ranks, where kv_memory names no bytes."""
GRAPH_BYTES = 16 * 2**20
"""Of the driver's own for one CUDA graph: an allowance for its nodes and what they hold."""

HEAVIEST = SlotSampling(
    temperature=1000.0, top_p=0.99, repetition_penalty=1.1, logprobs=LOGPROBS_LIMIT, prompt_logprobs=LOGPROBS_LIMIT
)
"""Sampling that takes the most memory: so hot that no rank's candidates hold the nucleus, and the logits are kept from
before the penalty as well."""


@dataclass(frozen=True)
class RankMemory:
    """One rank's memory before its KV cache is made, in bytes where nothing else is said."""

    rank: int
    block: int
    """Of one KV block, over all layers."""
    host_budget: int = 0
    """For the KV cache on a CPU, where all below is 0."""
    total: int = 0
    """Of its GPU."""
    in_use: int = 0
    """Of these, by anybody: the weights, CUDA contexts, what libraries keep, other processes."""
    weights: int = 0
    """Of this rank; they are part of `in_use`."""
    activations: int = 0
    """That the largest step takes for a while (worker_factory.measure_largest_step() finds it)."""
    reserve: int = 0
    """Kept free for CUDA graphs (see graph_reserve)."""
    sharers: int = 1
    """Ranks on this GPU."""


@dataclass(frozen=True)
class Demand:
    """What memory is needed for: the same on every rank."""

    config: EngineConfig
    parts: Partition
    weight_bytes: int
    """Of one weight."""
    max_model_len: int
    block_size: int

    @property
    def blocks_of_sequence(self) -> int:
        """KV blocks of one sequence of max_model_len."""
        return -(-self.max_model_len // self.block_size)

    def wanted_blocks(self, memory: RankMemory) -> int:
        """KV blocks that kv_memory asks for, never more than all sequences can use."""
        most = self.blocks_of_sequence * self.config.max_num_seqs
        kv_memory = self.config.kv_memory
        return min(int(kv_memory) // memory.block, most) if kv_memory > 1 else most

    def room(self, memory: RankMemory) -> int:
        """Bytes that a rank has for its KV cache within kv_memory; on a GPU below 0 by what is lacking."""
        kv_memory = self.config.kv_memory
        if not memory.total:
            return memory.host_budget
        return min(int(kv_memory), kv_bytes(memory, 1.0)) if kv_memory > 1 else kv_bytes(memory, kv_memory)


def kv_bytes(memory: RankMemory, fraction: float) -> int:
    """What a GPU has for a rank's KV cache if `fraction` of it may be used in all; below 0 by what is lacking.

    total * fraction - in_use, in equal parts for the ranks on this GPU, less one rank's activations and reserve.
    """
    return (int(memory.total * fraction) - memory.in_use) // memory.sharers - memory.activations - memory.reserve


def graph_reserve(
    buckets: Sequence[int], activations: int, max_num_batched_tokens: int, row_bytes: int, block: int
) -> int:
    """Bytes to keep free for CUDA graphs of decode steps, one for each of the `buckets`, numbers of rows.

    Graphs share one pool, which the largest fills: its part of the largest step's activations, and its logits of
    `row_bytes` a row. GRAPH_BYTES come to that for each graph, and one KV block, of `block` bytes, for padding rows.
    """
    if not buckets:
        return 0
    pool = max(buckets) * (-(-activations // max_num_batched_tokens) + row_bytes)
    return pool + len(buckets) * GRAPH_BYTES + block


def host_budget(config: EngineConfig, local_size: int, sequence_bytes: int, available: int) -> int:
    """Bytes a rank may spend on its KV cache on a CPU, weights being loaded and `available` bytes of memory free.

    kv_memory above 1 is that many. Otherwise it is CPU_BUDGET (or one sequence's `sequence_bytes`, if more), within
    that fraction of the free memory, divided by the ranks of this host.
    """
    if config.kv_memory > 1:
        return int(config.kv_memory)
    return min(max(CPU_BUDGET // local_size, sequence_bytes), int(available * config.kv_memory) // local_size)


def worst_case_plan(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int) -> StepPlan:
    """The step that takes the most memory: as many tokens and as many rows of logits as there may be.

    The last row is at the end of a sequence of max_model_len; rows before it are like it as long as there are tokens
    for more than one each, and the rest are sequences of one token. All sample, as HEAVIEST. Every block of every
    sequence is block 0: the values that are computed mean nothing, and a cache of one block is enough.
    """
    rows = min(max_num_seqs, max_num_batched_tokens)
    counts = [1] * rows
    spare = max_num_batched_tokens - rows
    for row in reversed(range(rows)):
        more = min(spare, max_model_len - 1)
        counts[row] += more
        spare -= more
    lengths = [max_model_len if count > 1 else 1 for count in counts[:-1]] + [max_model_len]
    blocks = [-(-length // block_size) for length in lengths]
    return StepPlan(
        step=0,
        starts=[SlotStart(slot, length, [0] * length, HEAVIEST) for slot, length in enumerate(lengths)],
        token_slots=[],
        token_ids=[],
        block_slots=[slot for slot, count in enumerate(blocks) for _ in range(count)],
        block_indices=[index for count in blocks for index in range(count)],
        block_ids=[0] * sum(blocks),
        slots=list(range(rows)),
        positions=[length - count for length, count in zip(lengths, counts, strict=True)],
        counts=counts,
        num_decodes=counts.count(1),
        sample_rows=list(range(rows)),
    )
