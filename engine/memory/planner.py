"""How much memory a rank has for its KV cache: arithmetic on what engine/memory/profiler.py measures, and on what
launch.plan estimates where nothing is measured. Without torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...kernels.weight_formats import get_weight_format
from ...parallel.partition import Partition, partition
from ..config import EngineConfig
from .sizes import RUNTIME_BYTES, activation_bytes, head_bytes, kv_token_bytes, weight_bytes

CPU_BUDGET = 4 * 2**30
"""Bytes of KV cache on one host, over its ranks, where kv_memory names no bytes."""
GRAPH_BYTES = 16 * 2**20
"""What the driver takes for one CUDA graph: an allowance for its nodes and what they hold."""
HIGHEST_FRACTION = 0.97
"""The largest fraction that is ever advised for kv_memory: the driver needs the rest."""


@dataclass(frozen=True)
class RankMemory:
    """One rank's memory before its KV cache is made, in bytes unless stated otherwise."""

    rank: int
    block: int
    """Size of one KV block, over all layers."""
    host_budget: int = 0
    """Available for the KV cache on a CPU, where `total` is 0."""
    total: int = 0
    """Memory of its GPU; 0 on a CPU."""
    in_use: int = 0
    """The GPU's memory that anybody uses: the weights, CUDA contexts, what libraries keep, other processes."""
    weights: int = 0
    """Size of this rank's weights; on a GPU they are part of `in_use`."""
    activations: int = 0
    """Used by the largest step while it runs (worker_factory.measure_largest_step(), and sizes.activation_bytes)."""
    reserve: int = 0
    """Kept free for CUDA graphs (see graph_reserve)."""
    sharers: int = 1
    """Ranks on this GPU."""


@dataclass(frozen=True)
class MemoryRequirements:
    """What memory is needed for: the same on every rank."""

    config: EngineConfig
    parts: Partition
    element_bytes: int
    """Size of an activation, and of a weight that is not quantized."""
    max_model_len: int
    block_size: int

    @property
    def blocks_of_sequence(self) -> int:
        """KV blocks of one sequence of max_model_len."""
        return -(-self.max_model_len // self.block_size)

    def weights(self, rank: int) -> int:
        """Bytes of a rank's weights."""
        return weight_bytes(self.parts, rank, self.config.quantization, self.element_bytes)

    def activations(self, rank: int) -> int:
        """Bytes of a rank's largest step and of its runtime, where they are not measured."""
        return activation_bytes(self.parts, rank, self.config, self.element_bytes)

    def block(self, rank: int) -> int:
        """Bytes of one KV block of a rank, where no attention backend says otherwise."""
        head = head_bytes(self.parts.dimensions.head_dim, self.config.kv_cache_dtype, self.element_bytes)
        return self.block_size * kv_token_bytes(self.parts, rank, head)

    def wanted_blocks(self, memory: RankMemory) -> int:
        """KV blocks that kv_memory asks for, never more than all sequences can use."""
        most = self.blocks_of_sequence * self.config.max_num_seqs
        kv_memory = self.config.kv_memory
        return min(int(kv_memory) // memory.block, most) if kv_memory > 1 else most

    def wanted_bytes(self, memory: RankMemory) -> int:
        """Bytes that the KV cache must have.

        Those that kv_memory names, up to what all sequences can use, or else one sequence's.
        """
        blocks = self.wanted_blocks(memory) if self.config.kv_memory > 1 else self.blocks_of_sequence
        return blocks * memory.block

    def available_bytes(self, memory: RankMemory) -> int:
        """Bytes that a rank has for its KV cache within kv_memory; negative if everything else lacks some."""
        kv_memory = self.config.kv_memory
        if not memory.total:
            return memory.host_budget
        return min(int(kv_memory), kv_bytes(memory, 1.0)) if kv_memory > 1 else kv_bytes(memory, kv_memory)

    def lacking_bytes(self, memory: RankMemory) -> int:
        """Bytes by which a device is too small for all but the KV cache, or for the bytes named for the cache."""
        wanted = self.wanted_bytes(memory) if self.config.kv_memory > 1 else 0
        return max(0, wanted - self.available_bytes(memory))

    def blocks(self, memory: RankMemory) -> int:
        """KV blocks that a rank has room for, never more than it wants."""
        return min(max(0, self.available_bytes(memory)) // memory.block, self.wanted_blocks(memory))

    def poorest(self, ranks: Sequence[RankMemory]) -> RankMemory:
        """The rank with room for the fewest KV blocks, which bounds those of all."""
        return min(ranks, key=lambda memory: self.available_bytes(memory) // memory.block)

    def fits(self, ranks: Sequence[RankMemory]) -> bool:
        """Whether one sequence of max_model_len fits on every rank, and the bytes that kv_memory names."""
        fewest = self.poorest(ranks)
        blocks = self.available_bytes(fewest) // fewest.block
        named = self.wanted_blocks(fewest) if self.config.kv_memory > 1 else 0
        return blocks >= max(self.blocks_of_sequence, named)

    def on_ranks(self, ranks: int) -> MemoryRequirements:
        """Return the same requirements for another number of ranks, evenly partitioned."""
        config = dataclasses.replace(self.config, ranks=ranks, rank_weights=None)
        return dataclasses.replace(
            self,
            config=config,
            parts=partition(self.parts.dimensions, ranks, weight_format=get_weight_format(config.quantization)),
        )


def kv_bytes(memory: RankMemory, fraction: float) -> int:
    """Bytes of a GPU for a rank's KV cache if `fraction` of it may be used in all; negative if some are lacking.

    total * fraction - in_use, in equal parts for the ranks on this GPU, less one rank's activations and reserve.
    """
    return (int(memory.total * fraction) - memory.in_use) // memory.sharers - memory.activations - memory.reserve


def graph_reserve(
    buckets: Sequence[int], activations: int, max_num_batched_tokens: int, row_bytes: int, block: int
) -> int:
    """Bytes to keep free for CUDA graphs of decode steps, one for each of the `buckets`, numbers of rows.

    Graphs share one pool, which the largest fills with its part of the largest step's activations, and with logits of
    `row_bytes` a row. Each graph adds GRAPH_BYTES; one KV block, of `block` bytes, is for padding rows.
    """
    if not buckets:
        return 0
    pool = max(buckets) * (-(-activations // max_num_batched_tokens) + row_bytes)
    return pool + len(buckets) * GRAPH_BYTES + block


def host_budget(config: EngineConfig, local_size: int, sequence_bytes: int, available: int) -> int:
    """Bytes a rank may spend on its KV cache on a CPU, weights being loaded and `available` bytes of memory free.

    A kv_memory above 1 is that number of bytes. Otherwise the budget is the rank's part of CPU_BUDGET (or one
    sequence's `sequence_bytes`, if more), but at most its part of that fraction of the free memory.
    """
    if config.kv_memory > 1:
        return int(config.kv_memory)
    return min(max(CPU_BUDGET // local_size, sequence_bytes), int(available * config.kv_memory) // local_size)


def fewest_ranks(
    requirements: MemoryRequirements,
    memory_of: Callable[[MemoryRequirements], Sequence[RankMemory]],
    first: int = 1,
) -> int | None:
    """The fewest ranks, from `first` on, that fit, evenly partitioned; None if no number does.

    `memory_of` returns the memory of the ranks for given requirements.
    """
    d = requirements.parts.dimensions
    for ranks in range(first, min(d.num_query_heads, d.vocab_size, d.intermediate_size) + 1):
        dealt = requirements.on_ranks(ranks)
        if dealt.fits(memory_of(dealt)):
            return ranks
    return None


def like(requirements: MemoryRequirements, memory: RankMemory, dealt: MemoryRequirements) -> list[RankMemory]:
    """The memory of the ranks of `dealt`, each on a GPU like the one on which one rank alone measured `memory`.

    What a step takes stays as measured, though a smaller part of the model takes less.
    """
    elements = requirements.parts.kv_elements_per_token(memory.rank)
    ranks = []
    for rank in range(dealt.config.ranks):
        weights = dealt.weights(rank)
        ranks.append(
            dataclasses.replace(
                memory,
                rank=rank,
                block=memory.block * dealt.parts.kv_elements_per_token(rank) // elements,
                in_use=memory.in_use - memory.weights + weights,
                weights=weights,
            )
        )
    return ranks


def least_fraction(requirements: MemoryRequirements, memory: RankMemory) -> float | None:
    """The lowest kv_memory, in hundredths, with which one sequence fits on a GPU; None above HIGHEST_FRACTION."""
    sequence = requirements.blocks_of_sequence * memory.block
    used = memory.in_use + memory.sharers * (sequence + memory.activations + memory.reserve)
    fraction = math.ceil(used / memory.total * 100) / 100
    return fraction if fraction <= HIGHEST_FRACTION else None


def estimate_gpu(
    requirements: MemoryRequirements, rank: int, total: int, activations: int, reserve: int = 0
) -> RankMemory:
    """A rank's memory on a GPU of `total` bytes with nothing on it but the rank's weights."""
    weights = requirements.weights(rank)
    block = requirements.block(rank)
    return RankMemory(
        rank, block, total=total, in_use=weights, weights=weights, activations=activations, reserve=reserve
    )


def estimate_hosts(requirements: MemoryRequirements, hosts: Sequence[int]) -> list[RankMemory]:
    """The ranks' memory on CPUs: on one host that all share, or on a host for each rank.

    `hosts` are the bytes that are free on each host before its ranks start. As in an engine, a fraction applies to what
    the weights and the processes leave free. Bytes that kv_memory names are given as far as the host has them.
    """
    count = requirements.config.ranks
    local_size = count if len(hosts) == 1 else 1
    estimates = []
    for rank in range(count):
        local = range(count) if len(hosts) == 1 else range(rank, rank + 1)
        host = hosts[min(rank, len(hosts) - 1)]
        block = requirements.block(rank)
        free = host - sum(requirements.weights(each) + RUNTIME_BYTES for each in local)
        budget = host_budget(requirements.config, local_size, requirements.blocks_of_sequence * block, free)
        steps = sum(requirements.activations(each) - RUNTIME_BYTES for each in local)
        if requirements.config.kv_memory > 1:
            budget = min(budget, (free - steps) // local_size)
        elif free < 0:
            budget = free // local_size

        weights = requirements.weights(rank)
        activations = requirements.activations(rank)
        estimates.append(RankMemory(rank, block, host_budget=budget, weights=weights, activations=activations))
    return estimates


def least_device_bytes(requirements: MemoryRequirements, ranks: Sequence[RankMemory], shared: bool = False) -> int:
    """The least bytes of each GPU on which estimated ranks fit, or of the one host whose CPUs are `shared` by all."""
    kv_memory = requirements.config.kv_memory
    fraction = 1.0 if kv_memory > 1 else kv_memory
    needed = [rank.weights + rank.activations + requirements.wanted_bytes(rank) for rank in ranks]
    if not shared:
        return math.ceil(max(needed) / fraction)
    if kv_memory > 1:
        return sum(needed)
    # The fraction applies to what weights and processes leave, and is divided evenly.
    loaded = sum(rank.weights + RUNTIME_BYTES for rank in ranks)
    return loaded + math.ceil(len(ranks) * max(map(requirements.wanted_bytes, ranks)) / fraction) + len(ranks)
