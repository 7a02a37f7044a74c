"""One rank's memory: measured, agreed on with the other ranks, and explained where it runs out."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from ...parallel.group import Group
from ..errors import ConfigError, EngineStopped
from .advice import out_of_memory_advice, refusal
from .host_memory import available_memory
from .planner import MemoryRequirements, RankMemory, graph_reserve, host_budget

P = ParamSpec("P")
T = TypeVar("T")


class MemoryBudget:
    """What a rank may spend on its KV cache. Every rank makes one, and calls its methods when the others do."""

    def __init__(self, requirements: MemoryRequirements, group: Group, token_bytes: int) -> None:
        """`token_bytes` is what this rank's KV cache takes for each token."""
        self.requirements = requirements
        self._group = group
        self._block = requirements.block_size * token_bytes
        self._activations = 0
        self._memory = RankMemory(group.rank, self._block)
        self._kept = self._cache = 0

    def check_before_loading(self) -> None:
        """Raise ConfigError, on every rank, if the weights to come, and one sequence, do not fit on one of the GPUs.

        Nothing is known yet of what a step takes. On a CPU a sequence must fit alone: what grows with its length, as
        the rotary tables do, is not made for one that never will.
        """
        if self._group.device.type == "cuda":
            memory = self._gpu_memory()
            loaded = dataclasses.replace(memory, in_use=memory.in_use + memory.weights)
            count_blocks(self.requirements, self._exchange(loaded))
        else:
            count_blocks(self.requirements, self._exchange(self._host_memory()))

    def measure_step(self, step: Callable[[], object]) -> int:
        """Run `step` twice and return the bytes it takes while it runs; agree_on_blocks() keeps them free on a GPU.

        On a GPU they are what PyTorch takes from the driver, so what is lost between tensors counts. On a CPU they are
        the rise of this process's peak. Raises ConfigError if there is too little memory for the step.
        """
        device = self._group.device
        self._kept = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        try:
            # The first run makes what stays: compiled kernels, libraries' workspaces.
            step()
            self._activations = _gpu_peak_delta(device, step) if device.type == "cuda" else _host_peak_delta(step)
        except EngineStopped as error:
            raise ConfigError(str(error)) from error
        return self._activations

    def agree_on_blocks(self, graph_buckets: Sequence[int] = ()) -> int:
        """Return the KV blocks of every rank: the fewest that any has room for, once weights are loaded.

        `graph_buckets` are the rows of each CUDA graph to come, for which memory is kept free.
        Raises ConfigError, on every rank, if one sequence of max_model_len does not fit.
        """
        memory = self._gpu_memory() if self._group.device.type == "cuda" else self._host_memory()
        if memory.total:
            config = self.requirements.config
            vocab = self.requirements.parts.shares[self._group.rank].vocab
            tokens = config.max_num_batched_tokens
            reserve = graph_reserve(graph_buckets, self._activations, tokens, 4 * len(vocab), self._block)
            memory = dataclasses.replace(memory, activations=self._activations, reserve=reserve)
            self._kept = torch.cuda.memory_allocated(self._group.device)
        ranks = self._exchange(memory)
        blocks = count_blocks(self.requirements, ranks)
        self._memory = ranks[self._group.rank]
        self._cache = blocks * self._block
        return blocks

    def advice(self) -> str:
        """Say why this GPU's memory does not suffice for a step, and what to lower to which value."""
        device = self._group.device
        free, total = torch.cuda.mem_get_info(device)
        return out_of_memory_advice(
            self.requirements.config,
            total=total,
            kept=self._kept + self._cache,
            elsewhere=total - free - torch.cuda.memory_reserved(device),
            activations=self._activations,
            cache=self._cache,
            spare=max(0, self.requirements.available_bytes(self._memory) - self._cache),
        )

    def _host_memory(self) -> RankMemory:
        requirements = self.requirements
        sequence = requirements.blocks_of_sequence * self._block
        budget = host_budget(requirements.config, self._group.local_size, sequence, available_memory())
        return RankMemory(self._group.rank, self._block, host_budget=budget)

    def _gpu_memory(self) -> RankMemory:
        device = self._group.device
        rank = self._group.rank
        torch.cuda.empty_cache()
        # Ranks that share a GPU must not count what another is about to give back.
        self._group.host.barrier()
        free, total = torch.cuda.mem_get_info(device)
        weights = self.requirements.weights(rank)
        return RankMemory(rank, self._block, total=total, in_use=total - free, weights=weights)

    def _exchange(self, memory: RankMemory) -> list[RankMemory]:
        """Every rank's memory, on every rank, with how many share its GPU."""
        host = self._group.host
        device = self._group.device
        mine = torch.tensor([_device_number(device), *dataclasses.astuple(memory)])
        everyone = host.gather(mine)
        table = mine.new_empty(host.size, len(mine)) if everyone is None else torch.stack(everyone)
        rows = host.broadcast(table).tolist()
        devices = [number for number, *_ in rows]
        ranks = [RankMemory(*values) for _, *values in rows]
        return [
            dataclasses.replace(rank, sharers=devices.count(number) if rank.total else 1)
            for number, rank in zip(devices, ranks, strict=True)
        ]


def count_blocks(requirements: MemoryRequirements, ranks: Sequence[RankMemory]) -> int:
    """Return the KV blocks that every rank has room for, never more than all sequences can use.

    Raises ConfigError if one sequence of max_model_len does not fit, or the bytes that kv_memory names do not.
    """
    fewest = requirements.poorest(ranks)
    if not requirements.fits(ranks):
        raise ConfigError(refusal(requirements, fewest))
    return requirements.blocks(fewest)


def peak_memory(group: Group) -> tuple[int, ...]:
    """Return each rank's peak use so far, in bytes of its GPU or its host, on rank 0; empty on the others."""
    device = group.device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _host_peak()
    everyone = group.host.gather(torch.tensor([peak]))
    return tuple(int(value) for value in everyone) if everyone else ()


def _gpu_peak_delta(device: torch.device, step: Callable[[], object]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_reserved(device)
    torch.cuda.empty_cache()
    return peak - torch.cuda.memory_reserved(device)


def _host_peak_delta(step: Callable[[], object]) -> int:
    before = _host_peak()
    step()
    return _host_peak() - before


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_number(device: torch.device) -> int:
    """Return a number that only ranks on the same GPU share, from its UUID's hash; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return int.from_bytes(hashlib.blake2b(uuid.encode(), digest_size=8).digest(), "little", signed=True)
