"""One rank's model, cache and sampler: does exactly what a plan says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from ...kernels import cpu
from ...kernels.attention import AttentionBackend
from ...kernels.backend_selector import choose_backend
from ...parallel.group import Group
from ...parallel.loading.checkpoint import LoadError, LoadReport, Packing, load_weights
from ...parallel.loading.dummy_weights import fill_dummy
from ..config import EngineConfig
from ..errors import CheckpointError, ConfigError
from ..memory.planner import MemoryRequirements
from ..memory.profiler import MemoryBudget, explains_out_of_memory, peak_memory
from ..memory.sizes import kv_token_bytes
from ..memory.worst_case import worst_case_plan
from ..models.decoder import Build, CausalLM
from ..models.forward_batch import ForwardBatch
from ..models.kv_cache import KVCache
from ..models.resolve import resolve_dtype, resolve_max_model_len, share_out
from ..models.spec import ModelSpec
from ..protocol.logprobs import TokenLogprobs
from ..sampling.sampler import Sampler
from ..sampling.token_counts import TokenHistory
from ..scheduling.step_plan import Capture, Idle, SlotSampling, SlotStart, StepPlan, StepResult, Stop, decode
from .cpu_binding import Binding, choose_binding, start_threads
from .cuda_graphs import CudaRecorder, DecodeGraphs, EagerRecorder, choose_graphs, graph_sizes
from .launched_step import LaunchedStep
from .slot_table import SlotTable

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
    """Built by every rank of the group at the same time; the constructor exchanges sizes with the others.

    `binding` is that of a process which is this rank's alone; without, only the kernels' own threads may be bound.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        folder: Path,
        group: Group,
        on_progress: Progress | None = None,
        binding: Binding | None = None,
    ) -> None:
        self._group = group
        self.dtype: torch.dtype = getattr(torch, resolve_dtype(config, spec, group.device.type))
        self.uses_kernels = cpu.usable(group.device, self.dtype)
        place = group.rank % group.local_size, group.local_size
        binding = binding or choose_binding(config, group.device.type, *place)
        self.binding = start_threads(config, binding, self.uses_kernels)
        self.backend = _attention(config, spec, self.dtype, group.device)
        self.overlap = config.overlap if config.overlap is not None else group.device.type == "cuda"
        self.graphs, self.graphs_reason = _graphs(config, self.backend, group)
        self.max_model_len = resolve_max_model_len(config, spec)
        block_size = _block_size(config, self.backend)
        parts = share_out(config, spec, group.size)
        share = parts.shares[group.rank]
        width, kept_as = self.backend.cache_head(spec.head_dim, self.dtype)
        token_bytes = kv_token_bytes(parts, group.rank, width * kept_as.itemsize)
        requirements = MemoryRequirements(config, parts, self.dtype.itemsize, self.max_model_len, block_size)
        self.memory = MemoryBudget(requirements, group, token_bytes)
        self.memory.check_before_loading()
        build = Build(spec, share, group.collectives, self.backend, self.dtype, group.device)

        def make_model() -> tuple[CausalLM, LoadReport]:
            with torch.inference_mode():
                model = CausalLM(build, self.max_model_len)
                return model, _load(model, config, folder, self.binding.threads, on_progress)

        self._model, self.load_report = _on_own_thread(make_model) if group.device.type == "cpu" else make_model()
        history = TokenHistory(config.max_num_seqs, share.vocab, group.device) if self.overlap else None
        make_slots = partial(SlotTable, config.max_num_seqs, self.max_model_len, block_size, group.device, history)
        self._slots = make_slots()
        self._sampler = Sampler(group.collectives, share.vocab, spec.vocab_size, history=history)
        self._make_cache = partial(
            KVCache.allocate,
            block_size=block_size,
            layers=spec.num_layers,
            kv_heads=len(share.kv_heads),
            width=width,
            dtype=kept_as,
            device=group.device,
        )
        self._cache = self._make_cache(1)
        self._graphs: DecodeGraphs | None = None
        group.collectives.tune(spec.hidden_size, self.dtype, config.max_num_seqs)
        if group.device.type == "cuda":
            self.profile()
        sizes = graph_sizes(config.max_num_seqs) if self.graphs != "none" else ()
        num_blocks = self.memory.agree_on_blocks(sizes)
        # One more, that no sequence is given, for the rows that pad a graph's batches.
        self._cache = self._make_cache(num_blocks + (len(sizes) > 0))
        self._slots = make_slots(dummy_block=num_blocks)
        self._graphs = self._make_graphs(sizes, num_blocks)
        self.capacity = Capacity(num_blocks, block_size, self.max_model_len, peak_memory(group))

    def profile(self) -> int:
        """Bytes that the largest step takes beside weights and KV cache, found by running it on a cache of one block.

        Every rank calls it, while nothing runs and before any sequence has a slot that matters.
        Raises ConfigError if a GPU has too little memory for the step.
        """
        requirements = self.memory.requirements
        config = requirements.config
        plan = worst_case_plan(
            config.max_num_seqs, config.max_num_batched_tokens, requirements.max_model_len, requirements.block_size
        )
        kept, self._cache = self._cache, self._make_cache(1)
        try:
            return self.memory.measure_step(lambda: self.execute(plan))
        finally:
            self._cache = kept

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute one step and wait for it. The tokens and log-probabilities on rank 0, None on the others."""
        step = self.launch(plan)
        return step.result() if self._group.rank == 0 else None

    @explains_out_of_memory
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Hand one step to the device. With `overlap` nothing waits for it that need not."""
        with torch.inference_mode():
            self._slots.apply(plan)
            size = self._graphs.size_for(len(plan.slots)) if self._graphs and plan.only_decodes else None
            batch = self._slots.batch(plan, size or 0)
            prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
            if size and self._graphs:
                logits = self._graphs.run(batch)[: len(plan.slots)]
            else:
                # Prompt log-probabilities need all tokens, otherwise those do from which others are sampled.
                hidden = self._model(batch, self._cache, None if batch.prompt_rows else batch.sample_tokens)
                prompt_logprobs = self._prompt_logprobs(batch, hidden)
                if not batch.sample_rows:
                    return LaunchedStep(batch.sample_tokens, [], prompt_logprobs)
                logits = self._model.logits(hidden[batch.sample_tokens] if batch.prompt_rows else hidden)
            return LaunchedStep(*self._sample(logits, batch), prompt_logprobs)

    @explains_out_of_memory
    def capture(self, rows: int) -> None:
        """Capture the CUDA graph of decode steps of `rows` rows. Every rank calls it, between two steps."""
        assert self._graphs is not None
        with torch.inference_mode():
            self._graphs.capture(rows)

    @property
    def uncaptured(self) -> list[int]:
        """Sizes of decode steps whose graphs are still to be captured, in this order."""
        return self._graphs.missing if self._graphs is not None and self.graphs == "lazy" else []

    def close(self) -> None:
        """Give up what holds on to the group's collectives: before these are closed."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    def _sample(self, logits: torch.Tensor, batch: ForwardBatch) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """The tokens, int64 (S,), and their log-probabilities: right on rank 0."""
        if self.overlap:
            tokens, logprobs = self._sampler.choose(logits, batch.sample_rows)
            self._slots.remember(batch.sample_slots, tokens)
            return tokens, logprobs
        sampled = self._sampler.sample(logits, batch.sample_rows)
        return (torch.tensor(sampled[0]), sampled[1]) if sampled else (batch.sample_tokens, [])

    def _make_graphs(self, sizes: Sequence[int], dummy_block: int) -> DecodeGraphs | None:
        if not sizes:
            return None
        device, requirements = self._group.device, self.memory.requirements

        def compute(batch: ForwardBatch) -> torch.Tensor:
            return self._model.logits(self._model(batch, self._cache))

        graphs = DecodeGraphs(
            compute,
            EagerRecorder() if self.graphs == "eager" else CudaRecorder(device),
            sizes,
            max_blocks=requirements.blocks_of_sequence,
            block_size=requirements.block_size,
            dummy_block=dummy_block,
            device=device,
        )
        if self.graphs != "lazy":
            with torch.inference_mode():
                for size in graphs.missing:
                    graphs.capture(size)
        return graphs

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
            worker.launch(message)
        elif isinstance(message, Capture):
            worker.capture(message.rows)
        elif isinstance(message, Stop):
            return message.payload
        else:
            assert isinstance(message, Idle)


def _load(
    model: CausalLM, config: EngineConfig, folder: Path, threads: int, on_progress: Progress | None
) -> LoadReport:
    slices = list(model.weight_slices())
    packing = Packing(slices, config.quantization)
    try:
        if config.load_format == "dummy":
            return fill_dummy(slices, config.seed, filled=packing.filled)
        return load_weights(
            folder,
            slices,
            ignore=model.may_be_left_over,
            progress=on_progress,
            filled=packing.filled,
            threads=threads,
        )
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
            group=spec.num_query_heads // spec.num_kv_heads,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _graphs(config: EngineConfig, backend: AttentionBackend, group: Group) -> tuple[str, str]:
    try:
        return choose_graphs(
            config.graphs,
            device=group.device.type,
            attention=backend.name,
            fits=backend.supports_graph,
            collectives_fit=group.collectives.supports_graph,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _block_size(config: EngineConfig, backend: AttentionBackend) -> int:
    if config.block_size is None:
        return backend.default_block_size
    if config.block_size % backend.block_multiple:
        raise ConfigError(
            f"block_size={config.block_size} must be a multiple of {backend.block_multiple} for "
            f"attention={backend.name}"
        )
    return config.block_size
