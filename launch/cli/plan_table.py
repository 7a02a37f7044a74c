"""The numbers of launch.plan: what each rank of a model needs, what fits, and which changes would make it fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.config import EngineConfig
from ...engine.memory.planner import (
    MemoryRequirements,
    RankMemory,
    estimate_gpu,
    estimate_hosts,
    fewest_ranks,
    least_device_bytes,
    least_fraction,
)
from ...engine.memory.sizes import ELEMENT_BYTES
from ...engine.models.resolve import partition_model, resolve_dtype, resolve_max_model_len
from ...engine.models.spec import ModelSpec
from ...parallel.partition import Partition

REQUEST_TOKENS = 32768
CPU_BLOCK_SIZE = 16
"""Tokens of one KV block on a CPU where block_size is not set."""
MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """What to plan for: the engine's settings, and the bytes of its devices, if the plan is to say what fits.

    `device_memory` has a number for each rank's device, or for CPUs a single one for the host that all ranks share.
    """

    config: EngineConfig
    device_memory: tuple[int, ...] | None = None

    @property
    def on_cpu(self) -> bool:
        """Whether ranks compute on CPUs. Without device=cpu a plan is for GPUs."""
        return self.config.device == "cpu"

    @property
    def one_host(self) -> bool:
        """Whether all ranks share one host's memory."""
        return self.on_cpu and self.device_memory is not None and len(self.device_memory) == 1


@dataclass(frozen=True)
class RankNeeds:
    """One rank's memory, in bytes."""

    weights: int
    activations: int
    kv_token: int
    """What each token of the KV cache takes."""
    kv_tokens: int | None
    """Tokens that the KV cache has room for; None if neither device_memory nor kv_memory in bytes is known."""
    lacking: int
    """Bytes by which the device is too small for everything but the KV cache, or for the bytes that kv_memory names."""


@dataclass(frozen=True)
class Plan:
    """A model on N ranks."""

    spec: ModelSpec
    setup: Setup
    requirements: MemoryRequirements
    ranks: tuple[RankMemory, ...] | None
    """Every rank's memory, as far as it is known; None if the devices' memory is unknown."""

    @property
    def parts(self) -> Partition:
        """What each rank holds."""
        return self.requirements.parts

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.requirements.max_model_len

    @property
    def dtype(self) -> str:
        """The dtype of activations, and of weights that are not quantized."""
        return _dtype(self.spec, self.setup)

    @property
    def request_tokens(self) -> int:
        """Tokens of one long request: 32k, or max_model_len if that is less."""
        return min(self.max_model_len, REQUEST_TOKENS)

    @property
    def needs(self) -> tuple[RankNeeds, ...]:
        """Every rank's numbers."""
        return tuple(self._needs(share.rank) for share in self.parts.shares)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that every rank has room for, and an engine's sequences can use."""
        if self.ranks is None:
            return None
        return self._tokens(self.requirements.poorest(self.ranks))

    @property
    def fits(self) -> bool | None:
        """Whether an engine would start: everything fits, and so does one sequence of max_model_len.

        None if the devices' memory is unknown.
        """
        return None if self.ranks is None else self.requirements.fits(self.ranks)

    @property
    def fewest_ranks(self) -> int | None:
        """The fewest ranks that fit, evenly partitioned over devices like the smallest; None if no number does."""
        memory = self.setup.device_memory

        def estimate(dealt: MemoryRequirements) -> list[RankMemory]:
            if memory is None or self.setup.one_host:
                return _estimate(dealt, memory)
            return _estimate(dealt, (min(memory),) * dealt.config.ranks)

        return fewest_ranks(self.requirements, estimate)

    def _needs(self, rank: int) -> RankNeeds:
        requirements = self.requirements
        memory = None if self.ranks is None else self.ranks[rank]
        return RankNeeds(
            requirements.weights(rank),
            requirements.activations(rank),
            requirements.block(rank) // requirements.block_size,
            None if memory is None else self._tokens(memory),
            0 if memory is None else requirements.lacking_bytes(memory),
        )

    def _tokens(self, memory: RankMemory) -> int:
        return self.requirements.blocks(memory) * self.requirements.block_size


def make_plan(spec: ModelSpec, setup: Setup) -> Plan:
    """Compute the needs of every rank. Raises ConfigError for ranks or max_model_len out of the model's range."""
    config = setup.config
    requirements = MemoryRequirements(
        config,
        partition_model(config, spec, config.ranks),
        ELEMENT_BYTES[_dtype(spec, setup)],
        resolve_max_model_len(config, spec),
        # On a GPU the attention backend chooses, so that tokens are counted one by one.
        config.block_size or (CPU_BLOCK_SIZE if setup.on_cpu else 1),
    )
    if setup.device_memory is None and config.kv_memory <= 1:
        return Plan(spec, setup, requirements, None)
    return Plan(spec, setup, requirements, tuple(_estimate(requirements, setup.device_memory)))


def remedies(plan: Plan) -> list[str]:
    """Return changes, each of which alone would make the plan fit, as written on the command line."""
    return [
        " ".join(f"{name}={_written(name, value)}" for name, value in change.items())
        for change in _changes(plan)
        if _after(plan, **change).fits
    ]


def _dtype(spec: ModelSpec, setup: Setup) -> str:
    return resolve_dtype(setup.config, spec, "cpu" if setup.on_cpu else "cuda")


def _estimate(requirements: MemoryRequirements, device_memory: Sequence[int] | None) -> list[RankMemory]:
    """Return every rank's memory before its KV cache is made; without devices only what kv_memory names is known."""
    config = requirements.config
    if device_memory is None:
        budget = int(config.kv_memory)
        return [RankMemory(rank, requirements.block(rank), host_budget=budget) for rank in range(config.ranks)]
    if config.device == "cpu":
        return estimate_hosts(requirements, device_memory)
    return [
        estimate_gpu(requirements, rank, total, requirements.activations(rank))
        for rank, total in enumerate(device_memory)
    ]


def _changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield changes that may make a plan fit."""
    config = plan.setup.config
    memory = plan.setup.device_memory
    requirements = plan.requirements
    assert plan.ranks is not None

    if memory is not None and len(set(memory)) > 1:
        yield {"rank_weights": tuple(round(size / min(memory), 2) for size in memory)}
    elif (ranks := plan.fewest_ranks) is not None:
        yield {"ranks": ranks} | ({} if config.rank_weights is None else {"rank_weights": None})

    if plan.kv_tokens and plan.kv_tokens < plan.max_model_len:
        yield {"max_model_len": plan.kv_tokens // 256 * 256 or plan.kv_tokens}

    if memory is None or (plan.setup.on_cpu and config.kv_memory <= 1):
        sequence = max(requirements.blocks_of_sequence * rank.block for rank in plan.ranks)
        yield {"kv_memory": -(-sequence // MIB) * MIB}

    if memory is None:
        return

    if config.kv_memory > 1:
        # The most bytes that there are for the cache on every rank.
        everything = dataclasses.replace(requirements, config=dataclasses.replace(config, kv_memory=float(sum(memory))))
        most = min(map(everything.available_bytes, _estimate(everything, memory)))
        if most > MIB:
            yield {"kv_memory": most // MIB * MIB}
    elif not plan.setup.on_cpu:
        fractions = [least_fraction(requirements, rank) for rank in plan.ranks]
        if None not in fractions:
            yield {"kv_memory": max(fraction for fraction in fractions if fraction is not None)}

    needed = least_device_bytes(requirements, plan.ranks, shared=plan.setup.one_host)
    rounded = int(math.ceil(needed * 10 / GIB) / 10 * GIB)
    # CPU ranks with a host each need a list: a single number is one host for all.
    apart = plan.setup.on_cpu and not plan.setup.one_host
    yield {"device_memory": (rounded,) * (len(memory) if apart else 1)}


def _after(plan: Plan, device_memory: tuple[int, ...] | None = None, **change: Any) -> Plan:
    config = dataclasses.replace(plan.setup.config, **change)
    memory = plan.setup.device_memory
    if device_memory is not None:
        memory = device_memory
    if memory is not None and not plan.setup.one_host and len(memory) != config.ranks:
        memory = memory[:1] * config.ranks
    return make_plan(plan.spec, Setup(config, memory))


def _written(name: str, value: Any) -> str:
    if name == "device_memory":
        sizes = [f"{size / GIB:.1f}GiB" for size in value]
        return sizes[0] if len(sizes) == 1 else f"[{','.join(sizes)}]"
    if name == "kv_memory" and value > 1:
        return f"{value // MIB}MiB"
    if isinstance(value, tuple):
        return f"[{','.join(f'{part:g}' for part in value)}]"
    return "null" if value is None else str(value)
