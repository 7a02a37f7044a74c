"""What a rank was sent of each slot, and the tensors of a step built from it."""

from __future__ import annotations

import numpy as np
import torch

from ...kernels.attention import AttentionMetadata
from ...kernels.host_copies import to_device
from ..models.forward_batch import ForwardBatch, PromptRows
from ..sampling.penalties import SampleRow
from ..sampling.token_counts import TokenCounts
from ..scheduling.step_plan import SlotSampling, StepPlan


class SlotTable:
    """Token ids, block tables and sampling values by slot. Changed by apply() and remember() alone."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        token_counts: TokenCounts | None = None,
        dummy_block: int = 0,
    ) -> None:
        """`token_counts` hears of what starts and of what is remembered.

        The rows that pad a batch keep their keys and values in `dummy_block`, which no sequence has.
        """
        self._token_counts = token_counts
        self._block_size = block_size
        self._device = device

        # The last slot is nobody's: the sequence of one token with which batches are padded.
        count = max_num_seqs + 1
        # One place more than max_model_len: the token sampled at the very end is known, though never computed.
        self._tokens = np.zeros((count, max_model_len + 1), dtype=np.int32)
        self._blocks = np.zeros((count, -(-max_model_len // block_size)), dtype=np.int64)
        self._blocks[-1] = dummy_block
        self._known = np.zeros(count, dtype=np.int64)
        self._known[-1] = 1
        self._prompt = np.zeros(count, dtype=np.int64)
        self._sampling = [SlotSampling()] * max_num_seqs

        # The last token sampled in each slot: on the device before any host knows it.
        self._sampled = torch.zeros(count, dtype=torch.int64, device=device)

    def apply(self, plan: StepPlan) -> None:
        """Take in what `plan` says has changed."""
        for start in plan.starts:
            count = len(start.token_ids)
            self._tokens[start.slot, :count] = start.token_ids
            self._known[start.slot] = count
            self._prompt[start.slot] = start.prompt_length
            self._sampling[start.slot] = start.sampling
            if self._token_counts is not None:
                self._token_counts.start(start)

        if len(set(plan.token_slots)) == len(plan.token_slots):
            self._append(plan.token_slots, plan.token_ids)
        else:
            for slot, token_id in zip(plan.token_slots, plan.token_ids, strict=True):
                self._append([slot], [token_id])

        if plan.block_slots:
            self._blocks[plan.block_slots, plan.block_indices] = plan.block_ids

    def _lengths(self, slots: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Return how many tokens each token's sequence had when the token was first computed.

        That is the whole prompt, or the token itself as the last one: the same again after a preemption.
        """
        lengths: np.ndarray = np.maximum(self._prompt[slots], positions + 1)
        return lengths

    def _append(self, slots: list[int], token_ids: list[int]) -> None:
        """One token to each of different slots."""
        if slots:
            self._tokens[slots, self._known[slots]] = token_ids
            self._known[slots] += 1

    def remember(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep tokens, int64 (S,), just sampled in `slots`, for rows planned before the host knows them. Nobody waits.

        What is no token becomes token 0: the row that computes it is dropped.
        """
        self._sampled[slots] = tokens.clamp(min=0)
        if self._token_counts is not None:
            self._token_counts.add(slots, tokens)

    def batch(self, plan: StepPlan, pad_to: int = 0) -> ForwardBatch:
        """The tensors of `plan`, which must have been applied; if it has decode rows alone, padded to `pad_to` rows."""
        padding = max(0, pad_to - len(plan.slots))
        slots = np.array(plan.slots + [len(self._known) - 1] * padding)
        first, counts = np.array(plan.positions + [0] * padding), np.array(plan.counts + [1] * padding)
        num_decodes = plan.num_decodes + padding

        # Each token's slot, position in its sequence, and first index of its block in the cache.
        starts = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        token_slots = np.repeat(slots, counts)
        positions = np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)
        block_starts = self._blocks[token_slots, positions // self._block_size] * self._block_size

        # The keys that each row reads, and whether it computes a token whose id this rank was not sent.
        keys = first + counts
        sampled = np.array(plan.sample_rows, dtype=np.int64)
        unsent = keys > self._known[slots]

        columns = [
            self._blocks[slots, : -(-int(keys.max()) // self._block_size)],
            block_starts + positions % self._block_size,
            starts.astype(np.int32),
            keys.astype(np.int32),
            self._tokens[token_slots, positions].astype(np.int64),
            positions,
            self._lengths(token_slots, positions),
            starts[1:][sampled] - 1,
            slots[sampled],
            slots,
            unsent,
        ]
        table, slot_mapping, cu_q, seqused_k, token_ids, position, lengths, last, last_slots, row_slots, mask = (
            to_device(columns, self._device)
        )
        if unsent.any():
            decodes = slice(0, num_decodes)
            sampled_last = self._sampled[row_slots[decodes]]
            token_ids[decodes] = torch.where(mask[decodes], sampled_last, token_ids[decodes])

        attention = AttentionMetadata(
            num_decodes=num_decodes,
            slot_mapping=slot_mapping,
            block_table=table,
            cu_q=cu_q,
            seqused_k=seqused_k,
            query_lengths=tuple(counts.tolist()),
            key_lengths=tuple(keys.tolist()),
            block_size=self._block_size,
        )
        return ForwardBatch(
            token_ids=token_ids,
            positions=position,
            lengths=lengths,
            attention=attention,
            sample_tokens=last,
            sample_slots=last_slots,
            sample_rows=[self._sample_row(plan.slots[row], int(keys[row])) for row in plan.sample_rows],
            prompt_rows=self._prompt_rows(plan, starts),
        )

    def _sample_row(self, slot: int, position: int) -> SampleRow:
        token_ids = self._tokens[slot, : self._known[slot]]
        return SampleRow(self._sampling[slot], token_ids, int(self._prompt[slot]), position, slot)

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
