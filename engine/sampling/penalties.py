"""What a request asks to change in its logits before a token is chosen; each rank changes its own vocabulary shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.host_copies import to_device
from ..scheduling.step_plan import SlotSampling
from .token_counts import TokenCounts

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SampleRow:
    """What chooses the token at `position` of one sequence; the same on every rank."""

    sampling: SlotSampling
    token_ids: TokenIds  # int32: the prompt and the output so far; not modified. Not needed with a TokenCounts
    prompt_length: int
    position: int
    slot: int = -1  # in the TokenCounts, if there is one


def edit_rows(
    logits: torch.Tensor, vocab: range, rows: Sequence[SampleRow], token_counts: TokenCounts | None
) -> dict[int, torch.Tensor]:
    """Edit each row's logits, float32 (len(rows), len(vocab)), in place, as its request asks: see edit_logits.

    Returns the unedited logits of the rows whose raw log-probabilities are wanted, by row. Penalties use
    `token_counts`, if there are any, instead of the rows' token ids.
    """
    edited = [i for i, row in enumerate(rows) if changes_logits(row.sampling, row.position - row.prompt_length)]
    wanted = [i for i in edited if rows[i].sampling.logprobs >= 0 and not rows[i].sampling.processed_logprobs]
    originals = {i: logits[i].clone() for i in wanted}

    if token_counts is None:
        for i, row in ((i, rows[i]) for i in edited):
            edit_logits(logits[i], vocab, row.sampling, row.token_ids, row.prompt_length, row.position)
        return originals

    for i in edited:
        add_bias(logits[i], vocab, rows[i].sampling)
    penalized = [i for i in edited if rows[i].sampling.needs_token_counts]
    if penalized:
        slots = [rows[i].slot for i in penalized]
        samplings = [rows[i].sampling for i in penalized]
        token_counts.penalize(logits, penalized, slots, samplings)
    for i in edited:
        mask_ends(logits[i], vocab, rows[i].sampling, rows[i].position - rows[i].prompt_length)
    return originals


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
    `token_ids` is the prompt of `prompt_length` tokens and then the output, up to `position`. The repetition penalty is
    CTRL's (arXiv:1909.05858, section 4.1); the presence and frequency penalties are those of the OpenAI API.
    """
    add_bias(logits, vocab, sampling)
    _penalize(logits, vocab, sampling, token_ids, prompt_length)
    mask_ends(logits, vocab, sampling, position - prompt_length)


def add_bias(logits: torch.Tensor, vocab: range, sampling: SlotSampling) -> None:
    """Add a request's logit biases to its row, in place: the first step of edit_logits."""
    if sampling.bias_token_ids:
        ids = np.asarray(sampling.bias_token_ids, dtype=np.int64)
        inside = (ids >= vocab.start) & (ids < vocab.stop)
        bias = np.asarray(sampling.bias_values, dtype=np.float32)[inside]
        logits.index_add_(0, _to(logits, ids[inside] - vocab.start), _to(logits, bias))


def mask_ends(logits: torch.Tensor, vocab: range, sampling: SlotSampling, output_length: int) -> None:
    """Mask the end tokens of a row before min_tokens are out, in place: the last step of edit_logits."""
    if output_length < sampling.min_tokens:
        logits[_to(logits, _local(np.asarray(sampling.end_token_ids, dtype=np.int64), vocab))] = -torch.inf


def _penalize(
    logits: torch.Tensor, vocab: range, sampling: SlotSampling, token_ids: TokenIds, prompt_length: int
) -> None:
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


def _local(token_ids: npt.NDArray[np.integer], vocab: range) -> npt.NDArray[np.int64]:
    inside = token_ids[(token_ids >= vocab.start) & (token_ids < vocab.stop)]
    return inside.astype(np.int64) - vocab.start


def _to(like: torch.Tensor, values: npt.NDArray[np.generic]) -> torch.Tensor:
    return to_device([values], like.device)[0]
