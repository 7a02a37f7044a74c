"""The step that takes the most memory, which the profiler runs."""

from __future__ import annotations

from ..protocol.sampling_params import LOGPROBS_LIMIT
from ..scheduling.step_plan import SlotSampling, SlotStart, StepPlan

HEAVIEST = SlotSampling(
    temperature=1000.0, top_p=0.99, repetition_penalty=1.1, logprobs=LOGPROBS_LIMIT, prompt_logprobs=LOGPROBS_LIMIT
)
"""Sampling that takes the most memory: so hot that no rank's candidates hold the nucleus; the logits from before the
penalty are kept as well."""


def worst_case_plan(max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int, block_size: int) -> StepPlan:
    """Return the step that takes the most memory: as many tokens and as many rows of logits as there may be.

    The last row is at the end of a sequence of max_model_len; rows before it are like it as long as there are tokens
    for more than one each, and the rest are sequences of one token. All sample, as HEAVIEST. Every block of every
    sequence is block 0: the values that are computed mean nothing, and a cache of one block is enough.
    """
    rows = min(max_num_seqs, max_num_batched_tokens)

    # The last rows get the spare tokens, up to whole sequences.
    counts = [1] * rows
    spare = max_num_batched_tokens - rows
    for row in reversed(range(rows)):
        more = min(spare, max_model_len - 1)
        counts[row] += more
        spare -= more

    lengths = [max_model_len if count > 1 else 1 for count in counts[:-1]] + [max_model_len]
    blocks = [-(-length // block_size) for length in lengths]
    return StepPlan(
        step=0,
        starts=[SlotStart(slot, length, [0] * length, HEAVIEST) for slot, length in enumerate(lengths)],
        token_slots=[],
        token_ids=[],
        block_slots=[slot for slot, count in enumerate(blocks) for _ in range(count)],
        block_indices=[index for count in blocks for index in range(count)],
        block_ids=[0] * sum(blocks),
        slots=list(range(rows)),
        positions=[length - count for length, count in zip(lengths, counts, strict=True)],
        counts=counts,
        num_decodes=counts.count(1),
        sample_rows=list(range(rows)),
    )
