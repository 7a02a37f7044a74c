"""What a request asks to change in its logits before a token is chosen; each rank changes its own vocabulary shard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .plan import SlotSampling

TokenIds = npt.NDArray[np.int32]


def changes_logits(sampling: SlotSampling, output_length: int) -> bool:
    """Whether `edit_logits` would do anything after `output_length` output tokens."""
    return (
        bool(sampling.bias_token_ids)
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
        or (output_length < sampling.min_tokens and bool(sampling.end_token_ids))
    )


def edit_logits(
    logits: torch.Tensor,
    vocab: range,
    sampling: SlotSampling,
    token_ids: TokenIds,
    prompt_length: int,
    position: int,
) -> None:
    """Apply bias, penalties and the min_tokens mask, in this order, to one row, in place.

    `logits` is float32 (len(vocab),), the scores of the token ids in `vocab`; ids outside it are other ranks' to edit.
    `token_ids` is the prompt of `prompt_length` tokens and then the output, up to `position`, of which the last one may
    be missing where no penalty needs it. The repetition penalty is CTRL's
    (arXiv:1909.05858, section 4.1); the presence and frequency penalties are those of the OpenAI API.
    """
    if sampling.bias_token_ids:
        ids = np.asarray(sampling.bias_token_ids, dtype=np.int64)
        inside = (ids >= vocab.start) & (ids < vocab.stop)
        bias = np.asarray(sampling.bias_values, dtype=np.float32)[inside]
        logits.index_add_(0, _to(logits, ids[inside] - vocab.start), _to(logits, bias))
    if sampling.repetition_penalty != 1.0:
        index = _to(logits, _local(token_ids, vocab))
        values = logits[index]
        # A token that occurs twice is written twice, with the same value.
        penalty = sampling.repetition_penalty
        logits[index] = torch.where(values > 0, values / penalty, values * penalty)
    if sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0:
        unique, counts = np.unique(_local(token_ids[prompt_length:], vocab), return_counts=True)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        logits[_to(logits, unique)] -= _to(logits, penalties.astype(np.float32))
    if position - prompt_length < sampling.min_tokens:
        logits[_to(logits, _local(np.asarray(sampling.end_token_ids, dtype=np.int64), vocab))] = -torch.inf


def _local(token_ids: npt.NDArray[np.integer], vocab: range) -> npt.NDArray[np.int64]:
    inside = token_ids[(token_ids >= vocab.start) & (token_ids < vocab.stop)]
    return inside.astype(np.int64) - vocab.start


def _to(like: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)
