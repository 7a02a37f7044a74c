"""What a request asks to change in its logits before a token is chosen; each rank changes its own vocabulary shard."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.host_copies import to_device
from ..scheduling.step_plan import SlotSampling
from .grammar_masks import apply_masks
from .token_counts import TokenCounts

TokenIds = npt.NDArray[np.int32]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRow:
    """What chooses the token at `position` of one sequence; the same on every rank."""

    sampling: SlotSampling
    token_ids: TokenIds  # int32: the prompt and the output so far, not modified; with a TokenCounts maybe not the last
    prompt_length: int
    position: int
    slot: int = -1  # in the TokenCounts, if there is one


def edit_rows(
    logits: torch.Tensor,
    vocab: range,
    rows: Sequence[SampleRow],
    token_counts: TokenCounts | None,
    masks: Mapping[int, bytes] | None = None,
    failures: dict[int, Exception] | None = None,
) -> dict[int, torch.Tensor]:
    """Edit each row's logits, float32 (len(rows), len(vocab)), in place, as its request asks: see edit_logits.

    `masks` has, by row, which tokens of the whole vocabulary a grammar allows: see apply_masks. A row that cannot be
    edited is filled with NaN, of which every rank makes that it has no token, and its error is added to `failures`.
    Returns the unedited logits of the rows whose raw log-probabilities are wanted, by row. Penalties, and bad words for
    the last token, use `token_counts`, if there are any, instead of the rows' token ids.
    """
    edited = [i for i, row in enumerate(rows) if row.sampling.changes_logits(row.position - row.prompt_length)]
    wanted = [
        i
        for i in sorted({*edited, *(masks or ())})
        if rows[i].sampling.logprobs >= 0 and not rows[i].sampling.processed_logprobs
    ]
    originals = {i: logits[i].clone() for i in wanted}
    if masks:
        apply_masks(logits, vocab, masks)

    if token_counts is None:
        for i, row in ((i, rows[i]) for i in edited):
            try:
                edit_logits(logits[i], vocab, row.sampling, row.token_ids, row.prompt_length, row.position)
            except Exception as error:
                _spoil(logits, i, error, failures)
        return originals

    for i in edited:
        try:
            add_bias(logits[i], vocab, rows[i].sampling)
        except Exception as error:
            _spoil(logits, i, error, failures)
    penalized = [i for i in edited if rows[i].sampling.needs_token_counts]
    if penalized:
        slots = [rows[i].slot for i in penalized]
        samplings = [rows[i].sampling for i in penalized]
        token_counts.penalize(logits, penalized, slots, samplings)
    for i in edited:
        try:
            _mask(logits[i], vocab, rows[i], token_counts)
        except Exception as error:
            _spoil(logits, i, error, failures)
    return originals


def _mask(logits: torch.Tensor, vocab: range, row: SampleRow, token_counts: TokenCounts) -> None:
    """Apply the masks of edit_logits to one row, whose last token the host may not know yet."""
    output_length = row.position - row.prompt_length
    mask_ends(logits, vocab, row.sampling, output_length)
    mask_others(logits, vocab, row.sampling)
    if row.sampling.bad_words and row.position > len(row.token_ids):
        known = row.token_ids[row.prompt_length :]
        token_counts.mask_words(logits, row.slot, *_awaited_words(row.sampling, known, output_length))
    else:
        mask_words(logits, vocab, row.sampling, row.token_ids[row.prompt_length : row.position])


def _spoil(logits: torch.Tensor, i: int, error: Exception, failures: dict[int, Exception] | None) -> None:
    """Let row `i` have no token: the ranks go on together, also where this one alone met the error."""
    _log.error("the logits of a request could not be edited", exc_info=error)
    logits[i] = torch.nan
    if failures is not None:
        failures.setdefault(i, error)


def edit_logits(
    logits: torch.Tensor,
    vocab: range,
    sampling: SlotSampling,
    token_ids: TokenIds,
    prompt_length: int,
    position: int,
) -> None:
    """Apply bias, penalties and the masks of min_tokens, allowed tokens and bad words to one row, in place.

    `logits` is float32 (len(vocab),), the scores of the token ids in `vocab`; ids outside it are other ranks' to edit.
    `token_ids` is the prompt of `prompt_length` tokens and then the output, up to `position`. The repetition penalty is
    CTRL's (arXiv:1909.05858, section 4.1); the presence and frequency penalties are those of the OpenAI API.
    """
    add_bias(logits, vocab, sampling)
    _penalize(logits, vocab, sampling, token_ids, prompt_length)
    mask_ends(logits, vocab, sampling, position - prompt_length)
    mask_others(logits, vocab, sampling)
    mask_words(logits, vocab, sampling, token_ids[prompt_length:position])


def add_bias(logits: torch.Tensor, vocab: range, sampling: SlotSampling) -> None:
    """Add a request's logit biases to its row, in place: the first step of edit_logits."""
    if sampling.bias_token_ids:
        ids = np.asarray(sampling.bias_token_ids, dtype=np.int64)
        inside = (ids >= vocab.start) & (ids < vocab.stop)
        bias = np.asarray(sampling.bias_values, dtype=np.float32)[inside]
        logits.index_add_(0, _to(logits, ids[inside] - vocab.start), _to(logits, bias))


def mask_ends(logits: torch.Tensor, vocab: range, sampling: SlotSampling, output_length: int) -> None:
    """Mask the end tokens of a row before min_tokens are out, in place: the third step of edit_logits."""
    if output_length < sampling.min_tokens:
        logits[_to(logits, _local(np.asarray(sampling.end_token_ids, dtype=np.int64), vocab))] = -torch.inf


def mask_others(logits: torch.Tensor, vocab: range, sampling: SlotSampling) -> None:
    """Mask all but a request's allowed tokens, if it names any, in place."""
    if sampling.allowed_token_ids:
        index = _to(logits, _local(np.asarray(sampling.allowed_token_ids, dtype=np.int64), vocab))
        allowed = logits[index]
        logits.fill_(-torch.inf)
        logits[index] = allowed


def mask_words(logits: torch.Tensor, vocab: range, sampling: SlotSampling, output: TokenIds) -> None:
    """Mask each token that would complete a bad word after these output tokens, in place."""
    if not sampling.bad_words:
        return
    banned = [word[-1] for word in sampling.bad_words if _ends_with(output, word[:-1])]
    logits[_to(logits, _local(np.asarray(banned, dtype=np.int64), vocab))] = -torch.inf


def _awaited_words(sampling: SlotSampling, known: TokenIds, output_length: int) -> tuple[list[int], list[int]]:
    """The last tokens of the bad words that the next token may complete, and the token that must precede each.

    The last of the `output_length` output tokens is not known yet. -1 stands for any preceding token.
    """
    before = known[: output_length - 1]
    banned = []
    preceding = []
    for word in sampling.bad_words:
        if len(word) == 1 or (output_length >= len(word) - 1 and _ends_with(before, word[:-2])):
            banned.append(word[-1])
            preceding.append(word[-2] if len(word) > 1 else -1)
    return banned, preceding


def _ends_with(token_ids: TokenIds, end: tuple[int, ...]) -> bool:
    return not end or tuple(token_ids[-len(end) :].tolist()) == end


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
