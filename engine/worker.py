"""One rank's model, cache and sampler: does exactly what a plan says."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ..kernels import cpu
from ..kernels.attention import AttentionBackend, choose_backend
from ..parallel.checkpoint import LoadError, LoadReport, Packing, load_weights
from ..parallel.dummy import fill_dummy
from ..parallel.group import Group
from ..parallel.partition import Partition, PartitionError, partition
from .batch import ForwardBatch, SlotTable
from .config import EngineConfig
from .errors import CheckpointError, ConfigError
from .kv_cache import KVCache, count_blocks, kv_budget
from .models.decoder import Build, CausalLM
from .models.spec import ModelSpec, dimensions, position_limit
from .plan import Idle, SlotSampling, SlotStart, StepPlan, StepResult, Stop, TokenLogprobs, decode
from .sampler import Sampler

LOGPROB_ROWS = 256
"""Prompt positions whose logits are held at once, so that long prompts need no (prompt, vocabulary) tensor."""

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Capacity:
    """What the ranks agreed on: every one of them has room for this."""

    num_blocks: int
    block_size: int
    max_model_len: int
    peak_memory: tuple[int, ...]  # bytes, by rank; meaningful on rank 0


class Worker:
    """Built by every rank of the group at the same time; the constructor exchanges sizes with the others."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, folder: Path, group: Group, on_progress: Progress | None = None
    ) -> None:
        self._group = group
        self.dtype = _dtype(config, spec, group.device)
        self.threads = threads_of(config, group.local_size)
        cpu.set_threads(self.threads)
        self.backend = _attention(config, spec, self.dtype, group.device)
        self.uses_kernels = cpu.usable(group.device, self.dtype)
        self.max_model_len = resolve_max_model_len(config, spec)
        block_size = _block_size(config, self.backend)
        share = share_out(config, spec, group.size).shares[group.rank]
        build = Build(spec, share, group.collectives, self.backend, self.dtype, group.device)

        def make_model() -> tuple[CausalLM, LoadReport]:
            with torch.inference_mode():
                model = CausalLM(build, self.max_model_len)
                return model, _load(model, config, folder, on_progress)

        self._model, self.load_report = _on_own_thread(make_model) if group.device.type == "cpu" else make_model()
        width, kept_as = self.backend.cache_head(spec.head_dim, self.dtype)
        token_bytes = 2 * spec.num_layers * len(share.kv_heads) * width * kept_as.itemsize
        num_blocks = self._agree_on_blocks(config, block_size, token_bytes)
        self._cache = KVCache.allocate(
            num_blocks,
            block_size,
            spec.num_layers,
            len(share.kv_heads),
            width,
            kept_as,
            group.device,
        )
        self._slots = SlotTable(config.max_num_seqs, self.max_model_len, block_size, group.device)
        self._sampler = Sampler(group.collectives, share.vocab, spec.vocab_size)
        self.capacity = Capacity(num_blocks, block_size, self.max_model_len, self._peak_memory())

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute one step. The sampled tokens and log-probabilities on rank 0, None on the others."""
        with torch.inference_mode():
            self._slots.apply(plan)
            batch = self._slots.batch(plan)
            # Prompt log-probabilities need all tokens, otherwise those do from which others are sampled.
            hidden = self._model(batch, self._cache, None if batch.prompt_rows else batch.sample_tokens)
            prompt_logprobs = self._prompt_logprobs(batch, hidden)
            sampled = None
            if batch.sample_rows:
                rows = hidden[batch.sample_tokens] if batch.prompt_rows else hidden
                sampled = self._sampler.sample(self._model.logits(rows), batch.sample_rows)
        if self._group.rank != 0:
            return None
        tokens, logprobs = sampled or ([], [])
        return StepResult(tokens, logprobs, prompt_logprobs)

    def score(self, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
        """Logits of one sequence after each of its tokens, float32 (T, vocabulary rows of this rank), for measuring.

        Every rank calls it, while nothing runs: it takes the first slot and the first blocks for itself. The sequence
        is computed `chunk` tokens a step, None for all at once.
        """
        parts = []
        step = chunk or len(token_ids)
        for first in range(0, len(token_ids), step):
            plan = _one_sequence(token_ids, first, min(first + step, len(token_ids)), self.capacity.block_size)
            with torch.inference_mode():
                self._slots.apply(plan)
                parts.append(self._model.logits(self._model(self._slots.batch(plan), self._cache)))
        return torch.cat(parts)

    def _prompt_logprobs(self, batch: ForwardBatch, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        results: dict[int, list[TokenLogprobs]] = {}
        for rows in batch.prompt_rows:
            for first in range(0, len(rows.tokens), LOGPROB_ROWS):
                piece = slice(first, first + LOGPROB_ROWS)
                index = torch.from_numpy(rows.tokens[piece]).to(hidden.device)
                logits = self._model.logits(hidden[index])
                scored = self._sampler.prompt_logprobs(
                    logits, np.asarray(rows.next_token_ids[piece]), rows.sampling.prompt_logprobs
                )
                results.setdefault(rows.row, []).extend(scored or [])
        return results

    def _agree_on_blocks(self, config: EngineConfig, block_size: int, token_bytes: int) -> int:
        """KV blocks of every rank: the fewest that any has room for. All raise ConfigError if that is too few."""
        group = self._group
        sequence_bytes = -(-self.max_model_len // block_size) * block_size * token_bytes
        budget = kv_budget(config, group.device, group.local_size, sequence_bytes)
        mine = torch.tensor([budget // (block_size * token_bytes), budget, block_size * token_bytes])
        everyone = group.host.gather(mine)
        fewest = mine if everyone is None else min(everyone, key=lambda row: int(row[0]))
        _, budget, block_bytes = group.host.broadcast(fewest.clone()).tolist()
        return count_blocks(config, self.max_model_len, block_size, block_bytes, budget)

    def _peak_memory(self) -> tuple[int, ...]:
        device = self._group.device
        peak = (
            torch.cuda.max_memory_allocated(device)
            if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        everyone = self._group.host.gather(torch.tensor([peak]))
        return tuple(int(value) for value in everyone) if everyone else ()


def _one_sequence(token_ids: Sequence[int], first: int, last: int, block_size: int) -> StepPlan:
    """Computes the tokens first..last of the only sequence there is; nothing is sampled."""
    blocks = list(range(-(-len(token_ids) // block_size)))
    return StepPlan(
        step=first,
        starts=[] if first else [SlotStart(0, len(token_ids), list(token_ids), SlotSampling())],
        token_slots=[],
        token_ids=[],
        block_slots=[0] * len(blocks),
        block_indices=blocks,
        # Last first: whoever takes a block's place in the table for its number is found out.
        block_ids=blocks[::-1],
        slots=[0],
        positions=[first],
        counts=[last - first],
        num_decodes=1 if last - first == 1 else 0,
        sample_rows=[],
    )


def follow(worker: Worker, group: Group) -> bytes:
    """The life of a rank other than 0: execute each plan until rank 0 says stop. Returns the stop's payload."""
    while True:
        message = decode(group.control.receive())
        if isinstance(message, StepPlan):
            worker.execute(message)
        elif isinstance(message, Stop):
            return message.payload
        else:
            assert isinstance(message, Idle)


def threads_of(config: EngineConfig, local_size: int) -> int:
    """CPU threads of a rank: as configured, or its share of the cores that this process may use."""
    return config.threads or max(1, len(os.sched_getaffinity(0)) // local_size)


def share_out(config: EngineConfig, spec: ModelSpec, ranks: int) -> Partition:
    """What each rank holds; ConfigError if the model cannot be cut so."""
    try:
        return partition(dimensions(spec), ranks, config.rank_weights)
    except PartitionError as error:
        raise ConfigError(str(error)) from error


def _load(model: CausalLM, config: EngineConfig, folder: Path, on_progress: Progress | None) -> LoadReport:
    slices = list(model.weight_slices())
    packing = Packing(slices, config.quantization)
    try:
        if config.load_format == "dummy":
            return fill_dummy(slices, config.seed, filled=packing.filled)
        return load_weights(folder, slices, ignore=model.may_be_left_over, progress=on_progress, filled=packing.filled)
    except LoadError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _on_own_thread(work: Callable[[], T]) -> T:
    """Run `work` on a thread that then ends, and return or raise what it does.

    OpenMP keeps a pool of threads for each thread that ever computed. While there are more of them in all than cores,
    they sleep between operations instead of spinning, and a decode step of many small ones takes a tenth longer.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="phalanx-load", daemon=True).start()
    return future.result()


def resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """max_model_len as configured, or the model's own; ConfigError above what the model's positions allow."""
    limit = position_limit(spec)
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's {limit} positions; lower max_model_len to at "
            f"most {limit}, or give the model's config.json a rope scaling"
        )
    return config.max_model_len


def _attention(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    if device.type == "cpu":
        cpu.warn_if_missing()
    if config.quantization != "none" and not (cpu.usable(device, dtype) and dtype == torch.bfloat16):
        raise ConfigError(
            f"quantization={config.quantization} needs phalanx's C++ kernels, a CPU and dtype=bfloat16; here are "
            f"{device.type}, {dtype} and kernels that are {'built' if cpu.native else 'not built'}: set "
            f"quantization=none"
        )
    try:
        return choose_backend(
            config.attention,
            device=device,
            dtype=dtype,
            head_dim=spec.head_dim,
            block_size=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _dtype(config: EngineConfig, spec: ModelSpec, device: torch.device) -> torch.dtype:
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if name == "float16" and device.type == "cpu" and config.dtype == "auto":
        name = "bfloat16"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _block_size(config: EngineConfig, backend: AttentionBackend) -> int:
    if config.block_size is None:
        return backend.default_block_size
    if config.block_size % backend.block_multiple:
        raise ConfigError(
            f"block_size={config.block_size} must be a multiple of {backend.block_multiple} for "
            f"attention={backend.name}"
        )
    return config.block_size
