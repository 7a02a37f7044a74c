"""Builds one rank's Worker: settings, weights, memory, graphs, one named step after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from ...kernels.weight_formats import get_weight_format
from ...parallel.group import Group
from ...parallel.kept_weights import KeptWeights
from ...parallel.loading.checkpoint import LoadError, LoadReport, Packing, Progress, WeightSlice, load_weights
from ...parallel.loading.dummy_weights import fill_dummy
from ..config import EngineConfig
from ..errors import CheckpointError, ConfigError
from ..memory.planner import MemoryRequirements
from ..memory.profiler import MemoryBudget, peak_memory
from ..memory.worst_case import worst_case_plan
from ..models.decoder import Build, CausalLM
from ..models.forward_batch import ForwardBatch
from ..models.kv_cache import CacheLayout, KVCache
from ..models.resolve import partition_model
from ..models.spec import ModelSpec
from ..sampling.sampler import Sampler
from ..sampling.token_counts import TokenCounts
from .cpu_binding import Binding
from .cuda_graphs import CudaRecorder, DecodeGraphs, EagerRecorder, graph_sizes
from .fingerprint import fingerprint
from .heartbeat import Heartbeat
from .rank_worker import Capacity, Worker
from .resolved_settings import ResolvedSettings, resolve_settings
from .slot_table import SlotTable

T = TypeVar("T")


@dataclass(frozen=True)
class _Loading:
    """Who hears that loading gets on."""

    on_progress: Progress | None
    heartbeat: Heartbeat

    def read(self, done: int, total: int) -> None:
        """Some bytes have come."""
        self.heartbeat.phase("loading")
        if self.on_progress is not None:
            self.on_progress(done, total)


@dataclass(frozen=True)
class LoadedModel:
    """One rank's model with its weights, and what loading them took."""

    model: CausalLM
    report: LoadReport


@dataclass(frozen=True)
class WorkerParts:
    """All that a Worker needs but the KV cache, whose size is known once these parts are there and measured."""

    group: Group
    settings: ResolvedSettings
    memory: MemoryBudget
    cache_layout: CacheLayout
    loaded: LoadedModel
    token_counts: TokenCounts | None
    """What penalties go by where steps overlap; the sampler reads it, and the slot table tells it."""
    sampler: Sampler
    heartbeat: Heartbeat


def build_worker(
    config: EngineConfig,
    spec: ModelSpec,
    folder: Path,
    group: Group,
    on_progress: Progress | None = None,
    binding: Binding | None = None,
    kept_memory: int | None = None,
    heartbeat: Heartbeat | None = None,
) -> Worker:
    """This rank's worker. Every rank of the group calls it at the same time: sizes are exchanged with the others.

    `folder` holds the weights; `on_progress` hears bytes read and bytes in all. `binding` is that of a process which is
    this rank's alone; without, only the kernels' own threads may be bound. `kept_memory` is of make_kept_memory(), for
    the weights to outlive this process; it is closed. `heartbeat` is told what is done.
    Raises ConfigError for settings, and for memory, that do not suffice, and CheckpointError for faulty weights.
    """
    parts = load_parts(config, spec, folder, group, on_progress, binding, kept_memory, heartbeat)
    parts.heartbeat.phase("preparing")
    group.collectives.tune(spec.hidden_size, parts.settings.dtype, config.max_num_seqs)
    if group.device.type == "cuda":
        measure_largest_step(parts)

    sizes = graph_sizes(config.max_num_seqs) if parts.settings.graphs != "none" else ()
    return assemble(parts, parts.memory.agree_on_blocks(sizes), sizes)


def load_parts(
    config: EngineConfig,
    spec: ModelSpec,
    folder: Path,
    group: Group,
    on_progress: Progress | None = None,
    binding: Binding | None = None,
    kept_memory: int | None = None,
    heartbeat: Heartbeat | None = None,
) -> WorkerParts:
    """Settings, weights and sampler of this rank, as build_worker() has them. Raises what that raises."""
    heartbeat = heartbeat or Heartbeat()
    heartbeat.phase("loading")
    settings = resolve_settings(config, spec, group, binding)
    partition = partition_model(config, spec, group.size)
    share = partition.shares[group.rank]
    layout = _cache_layout(spec, settings, len(share.kv_heads), group.device)

    requirements = MemoryRequirements(
        config, partition, settings.dtype.itemsize, settings.max_model_len, settings.block_size
    )
    memory = MemoryBudget(requirements, group, layout.token_bytes)
    memory.check_before_loading()

    build = Build(spec, share, group.collectives, settings.backend, settings.dtype, group.device)
    kept = None
    if kept_memory is not None and group.device.type == "cuda":
        os.close(kept_memory)
    elif kept_memory is not None:
        mark = fingerprint(config, folder, partition, group.rank, settings)
        kept = KeptWeights(
            kept_memory,
            mark,
            huge_first=settings.binding.placement is None,
            only_in_huge_pages=config.weights == "auto",
        )
    loaded = _load_model(build, settings, config, folder, _Loading(on_progress, heartbeat), kept)
    token_counts = TokenCounts(config.max_num_seqs, share.vocab, group.device) if settings.overlap else None
    sampler = Sampler(group.collectives, share.vocab, spec.vocab_size, token_counts=token_counts)
    return WorkerParts(group, settings, memory, layout, loaded, token_counts, sampler, heartbeat)


def measure_largest_step(parts: WorkerParts) -> int:
    """Bytes that the largest step takes beside weights and KV cache, found by running it on a cache of one block.

    Every rank calls it, while nothing runs and before any sequence has a slot that matters.
    Raises ConfigError if a GPU has too little memory for the step.
    """
    config = parts.memory.requirements.config
    requirements = parts.memory.requirements
    plan = worst_case_plan(
        config.max_num_seqs, config.max_num_batched_tokens, requirements.max_model_len, requirements.block_size
    )
    trial = assemble(parts, num_blocks=1)
    return parts.memory.measure_step(lambda: trial.execute(plan))


def assemble(parts: WorkerParts, num_blocks: int, sizes: Sequence[int] = ()) -> Worker:
    """A worker with a KV cache of `num_blocks`, and with CUDA graphs of decode steps of `sizes` rows, if any.

    Every rank calls it with the same values; the graphs are captured here, unless settings.graphs is lazy.
    """
    group = parts.group
    settings = parts.settings
    model = parts.loaded.model
    max_num_seqs = parts.memory.requirements.config.max_num_seqs

    # One more block, that no sequence is given, for the rows that pad a graph's batches.
    cache = KVCache.allocate(num_blocks + (len(sizes) > 0), parts.cache_layout)
    try:
        slot_table = SlotTable(
            max_num_seqs,
            settings.max_model_len,
            settings.block_size,
            group.device,
            parts.token_counts,
            dummy_block=num_blocks if sizes else 0,
        )
    except MemoryError as error:
        raise ConfigError(
            f"the token ids of max_num_seqs={max_num_seqs} sequences of max_model_len={settings.max_model_len} do not "
            f"fit into memory ({error}): lower max_num_seqs or max_model_len"
        ) from error
    graphs = _make_graphs(parts, cache, sizes, dummy_block=num_blocks) if sizes else None

    return Worker(
        rank=group.rank,
        settings=settings,
        memory=parts.memory,
        model=model,
        load_report=parts.loaded.report,
        sampler=parts.sampler,
        slot_table=slot_table,
        cache=cache,
        graphs=graphs,
        capacity=Capacity(num_blocks, settings.block_size, settings.max_model_len, peak_memory(group)),
    )


def _cache_layout(spec: ModelSpec, settings: ResolvedSettings, kv_heads: int, device: torch.device) -> CacheLayout:
    width, dtype = settings.backend.cache_head(spec.head_dim, settings.dtype)
    return CacheLayout(
        block_size=settings.block_size,
        layers=spec.num_layers,
        kv_heads=kv_heads,
        width=width,
        dtype=dtype,
        device=device,
    )


def _load_model(
    build: Build,
    settings: ResolvedSettings,
    config: EngineConfig,
    folder: Path,
    loading: _Loading,
    kept: KeptWeights | None,
) -> LoadedModel:
    def load() -> LoadedModel:
        with torch.inference_mode():
            model = CausalLM(build, settings.max_model_len)
            report = kept.map_into(model) if kept is not None else None
            if report is None:
                report = _fill(model, config, folder, settings.binding.threads, loading, kept)
            return LoadedModel(model, report)

    return _on_own_thread(load) if build.device.type == "cpu" else load()


def _fill(
    model: CausalLM,
    config: EngineConfig,
    folder: Path,
    threads: int,
    loading: _Loading,
    kept: KeptWeights | None,
) -> LoadReport:
    """Read, or make up, the model's weights, pack those that are to be packed, and keep them if they can be kept."""
    keeps = kept is not None and kept.begin(model)
    slices = list(model.weight_slices())
    weight_format = get_weight_format(config.quantization, deterministic=config.deterministic)
    packing = Packing(slices, weight_format, kept.allocate if kept and keeps else None)

    def filled(part: WeightSlice) -> None:
        packing.filled(part)
        loading.heartbeat.phase("loading")

    try:
        if config.load_format == "dummy":
            report = fill_dummy(slices, config.seed, filled=filled)
        else:
            report = load_weights(
                folder,
                slices,
                ignore=model.may_be_left_over,
                progress=loading.read,
                filled=filled,
                threads=threads,
            )
        if kept is not None and keeps:
            kept.keep(model)
        return report
    except LoadError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _make_graphs(parts: WorkerParts, cache: KVCache, sizes: Sequence[int], dummy_block: int) -> DecodeGraphs:
    settings = parts.settings
    model = parts.loaded.model
    requirements = parts.memory.requirements

    def compute(batch: ForwardBatch) -> torch.Tensor:
        return model.logits(model(batch, cache))

    graphs = DecodeGraphs(
        compute,
        EagerRecorder() if settings.graphs == "eager" else CudaRecorder(parts.group.device),
        sizes,
        max_blocks=requirements.blocks_of_sequence,
        block_size=requirements.block_size,
        dummy_block=dummy_block,
        device=parts.group.device,
    )
    if settings.graphs != "lazy":
        with torch.inference_mode():
            for size in graphs.missing:
                parts.heartbeat.phase("preparing")
                graphs.capture(size)
    return graphs


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
