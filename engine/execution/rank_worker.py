"""One rank's model, cache and sampler: does exactly what a plan says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...parallel.control import ControlChannel
from ...parallel.loading.checkpoint import LoadReport
from ..errors import EngineStopped
from ..memory.profiler import MemoryBudget
from ..models.decoder import CausalLM
from ..models.forward_batch import ForwardBatch
from ..models.kv_cache import KVCache
from ..protocol.logprobs import TokenLogprobs
from ..sampling.sampler import Sampler
from ..scheduling.step_plan import Capture, Idle, Masks, StepPlan, StepResult, Stop, decode
from .cuda_graphs import DecodeGraphs
from .heartbeat import Heartbeat
from .resolved_settings import ResolvedSettings
from .slot_table import SlotTable

LOGPROB_ROWS = 256
"""Prompt positions whose logits are held at once, so that long prompts need no (prompt, vocabulary) tensor."""


@dataclass(frozen=True)
class Capacity:
    """What the ranks agreed on: every one of them has room for this."""

    num_blocks: int
    block_size: int
    max_model_len: int
    peak_memory: tuple[int, ...]  # bytes, by rank; meaningful on rank 0


class LaunchedStep:
    """Rank 0 asks it for the result, once it needs it; the other ranks leave it alone."""

    def __init__(
        self,
        token_ids: torch.Tensor,
        logprobs: list[TokenLogprobs | None],
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        failures: dict[int, Exception] | None = None,
    ) -> None:
        """`token_ids` are int64 (S,), maybe on a GPU that has yet to compute them: they are on their way already."""
        self._failures = failures or {}
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._token_ids = token_ids
        self._arrived: torch.cuda.Event | None = None
        if token_ids.device.type == "cuda":
            self._token_ids = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
            self._token_ids.copy_(token_ids, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> StepResult:
        """Waits for the device: the one time in a step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return StepResult(self._token_ids.tolist(), self._logprobs, self._prompt_logprobs, self._failures)


@dataclass(frozen=True)
class ForwardPass:
    """A step whose tokens are still to be sampled."""

    plan: StepPlan
    batch: ForwardBatch
    logits: torch.Tensor | None
    """Float32 (S, vocabulary shard); None if the step samples nothing. Good until the next step is launched."""
    prompt_logprobs: dict[int, list[TokenLogprobs]]
    end: torch.cuda.Event | None = None

    def computed(self) -> bool:
        """Whether the device has computed the logits."""
        return self.end is None or bool(self.end.query())  # type: ignore[no-untyped-call]


class Worker:
    """Holds what worker_factory.build_worker() made, and computes with it. The ranks of a group do so together."""

    def __init__(
        self,
        *,
        rank: int,
        settings: ResolvedSettings,
        memory: MemoryBudget,
        model: CausalLM,
        load_report: LoadReport,
        sampler: Sampler,
        slot_table: SlotTable,
        cache: KVCache,
        graphs: DecodeGraphs | None,
        capacity: Capacity,
    ) -> None:
        """`graphs` are of `model` over `cache`, None if decode steps have none. `memory` explains where it runs out."""
        self.rank = rank
        self.settings = settings
        self.memory = memory
        self.model = model
        self.load_report = load_report
        self.sampler = sampler
        self.slot_table = slot_table
        self.cache = cache
        self.capacity = capacity
        self._graphs = graphs
        self.heartbeat = Heartbeat()
        """Set before the first step, where somebody supervises this rank."""

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute one step and wait for it. The tokens and log-probabilities on rank 0, None on the others."""
        step = self.launch(plan)
        return step.result() if self.rank == 0 else None

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Hand one step without masked_samples to the device. With `overlap` nothing waits for it that need not.

        Raises EngineStopped, with the settings to change, if the device's memory does not suffice.
        """
        with self._computing():
            return self._sample(self._forward(plan))

    def forward(self, plan: StepPlan) -> ForwardPass:
        """The first part of launch(), for which nobody needs to know which tokens a grammar allows next."""
        with self._computing():
            step = self._forward(plan)
            if self.rank != 0 or not plan.masked_samples or step.logits is None or step.logits.device.type != "cuda":
                return step
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record()
            return replace(step, end=end)

    def sample(self, step: ForwardPass, masks: Sequence[bytes]) -> LaunchedStep:
        """The second part; `masks` are those of the plan's masked_samples (see Masks)."""
        with self._computing():
            return self._sample(step, masks)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Without gradients; where the device's memory does not suffice, the error says what to change."""
        try:
            with torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise EngineStopped(self.memory.advice()) from error

    def _forward(self, plan: StepPlan) -> ForwardPass:
        self.slot_table.apply(plan)
        size = self._graphs.size_for(len(plan.slots)) if self._graphs and plan.only_decodes else None
        batch = self.slot_table.batch(plan, size or 0)
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}

        if size and self._graphs:
            logits = self._graphs.run(batch)[: len(plan.slots)]
        else:
            # Prompt log-probabilities need all tokens, otherwise those do from which others are sampled.
            hidden = self.model(batch, self.cache, None if batch.prompt_rows else batch.sample_tokens)
            prompt_logprobs = self._prompt_logprobs(batch, hidden)
            if not batch.sample_rows:
                return ForwardPass(plan, batch, None, prompt_logprobs)
            logits = self.model.logits(hidden[batch.sample_tokens] if batch.prompt_rows else hidden)
        return ForwardPass(plan, batch, logits, prompt_logprobs)

    @property
    def uncaptured(self) -> list[int]:
        """Sizes of decode steps whose graphs are still to be captured, in this order."""
        return self._graphs.missing if self._graphs is not None and self.settings.graphs == "lazy" else []

    def capture(self, rows: int) -> None:
        """Capture the CUDA graph of decode steps of `rows` rows. Every rank calls it, between two steps.

        Raises EngineStopped, with the settings to change, if the device's memory does not suffice.
        """
        assert self._graphs is not None
        with self._computing():
            self._graphs.capture(rows)

    def follow_plans(self, control: ControlChannel) -> bytes:
        """The life of a rank other than 0: do what rank 0 sends, until it says stop. Returns the stop's payload."""
        while True:
            self.heartbeat.phase("waiting")
            message = decode(control.receive())
            if isinstance(message, StepPlan):
                self.heartbeat.step(message.step, message.num_tokens)
                self.heartbeat.phase("compute")
                if message.masked_samples:
                    self.sample(self.forward(message), _receive_masks(control))
                else:
                    self.launch(message)
            elif isinstance(message, Capture):
                self.capture(message.rows)
            elif isinstance(message, Stop):
                return message.payload
            else:
                assert isinstance(message, Idle)

    def close(self) -> None:
        """Give up what holds on to the group's collectives: before these are closed."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    def _sample(self, step: ForwardPass, masks: Sequence[bytes] = ()) -> LaunchedStep:
        if step.logits is None:
            return LaunchedStep(step.batch.sample_tokens, [], step.prompt_logprobs)
        by_row = dict(zip(step.plan.masked_samples, masks, strict=True))
        tokens, logprobs = self._choose(step.logits, step.batch, by_row)
        return LaunchedStep(tokens, logprobs, step.prompt_logprobs, self.sampler.take_failures())

    def _choose(
        self, logits: torch.Tensor, batch: ForwardBatch, masks: dict[int, bytes]
    ) -> tuple[torch.Tensor, list[TokenLogprobs | None]]:
        """The tokens, int64 (S,), and their log-probabilities: right on rank 0."""
        if self.settings.overlap:
            tokens, logprobs = self.sampler.choose(logits, batch.sample_rows, masks)
            self.slot_table.remember(batch.sample_slots, tokens)
            return tokens, logprobs
        sampled = self.sampler.sample(logits, batch.sample_rows, masks)
        return (torch.tensor(sampled[0]), sampled[1]) if sampled else (batch.sample_tokens, [])

    def _prompt_logprobs(self, batch: ForwardBatch, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        results: dict[int, list[TokenLogprobs]] = {}
        for rows in batch.prompt_rows:
            for first in range(0, len(rows.tokens), LOGPROB_ROWS):
                piece = slice(first, first + LOGPROB_ROWS)
                index = torch.from_numpy(rows.tokens[piece]).to(hidden.device)
                logits = self.model.logits(hidden[index])
                scored = self.sampler.prompt_logprobs(
                    logits, np.asarray(rows.next_token_ids[piece]), rows.sampling.prompt_logprobs
                )
                results.setdefault(rows.row, []).extend(scored or [])
        return results


def _receive_masks(control: ControlChannel) -> list[bytes]:
    message = decode(control.receive())
    assert isinstance(message, Masks)
    return message.masks
