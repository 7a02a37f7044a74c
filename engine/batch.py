"""A rank's memory of what it was told of each slot, and the tensors of a step built from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.attention import AttentionMetadata
from .plan import SlotSampling, StepPlan
from .sampler import SampleRow


@dataclass(frozen=True)
class PromptRows:
    """Positions of one row whose next prompt token's log-probability was asked for."""

    row: int
    tokens: np.ndarray  # (P,) int64: indices into the step's tokens
    next_token_ids: np.ndarray  # (P,) int32
    sampling: SlotSampling


@dataclass(frozen=True)
class ForwardBatch:
    """One step's inputs on the model's device; T tokens."""

    token_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    lengths: torch.Tensor  # (T,) int64: known tokens of each token's sequence
    attention: AttentionMetadata
    sample_tokens: torch.Tensor  # (S,) int64: indices of the tokens whose successor is sampled
    sample_rows: list[SampleRow]
    prompt_rows: list[PromptRows]


class SlotTable:
    """Token ids, block tables and sampling values by slot. Changed by apply() alone."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size, self._device = block_size, device
        # One place more than max_model_len: the token sampled at the very end is known, though never computed.
        self._tokens = np.zeros((max_num_seqs, max_model_len + 1), dtype=np.int32)
        self._blocks = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int64)
        self._known = np.zeros(max_num_seqs, dtype=np.int64)
        self._prompt = np.zeros(max_num_seqs, dtype=np.int64)
        self._sampling = [SlotSampling()] * max_num_seqs

    def apply(self, plan: StepPlan) -> None:
        """Take in what `plan` says has changed."""
        for start in plan.starts:
            count = len(start.token_ids)
            self._tokens[start.slot, :count] = start.token_ids
            self._known[start.slot] = count
            self._prompt[start.slot] = start.prompt_length
            self._sampling[start.slot] = start.sampling
        if plan.token_slots:
            self._tokens[plan.token_slots, self._known[plan.token_slots]] = plan.token_ids
            self._known[plan.token_slots] += 1
        if plan.block_slots:
            self._blocks[plan.block_slots, plan.block_indices] = plan.block_ids

    def batch(self, plan: StepPlan) -> ForwardBatch:
        """The tensors of `plan`, which must have been applied."""
        slots, first, counts = (np.array(column) for column in (plan.slots, plan.positions, plan.counts))
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        token_slots = np.repeat(slots, counts)
        positions = np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)
        keys = first + counts
        table = self._blocks[slots, : -(-int(keys.max()) // self._block_size)]
        places = self._blocks[token_slots, positions // self._block_size] * self._block_size
        attention = AttentionMetadata(
            num_decodes=plan.num_decodes,
            slots=self._tensor(places + positions % self._block_size),
            block_table=self._tensor(table),
            cu_q=self._tensor(starts.astype(np.int32)),
            seqused_k=self._tensor(keys.astype(np.int32)),
            query_lengths=tuple(plan.counts),
            key_lengths=tuple(keys.tolist()),
            block_size=self._block_size,
        )
        return ForwardBatch(
            token_ids=self._tensor(self._tokens[token_slots, positions].astype(np.int64)),
            positions=self._tensor(positions),
            lengths=self._tensor(self._known[token_slots]),
            attention=attention,
            sample_tokens=self._tensor(starts[1:][plan.sample_rows] - 1),
            sample_rows=[self._sample_row(plan.slots[row]) for row in plan.sample_rows],
            prompt_rows=self._prompt_rows(plan, starts),
        )

    def _sample_row(self, slot: int) -> SampleRow:
        known = int(self._known[slot])
        return SampleRow(self._sampling[slot], self._tokens[slot, :known], int(self._prompt[slot]), known)

    def _prompt_rows(self, plan: StepPlan, starts: np.ndarray) -> list[PromptRows]:
        rows = []
        for row, slot in enumerate(plan.slots):
            sampling = self._sampling[slot]
            if sampling.prompt_logprobs < 0:
                continue
            first = plan.positions[row]
            last = min(first + plan.counts[row], int(self._prompt[slot]) - 1)
            if last > first:
                tokens = np.arange(starts[row], starts[row] + last - first)
                rows.append(PromptRows(row, tokens, self._tokens[slot, first + 1 : last + 1].copy(), sampling))
        return rows

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
