"""The likeliest tokens of a vocabulary shard, and exact log-probabilities over all shards.

A token and its value travel between ranks as one int64 key. Larger keys come first in one total order, the same on
any number of ranks: by value, equal values by the lower token id; NaN counts as +inf, so that no reduction loses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ...kernels.sampling import argmax, block_maxima
from ...parallel.collectives.base import Collectives
from ..protocol.logprobs import TokenLogprobs

_BLOCK = 64
_LOW_BITS = 0xFFFFFFFF
_PADDING_KEY = (-0x7F800001 << 32) | (_LOW_BITS - 0x7FFFFFFF)  # of the value -inf and a token id above any other


def token_keys(values: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the int64 keys, of the broadcast shape, of float32 values and int64 token ids in [0, 2^31)."""
    # Adding zero makes -0.0 and 0.0 the same bits: they are equal, so their token ids must decide.
    bits = torch.nan_to_num(values + 0.0, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)
    return (_mirror(bits).to(torch.int64) << 32) | (_LOW_BITS - token_ids)


def key_values(keys: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of keys."""
    return _mirror((keys >> 32).to(torch.int32)).view(torch.float32)


def key_token_ids(keys: torch.Tensor) -> torch.Tensor:
    """Return the int64 token ids of keys."""
    return _LOW_BITS - (keys & _LOW_BITS)


def top_keys(values: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """Return the `count` first keys of each row of float32 (R, V), sorted; int64 (R, count).

    Column j is token id `first_id + j`. With fewer than `count` columns the rest is padded with keys of value -inf
    that come after every token's.
    """
    size = values.shape[1]
    if count == 1 and size:
        most, indices = argmax(values)
        return token_keys(most, indices + first_id).unsqueeze(1)

    if size > 2 * count * _BLOCK:
        positions = _leading_blocks(values, count)
        keys = token_keys(values.gather(1, positions.clamp(max=size - 1)), positions + first_id)
        keys.masked_fill_(positions >= size, _PADDING_KEY)
    else:
        keys = token_keys(values, torch.arange(first_id, first_id + size, device=values.device))

    if keys.shape[1] < count:
        keys = torch.nn.functional.pad(keys, (0, count - keys.shape[1]), value=_PADDING_KEY)
    return keys.topk(count, dim=1).values


def log_sum_exp(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits / temperature))) of each row; float32 (R, V) and (R, 1) -> float64 (R,).

    The sum is taken relative to the row's maximum and only the result is in double precision: a float32 result near
    30 would by itself be 1e-6 off.
    """
    results = []
    for rows in row_chunks(logits):
        maxima = logits[rows].amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        sums = (logits[rows] - maxima).div_(temperature[rows]).exp_().sum(dim=1, keepdim=True)
        results.append(maxima.double() / temperature[rows].double() + sums.double().log())
    return torch.cat(results).squeeze(1)


def row_chunks(x: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of (R, V) for work with temporaries: within the cache on a CPU, bounded in memory elsewhere."""
    elements = 1 << 18 if x.device.type == "cpu" else 1 << 24
    step = max(1, elements // max(1, x.shape[1]))
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def gather_logprobs(
    collectives: Collectives,
    vocab: range,
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    counts: Sequence[int],
    *,
    temperature: torch.Tensor,
) -> list[TokenLogprobs] | None:
    """Log-probabilities under softmax(logits / temperature) of one token a row and of the `counts[i]` likeliest ones.

    `logits` is float32 (R, len(vocab)), this rank's shard; `token_ids` int64 (R,), the same on every rank;
    `temperature` float32 (R, 1). One all_reduce and one gather. Returns one entry a row on rank 0, None on the others.
    """
    local = token_ids - vocab.start
    inside = (local >= 0) & (local < len(vocab))
    values = logits.gather(1, local.clamp(0, len(vocab) - 1).unsqueeze(1)).squeeze(1)
    values = collectives.all_reduce(torch.where(inside, values, 0.0))

    # What a rank knows alone: how many of its tokens are likelier, its log-sum-exp, its first keys.
    likelier = torch.cat([(logits[rows] > values[rows].unsqueeze(1)).sum(dim=1) for rows in row_chunks(logits)])
    totals = log_sum_exp(logits, temperature).view(torch.int64)
    keys = top_keys(logits, vocab.start, max(counts))
    parts = collectives.gather(torch.cat((likelier.unsqueeze(1), totals.unsqueeze(1), keys), dim=1))
    if parts is None:
        return None

    # Rank 0 merges the shards.
    merged = torch.stack(parts)
    ranks = (merged[:, :, 0].sum(dim=0) + 1).tolist()
    total = merged[:, :, 1].contiguous().view(torch.float64).logsumexp(dim=0)
    keys = merged[:, :, 2:].transpose(0, 1).flatten(1).topk(max(counts), dim=1).values

    scale = temperature.double()
    logprobs = (values.double() / scale.squeeze(1) - total).tolist()
    top_logprobs = key_values(keys).double() / scale - total.unsqueeze(1)

    tops = zip(key_token_ids(keys).tolist(), top_logprobs.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, rank, *_possible(top_ids[:count], top_values[:count]))
        for token_id, logprob, rank, (top_ids, top_values), count in zip(
            token_ids.tolist(), logprobs, ranks, tops, counts, strict=True
        )
    ]


def kept_logprobs(keys: torch.Tensor, temperature: float, token_id: int, count: int) -> TokenLogprobs:
    """Log-probabilities of a token and the `count` likeliest, by softmax(value / temperature) over `keys` alone.

    `keys` is int64 (K,), sorted, and holds `token_id`.
    """
    values = key_values(keys).double()
    logprobs = (values / temperature).log_softmax(dim=0)
    token_ids = key_token_ids(keys)
    chosen = int((token_ids == token_id).nonzero())
    rank = 1 + int((values > values[chosen]).sum())
    tops = _possible(token_ids[:count].tolist(), logprobs[:count].tolist())
    return TokenLogprobs(token_id, float(logprobs[chosen]), rank, *tops)


def _possible(token_ids: list[int], logprobs: list[float]) -> tuple[list[int], list[float]]:
    """Drop padding and tokens of no probability; they are the last."""
    length = sum(logprob > -torch.inf for logprob in logprobs)
    return token_ids[:length], logprobs[:length]


def _leading_blocks(values: torch.Tensor, count: int) -> torch.Tensor:
    """Columns, int64 (R, count * _BLOCK), among which are each row's `count` first keys; some may be past the last.

    Each of the `count` blocks with the first maxima holds at least one key before any key of the other blocks, so
    those hold none of the first `count`. One vectorised pass, where a selection over the row takes several times that.
    """
    maxima = block_maxima(values, _BLOCK)
    keys = token_keys(maxima, torch.arange(maxima.shape[1], device=values.device))
    blocks = key_token_ids(keys.topk(count, dim=1).values)
    return (blocks.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=values.device)).flatten(1)


def _mirror(bits: torch.Tensor) -> torch.Tensor:
    """Map the bits of float32 to int32 in the same order, and back: it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
