"""The embedding table cut along the vocabulary: E = [E1; ...; Ep]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import embedding

from ..kernels.weight_formats import WeightFormat
from .collectives.base import Collectives
from .linear import Linear
from .loading.checkpoint import WeightSlice


class VocabParallelEmbedding(Linear):
    """Looks up this rank's rows, zero for the others', and sums over the ranks. Shards of the vocabulary may be uneven.

    A tied table is the head's weight as well: multiply_float() gives logits.
    """

    def __init__(
        self,
        name: str,
        vocab: range,
        vocab_size: int,
        hidden_size: int,
        *,
        collectives: Collectives,
        tied: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`vocab` are this rank's rows of the table (vocab_size, hidden_size)."""
        super().__init__(len(vocab), hidden_size, dtype=dtype, device=device)
        self.name = name
        self.vocab = vocab
        self.vocab_size = vocab_size
        self.collectives = collectives
        self._tied = tied

    def pack(self, weight_format: WeightFormat) -> None:
        """Pack as the head, if it is one: forward() then picks rows out of that. A plain table is faster to look up."""
        if self._tied:
            super().pack(weight_format.for_head())

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> (T, hidden_size), the same on every rank."""
        local = token_ids - self.vocab.start
        if self.packed is not None:
            return self.collectives.all_reduce(self.packed.look_up(local))
        if self.collectives.size == 1:
            return embedding(token_ids, self.weight)

        # Rows of other ranks are looked up as row 0, and then cleared.
        elsewhere = (local < 0) | (local >= self.rows)
        found = embedding(local.masked_fill_(elsewhere, 0), self.weight)
        return self.collectives.all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """The slice to read from the checkpoint, and where it goes."""
        hidden = self.weight.shape[1]
        yield WeightSlice(
            f"{prefix}{self.name}.weight",
            (self.vocab_size, hidden),
            (slice(self.vocab.start, self.vocab.stop), slice(0, hidden)),
            self.weight[: self.rows],
            self,
        )
