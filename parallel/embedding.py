"""The embedding table cut along the vocabulary: E = [E1; ...; Ep]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from ..kernels.linear import PackedWeight, head_quantization, row_multiple
from ..kernels.memory import empty
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
        tied: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`tied`: logits() will be asked for."""
        super().__init__()
        self.name, self.rows, self.vocab_size = name, rows, vocab_size
        self.collectives = collectives
        multiple = row_multiple(hidden_size, dtype, device) if tied else 1
        self._can_pack = multiple > 1 and len(rows) > 0
        padded = -(-len(rows) // multiple) * multiple
        self.weight = nn.Parameter(empty((padded, hidden_size), dtype, device), requires_grad=False)
        self.weight[len(rows) :].zero_()
        self._packed: PackedWeight | None = None

    def pack(self, quantization: str) -> None:
        """Lay a tied table out for logits(), as the head is; forward() then picks rows out of that."""
        if not self._can_pack:
            return
        quantization = head_quantization(quantization)
        self._packed = PackedWeight(self.weight.detach(), len(self.rows), quantization)
        if quantization != "none":
            self.weight = nn.Parameter(self.weight.new_empty(0, self.weight.shape[1]), requires_grad=False)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The table as a tied head: (T, hidden_size) -> float32 (T, rows of this rank)."""
        if self._packed is not None:
            return self._packed.linear_float(x)
        return linear(x, self.weight[: len(self.rows)]).float()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> (T, hidden_size), the same on every rank."""
        local = token_ids - self.rows.start
        if self._packed is not None:
            return self.collectives.all_reduce(self._packed.look_up(local))
        if self.collectives.size == 1:
            return embedding(token_ids, self.weight)
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
            self.weight[: len(self.rows)],
            self,
        )
