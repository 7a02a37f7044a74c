"""What the correctness tests run on real ranks; tests/ranks.py calls these functions in processes of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from phalanx.engine.in_group import GroupLLM
from phalanx.engine.llm import RequestOutput
from phalanx.engine.params import SamplingParams
from phalanx.engine.plan import SlotSampling, SlotStart, StepPlan

Calls = list[tuple[list[list[int]], list[SamplingParams]]]


def generate_at_each_size(
    rank: int, count: int, folder: str, sizes: list[int], calls: Calls, config: dict[str, Any]
) -> dict[int, list[list[RequestOutput]]]:
    """For each N of `sizes`, an engine on the first N ranks, and what it answers to every call."""
    results = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if rank < size:
            llm = GroupLLM(group, folder, **config)
            results[size] = [llm.generate(prompts, sampling) for prompts, sampling in calls]
            llm.close()
    return results


def logits_at_each_size(
    rank: int, count: int, folder: str, sizes: list[int], tokens: list[int], chunk: int, config: dict[str, Any]
) -> dict[int, np.ndarray]:
    """For each N, the logits (tokens, vocabulary) of one sequence computed in chunks; whole on rank 0 alone."""
    results = {}
    for size in sizes:
        group = dist.new_group(list(range(size)), backend="gloo")
        if rank < size:
            llm = GroupLLM(group, folder, **config)
            worker, collectives = llm._engine.worker, llm._group.collectives
            parts = [_logits(worker, tokens, first, chunk) for first in range(0, len(tokens), chunk)]
            shard = torch.cat(parts).T.contiguous()
            # Shards differ in size; pad them to the largest for the gather, and cut the padding off again.
            widths = collectives.gather(torch.tensor([len(shard)]))
            widest = collectives.broadcast(torch.tensor([max(map(int, widths or [0]))]))
            padded = torch.zeros(int(widest), len(tokens))
            padded[: len(shard)] = shard
            gathered = collectives.gather(padded)
            if gathered is not None and widths is not None:
                whole = [part[: int(width)] for part, width in zip(gathered, widths, strict=True)]
                results[size] = torch.cat(whole).T.numpy()
            llm.close()
    return results


@torch.inference_mode()
def _logits(worker: Any, tokens: list[int], first: int, chunk: int) -> torch.Tensor:
    size = worker.capacity.block_size
    last = min(first + chunk, len(tokens))
    blocks = -(-len(tokens) // size)
    start = SlotStart(0, len(tokens), tokens, SlotSampling())
    plan = StepPlan(
        step=first,
        starts=[start] if first == 0 else [],
        token_slots=[],
        token_ids=[],
        block_slots=[0] * blocks,
        block_indices=list(range(blocks)),
        # Out of order on purpose: a block table is no identity.
        block_ids=list(reversed(range(blocks))),
        slots=[0],
        positions=[first],
        counts=[last - first],
        num_decodes=1 if last - first == 1 else 0,
        sample_rows=[],
    )
    worker._slots.apply(plan)
    hidden = worker._model(worker._slots.batch(plan), worker._cache)
    logits: torch.Tensor = worker._model.logits(hidden)
    return logits
