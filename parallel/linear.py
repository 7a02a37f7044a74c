"""Linear layers whose weight is cut over the ranks.

Column-parallel: W = [W1; ...; Wp] along the output features; each rank computes its own outputs, nothing is exchanged.
Row-parallel: W = [W1, ..., Wp] along the input features; partial results are summed over the ranks.
(Shoeybi et al., Megatron-LM, arXiv:1909.08053.) Weights are (out_features, in_features), as in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear

from ..kernels.activation import silu_mul
from ..kernels.linear import PackedWeight, can_pack
from .checkpoint import WeightSlice
from .collectives.base import Collectives


@dataclass(frozen=True)
class Part:
    """One checkpoint matrix inside a fused column-parallel layer: `rows` of its `total_rows` belong to this rank."""

    name: str
    rows: range
    total_rows: int


class Linear(nn.Module):
    """This rank's part of a weight, (rows, columns). pack() may replace it by a faster layout, once it is loaded."""

    def __init__(self, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = _parameter(rows, columns, dtype=dtype, device=device)
        self._packed: PackedWeight | None = None

    def pack(self) -> None:
        """Lay the weight out for this machine's kernels, if they have a layout of their own. The plain one goes."""
        if can_pack(self.weight):
            self.lay_out()
            self.weight = _parameter(0, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)

    def lay_out(self) -> None:
        """Make the packed form of the weight."""
        self._packed = PackedWeight(self.weight)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(T, columns) -> (T, rows)."""
        return linear(x, self.weight, bias) if self._packed is None else self._packed.linear(x, bias)


class ColumnParallelLinear(Linear):
    """y = x W^T + b over this rank's output features; several checkpoint matrices may be fused, one below the other.

    The fused query/key/value projection is this layer with three parts.
    """

    def __init__(
        self, in_features: int, parts: Sequence[Part], *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        rows = sum(len(part.rows) for part in parts)
        super().__init__(rows, in_features, dtype=dtype, device=device)
        self.parts = tuple(parts)
        self.bias = _parameter(rows, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) -> (T, rows of all parts)."""
        return self.multiply(x, self.bias)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What to read from the checkpoint, and where it goes."""
        first = 0
        for part in self.parts:
            last = first + len(part.rows)
            rows = slice(part.rows.start, part.rows.stop)
            in_features = self.weight.shape[1]
            yield WeightSlice(
                f"{prefix}{part.name}.weight",
                (part.total_rows, in_features),
                (rows, slice(0, in_features)),
                self.weight[first:last],
            )
            if self.bias is not None:
                yield WeightSlice(f"{prefix}{part.name}.bias", (part.total_rows,), (rows,), self.bias[first:last])
            first = last


class GatedLinear(ColumnParallelLinear):
    """silu(x Wg^T + bg) * (x Wu^T + bu), as in SwiGLU (arXiv:2002.05202): two parts of equal rows, gate and up."""

    _halves: tuple[PackedWeight, PackedWeight] | None = None

    def lay_out(self) -> None:
        """Each half by itself, so that activation and product are part of the multiplications."""
        gate, up = self.weight.chunk(2)
        self._halves = PackedWeight(gate), PackedWeight(up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, in_features) -> (T, rows of one part)."""
        if self._halves is None:
            return silu_mul(self.multiply(x, self.bias))
        gate, up = self._halves
        gate_bias, up_bias = (None, None) if self.bias is None else self.bias.chunk(2)
        return up.times(x, up_bias, gate.silu(x, gate_bias))


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
        self.name, self.columns, self.total_columns = name, columns, total_columns
        self.collectives = collectives
        self.bias = _parameter(out_features, dtype=dtype, device=device) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, columns) -> (T, out_features), the same on every rank."""
        y = self.collectives.all_reduce(self.multiply(x, None))
        return y if self.bias is None else y.add_(self.bias)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What to read from the checkpoint, and where it goes."""
        out_features = self.weight.shape[0]
        yield WeightSlice(
            f"{prefix}{self.name}.weight",
            (out_features, self.total_columns),
            (slice(0, out_features), slice(self.columns.start, self.columns.stop)),
            self.weight,
        )
        if self.bias is not None:
            yield WeightSlice(f"{prefix}{self.name}.bias", (out_features,), (slice(0, out_features),), self.bias)


class ReplicatedNorm(nn.Module):
    """An RMSNorm weight, held whole by every rank, in float32."""

    def __init__(self, name: str, size: int, eps: float, device: torch.device) -> None:
        super().__init__()
        self.name, self.eps = name, eps
        self.weight = _parameter(size, dtype=torch.float32, device=device)

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What to read from the checkpoint, and where it goes."""
        size = self.weight.shape[0]
        yield WeightSlice(f"{prefix}{self.name}.weight", (size,), (slice(0, size),), self.weight)


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)
