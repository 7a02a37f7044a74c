"""A worker's logits after every token of one sequence, without a scheduler: for measuring, and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart, StepPlan


def sequence_logits(worker: Worker, token_ids: Sequence[int], chunk: int | None = None) -> torch.Tensor:
    """Logits of one sequence after each of its tokens, float32 (T, vocabulary rows of this rank).

    Every rank calls it, while nothing runs: it takes the first slot and the first blocks for itself. The sequence is
    computed `chunk` tokens a step, None for all at once.
    """
    parts = []
    step = chunk or len(token_ids)
    for first in range(0, len(token_ids), step):
        plan = _one_sequence(token_ids, first, min(first + step, len(token_ids)), worker.settings.block_size)
        with torch.inference_mode():
            worker.slot_table.apply(plan)
            hidden = worker.model(worker.slot_table.batch(plan), worker.cache)
            parts.append(worker.model.logits(hidden))
    return torch.cat(parts)


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
