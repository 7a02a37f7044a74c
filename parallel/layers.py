"""Layers whose weight is cut over the ranks, and the residual stream that they read and write.

Column-parallel: W = [W1; ...; Wp] along the output features; each rank computes its own outputs, nothing is exchanged.
Row-parallel: W = [W1, ..., Wp] along the input features; partial results are summed over the ranks.
Vocabulary-parallel: E = [E1; ...; Ep] along the vocabulary; each rank looks up its own rows, and the ranks sum.
(Shoeybi et al., Megatron-LM, arXiv:1909.08053.) Weights are (out_features, in_features), as in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from ..kernels.activation import silu_mul
from ..kernels.huge_pages import empty
from ..kernels.norm import rms_norm
from ..kernels.weight_formats import WeightFormat
from ..kernels.weight_formats.base import Allocate
from ..kernels.weight_formats.packed import PackedWeight, Stored, row_multiple
from .collectives.base import Collectives
from .loading.checkpoint import WeightSlice


class Residual:
    """`total` is float32 (T, H): bfloat16 would lose most here. What a row-parallel layer made last may be missing.

    That part is summed over the ranks and added when the next layer norms the stream: one pass over memory does both.
    """

    def __init__(self, embedded: torch.Tensor) -> None:
        """`embedded` (T, H) are the tokens' embeddings, of any dtype; not modified unless float32."""
        self.total = embedded.float()
        self._part: tuple[torch.Tensor, torch.Tensor | None, Collectives] | None = None

    def defer_all_reduce(self, partial: torch.Tensor, bias: torch.Tensor | None, collectives: Collectives) -> None:
        """Add the sum of all ranks' `partial` (T, H), and `bias` (H,), by the next norm(). `partial` is given away."""
        self.materialize()
        self._part = partial, bias, collectives

    def materialize(self) -> torch.Tensor:
        """Add what is missing now, and return `total`."""
        part, self._part = self._part, None
        if part is not None:
            partial, bias, collectives = part
            collectives.add_reduced(partial, self.total)
            if bias is not None:
                self.total.add_(bias)
        return self.total

    def norm(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """RMSNorm of the stream, (T, H) in `dtype`; nothing is missing from then on. `weight` is float32 (H,)."""
        part, self._part = self._part, None
        if part is None or not len(self.total):
            return rms_norm(self.total, weight, eps, dtype)
        partial, bias, collectives = part
        return collectives.add_reduced_norm(partial, bias, self.total, weight, eps, dtype)

    def select(self, rows: torch.Tensor) -> Residual:
        """The stream of some tokens, int64 (R,)."""
        chosen = Residual(self.total[rows])
        if self._part is not None:
            partial, bias, collectives = self._part
            chosen._part = partial[rows], bias, collectives
        return chosen


@dataclass(frozen=True)
class ShardedWeight:
    """One checkpoint matrix inside a fused column-parallel layer: `rows` of its `total_rows` belong to this rank."""

    name: str
    rows: range
    total_rows: int


class Linear(nn.Module):
    """This rank's part of a weight, (rows, columns). pack() may lay it out anew, once it is loaded.

    Its rows stand in `pieces` of equal size, each padded to the multiple that packing needs.
    """

    def __init__(self, rows: int, columns: int, *, pieces: int = 1, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.rows = rows
        multiple = row_multiple(columns, dtype, device)
        self._padded_piece = -(-(rows // pieces) // multiple) * multiple
        self.can_pack = multiple > 1 and rows > 0
        """Whether this machine's kernels have a layout of their own for it."""
        self.weight = _parameter(pieces * self._padded_piece, columns, dtype=dtype, device=device)
        self.weight.view(pieces, self._padded_piece, columns)[:, rows // pieces :].zero_()
        self.packed: PackedWeight | None = None

    def pack(self, weight_format: WeightFormat, allocate: Allocate | None = None) -> None:
        """Lay the loaded weight out for this machine's kernels, if they have a layout of their own.

        It stays in its own memory, or takes less; with `allocate` it goes to memory that this makes. Raises ValueError
        if the format cannot keep it.
        """
        if not self.can_pack:
            return
        self.packed = weight_format.pack(self.weight.detach(), self.rows, allocate)
        if not self.packed.in_place:
            self._give_up_weight()

    def adopt(self, stored: Stored) -> None:
        """Take a weight that was packed before, of this layer's rows and columns, instead of one to load and pack."""
        self.packed = PackedWeight(stored, self.rows, self.weight.shape[1], self.weight.dtype, in_place=False)
        self._give_up_weight()

    def _give_up_weight(self) -> None:
        self.weight = _parameter(0, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(T, columns) -> (T, rows)."""
        return linear(x, self.weight[: self.rows], bias) if self.packed is None else self.packed.linear(x, bias)

    def multiply_float(self, x: torch.Tensor) -> torch.Tensor:
        """(T, columns) -> float32 (T, rows), summed up in float32 and not rounded."""
        if self.packed is not None:
            return self.packed.linear_float(x)
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, self.weight[: self.rows].t(), out_dtype=torch.float32)
        return self.multiply(x, None).float()


class ColumnParallelLinear(Linear):
    """y = x W^T + b over this rank's output features; several checkpoint matrices may be fused, one below the other.

    The fused query/key/value projection is this layer with three parts.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[ShardedWeight],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        pieces: int = 1,
    ) -> None:
        rows = sum(len(part.rows) for part in parts)
        super().__init__(rows, in_features, pieces=pieces, dtype=dtype, device=device)
        self.parts = tuple(parts)
        self.bias = _parameter(rows, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) -> (T, rows of all parts)."""
        return self.multiply(x, self.bias)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """The slices to read from the checkpoint, and where they go."""
        in_features = self.weight.shape[1]
        first = 0
        for part in self.parts:
            count = len(part.rows)
            rows = slice(part.rows.start, part.rows.stop)
            offset = self.row_offset(first)
            yield WeightSlice(
                f"{prefix}{part.name}.weight",
                (part.total_rows, in_features),
                (rows, slice(0, in_features)),
                self.weight[offset : offset + count],
                self,
            )
            if self.bias is not None:
                bias = self.bias[first : first + count]
                yield WeightSlice(f"{prefix}{part.name}.bias", (part.total_rows,), (rows,), bias, self)
            first += count

    def row_offset(self, row: int) -> int:
        """The row of the padded weight that holds output feature `row`."""
        return row


class GatedLinear(ColumnParallelLinear):
    """silu(x Wg^T + bg) * (x Wu^T + bu), as in SwiGLU (arXiv:2002.05202): two parts of equal rows, gate and up."""

    def __init__(
        self, in_features: int, parts: Sequence[ShardedWeight], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=dtype, device=device, pieces=2)

    def row_offset(self, row: int) -> int:
        """The row of the padded weight that holds output feature `row`: each half is padded by itself."""
        half = self.rows // 2
        return row if row < half else row - half + self._padded_piece

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) -> (T, rows of one part)."""
        if self.packed is not None:
            return self.packed.silu_mul(x, self.bias)
        return silu_mul(self.multiply(x, self.bias))


class RowParallelLinear(Linear):
    """y = sum over ranks of x_r W_r^T, + b once, for this rank's `columns` of the `total_columns` input features."""

    def __init__(
        self,
        name: str,
        columns: range,
        total_columns: int,
        out_features: int,
        *,
        bias: bool,
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(out_features, len(columns), dtype=dtype, device=device)
        self.name = name
        self.columns = columns
        self.total_columns = total_columns
        self.collectives = collectives
        self.bias = _parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor, residual: Residual) -> None:
        """Add the result for x (T, columns) to `residual`, the same on every rank: at once, or with its next norm."""
        if self.packed is not None and self.collectives.size == 1:
            self.packed.add_to(residual.materialize(), x, self.bias)
        else:
            residual.defer_all_reduce(self.multiply(x, None), self.bias, self.collectives)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """The slices to read from the checkpoint, and where they go."""
        yield WeightSlice(
            f"{prefix}{self.name}.weight",
            (self.rows, self.total_columns),
            (slice(0, self.rows), slice(self.columns.start, self.columns.stop)),
            self.weight[: self.rows],
            self,
        )
        if self.bias is not None:
            yield WeightSlice(f"{prefix}{self.name}.bias", (self.rows,), (slice(0, self.rows),), self.bias, self)


class LogitsLinear(ColumnParallelLinear):
    """The head: one part, the vocabulary, without a bias. multiply_float() gives logits."""

    def __init__(self, in_features: int, vocab: ShardedWeight, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(in_features, [vocab], bias=False, dtype=dtype, device=device)

    def pack(self, weight_format: WeightFormat, allocate: Allocate | None = None) -> None:
        """Pack as Linear.pack, in what the format keeps a head in: the head decides between tokens."""
        super().pack(weight_format.for_head(), allocate)


class ReplicatedNorm(nn.Module):
    """An RMSNorm weight, held whole by every rank, in float32."""

    def __init__(self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.dtype = dtype
        self.weight = _parameter(size, dtype=torch.float32, device=device)

    def forward(self, residual: Residual) -> torch.Tensor:
        """(T, size) of the residual stream, in the model's dtype; nothing is missing in the stream from then on."""
        return residual.norm(self.weight, self.eps, self.dtype)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """The slices to read from the checkpoint, and where they go."""
        size = self.weight.shape[0]
        yield WeightSlice(f"{prefix}{self.name}.weight", (size,), (slice(0, size),), self.weight)


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

    def pack(self, weight_format: WeightFormat, allocate: Allocate | None = None) -> None:
        """Pack as the head, if it is one: forward() then picks rows out of that. A plain table is faster to look up."""
        if self._tied:
            super().pack(weight_format.for_head(), allocate)

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


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(empty(shape, dtype, device), requires_grad=False)
