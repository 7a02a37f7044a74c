"""The embedding table cut along the vocabulary: E = [E1; ...; Ep]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import embedding

from .checkpoint import WeightSlice
from .collectives.base import Collectives


class VocabParallelEmbedding(nn.Module):
    """Looks up this rank's rows, zero for the others', and sums over the ranks. No padding: shards may be uneven."""

    def __init__(
        self,
        name: str,
        rows: range,
        vocab_size: int,
        hidden_size: int,
        *,
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name, self.rows, self.vocab_size = name, rows, vocab_size
        self.collectives = collectives
        self.weight = nn.Parameter(torch.empty(len(rows), hidden_size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> (T, hidden_size), the same on every rank."""
        if self.collectives.size == 1:
            return embedding(token_ids, self.weight)
        local = token_ids - self.rows.start
        elsewhere = (local < 0) | (local >= len(self.rows))
        found = embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.collectives.all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What to read from the checkpoint, and where it goes."""
        hidden = self.weight.shape[1]
        yield WeightSlice(
            f"{prefix}{self.name}.weight",
            (self.vocab_size, hidden),
            (slice(self.rows.start, self.rows.stop), slice(0, hidden)),
            self.weight,
        )
