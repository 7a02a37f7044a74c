"""Top-k, top-p and min-p of sorted candidates, and the draw from what they keep: for rows of a batch at once.

The candidates are keys (logprobs.py): a token id and its logit in one integer, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.host_copies import to_device
from ...kernels.sampling import gumbel
from .logprobs import key_token_ids, key_values, token_keys
from .penalties import SampleRow

_FEW = 1024  # keys of a row that are all worked on, whatever it keeps of them: how many it keeps the device alone knows


@dataclass(frozen=True)
class RowSettings:
    """Settings of R rows, each a tensor (R, 1)."""

    temperature: torch.Tensor  # float32; 1 where greedy
    top_k: torch.Tensor  # int64, in [1, vocab_size]
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64
    seed: torch.Tensor  # int64
    position: torch.Tensor  # int64

    @classmethod
    def of(cls, rows: Sequence[SampleRow], vocab_size: int, device: torch.device) -> RowSettings:
        """Return the rows' settings on `device`, in one copy for which nobody waits."""
        samplings = [row.sampling for row in rows]

        # No draw changes any more before that. Further out, a logit divided by it leaves the range of float32, also one
        # that was multiplied by the largest repetition_penalty.
        temperatures = [min(max(s.temperature, 1e-15), 1e30) if s.temperature > 0.0 else 1.0 for s in samplings]
        limits = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in samplings]

        fractions = np.array([temperatures, [s.top_p for s in samplings], [s.min_p for s in samplings]])
        integers = np.array([limits, [s.seed for s in samplings], [row.position for row in rows]], dtype=np.int64)
        packed = to_device([np.concatenate((fractions.view(np.int64), integers))], device)[0].unsqueeze(2)
        return cls(
            temperature=packed[0].view(torch.float64).float(),
            top_k=packed[3],
            top_p=packed[1].view(torch.float64),
            min_p=packed[2].view(torch.float64),
            seed=packed[4],
            position=packed[5],
        )

    def take(self, rows: list[int]) -> RowSettings:
        """Return the settings of some rows, in this order."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.seed, self.position)
        if rows == list(range(len(self.position))):
            return self
        index = row_index(rows, self.position)
        return RowSettings(*(column[index] for column in columns))


def take_rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return ascending rows of x; x itself if these are all rows, which spares a GPU several small operations."""
    return x if len(rows) == x.shape[0] else x[row_index(rows, x)]


def put_rows(x: torch.Tensor, rows: list[int], values: torch.Tensor) -> None:
    """Set rows of x, in this order."""
    if rows == list(range(len(x))):
        x.copy_(values)
    else:
        x[row_index(rows, x)] = values


def row_index(rows: list[int], x: torch.Tensor) -> torch.Tensor:
    """Return `rows` as an index, int64 (len(rows),), on the device of x."""
    return to_device([np.array(rows, dtype=np.int64)], x.device)[0]


def _gumbel_scores(values: torch.Tensor, token_ids: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """Return float32 (R, M), whose largest is the draw. No two (position, token id) share a counter of the noise."""
    return (values / settings.temperature).add_(gumbel(settings.seed, (settings.position << 32) | token_ids))


def draw(keys: torch.Tensor, kept: torch.Tensor, settings: RowSettings) -> torch.Tensor:
    """Draw from the first `kept` of each row's sorted keys: int64 (R, M) and (R, 1) -> token ids (R, 1)."""
    if keys.shape[1] > _FEW:
        keys = keys[:, : int(kept.max())]
    token_ids = key_token_ids(keys)
    scores = _gumbel_scores(key_values(keys), token_ids, settings)
    beyond = torch.arange(keys.shape[1], device=keys.device) >= kept
    best = token_keys(scores.masked_fill_(beyond, -torch.inf), token_ids).amax(dim=1, keepdim=True)
    return key_token_ids(best)


def kept_counts(
    keys: torch.Tensor, exact: torch.Tensor, settings: RowSettings, totals: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of each row's sorted keys, int64 (R, M), top-k, top-p and min-p keep; and whether that is certain.

    Each of the three keeps a beginning of the sorted vocabulary, so together they keep the shortest. The first `exact`
    keys are certain. `totals` is float64 (R, 1), used where no top-k limits the nucleus. Returns int64 and bool (R, 1).
    """
    top_k = settings.top_k
    top_p = settings.top_p
    min_p = settings.min_p
    temperature = settings.temperature.double()
    values = key_values(keys).double()
    likeliest = values[:, :1]

    known = torch.minimum(top_k, exact)
    weights = ((values - likeliest) / temperature).exp_()
    weights.masked_fill_(torch.arange(keys.shape[1], device=keys.device) >= known, 0.0)
    reached = weights.cumsum(dim=1)
    limited = top_k < vocab_size
    total = torch.where(limited, reached[:, -1:], (totals - likeliest / temperature).exp())

    nucleus = 1 + (reached < top_p * total).sum(dim=1, keepdim=True)
    nucleus = torch.where(top_p < 1.0, nucleus, vocab_size)
    probable = (weights >= min_p).sum(dim=1, keepdim=True)
    probable = torch.where((min_p > 0.0) & (probable < exact), probable, vocab_size)

    # NaN keeps none by these comparisons: one token is enough until the caller finds those rows invalid.
    kept = torch.minimum(top_k, torch.minimum(nucleus, probable)).clamp_(min=1)
    total_known = (top_p >= 1.0) | ~limited | (top_k <= exact)
    return kept, (kept <= exact) & total_known
