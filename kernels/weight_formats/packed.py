"""A weight that a format has packed: what the C++ kernels multiply with, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch

from .. import cpu
from .base import WeightFormat


class Output(IntEnum):
    """What becomes of a product (kernels/cpu/kernels.h, Output)."""

    STORE = 0
    STORE_FLOAT = 1
    ADD_FLOAT = 2
    SILU_MUL = 3


def row_multiple(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """The multiple that a weight's rows must be padded to before it can be packed; 1 where it cannot be."""
    even = columns % 2 == 0 or dtype == torch.float32
    return cpu.PANEL if even and columns > 0 and cpu.usable(device, dtype) else 1


def _nothing() -> torch.Tensor:
    return torch.empty(0)


@dataclass(frozen=True)
class Stored:
    """A weight's numbers in panels of 16 rows, as kernels/cpu/kernels.h has them, and what belongs to them."""

    format: WeightFormat
    """The format it is kept in: one may choose another for a weight that gains by it."""
    numbers: torch.Tensor
    group: int
    """Columns of a row that share a scale."""
    scales: torch.Tensor = field(default_factory=_nothing)
    """bfloat16, one for each group of each row; a number stands for itself times its scale."""
    sums: torch.Tensor = field(default_factory=_nothing)
    """float32 (padded rows,): what each row's numbers came to."""
    apart: torch.Tensor = field(default_factory=_nothing)
    """bfloat16 numbers that are not among the others, because they do not fit into 12 bits."""
    together: int = 1
    """Numbers of a row that stand side by side."""


class PackedWeight:
    """A weight laid out for the C++ kernels. What is multiplied together stands together."""

    def __init__(self, stored: Stored, rows: int, columns: int, dtype: torch.dtype, *, in_place: bool) -> None:
        """`rows` of the stored ones count; `dtype` is of x and of the results."""
        self.stored = stored
        self.rows = rows
        self.columns = columns
        self.dtype = dtype
        self._in_place = in_place

        # The kernels keep addresses: `stored` holds the memory as long as this object lives.
        self.native = cpu.native.Weight(
            stored.numbers.data_ptr(),
            stored.format.code,
            stored.scales.data_ptr(),
            stored.sums.data_ptr(),
            stored.apart.data_ptr(),
            stored.group,
            stored.together,
            stored.format.deterministic,
            rows,
            columns,
            cpu.DTYPES[dtype],
        )

    @property
    def format(self) -> WeightFormat:
        """The format it is kept in."""
        return self.stored.format

    @property
    def nbytes(self) -> int:
        """Bytes that multiplying reads of the weight and its scales."""
        return self.stored.numbers.nbytes + self.stored.apart.nbytes + self.stored.scales.nbytes

    @property
    def in_place(self) -> bool:
        """Whether the weight stands where it stood before it was packed.

        It does not if the kernels' threads are bound to CPUs, for each then keeps what it multiplies with on its own
        NUMA node.
        """
        return self._in_place

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (T, columns) W^T + bias (rows,) -> (T, rows), summed up in float32 and rounded once."""
        out = torch.empty(x.shape[0], self.rows, dtype=self.dtype)
        return self.multiply(x, bias, out, Output.STORE)

    def linear_float(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, columns) W^T -> float32 (T, rows)."""
        out = torch.empty(x.shape[0], self.rows, dtype=torch.float32)
        return self.multiply(x, None, out, Output.STORE_FLOAT)

    def add_to(self, total: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add x W^T + bias to the float32 `total` (T, rows)."""
        self.multiply(x, bias, total, Output.ADD_FLOAT)

    def silu_mul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu(x Wg^T + bg) * (x Wu^T + bu) -> (T, rows / 2): Wg is the first half of the rows, padded by itself."""
        out = torch.empty(x.shape[0], self.rows // 2, dtype=self.dtype)
        return self.multiply(x, bias, out, Output.SILU_MUL)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the weight by their int64 indices (T,) -> (T, columns); zeros for an index that no row has.

        Raises ValueError if rows of its format cannot be looked up.
        """
        out = torch.empty(rows.shape[0], self.columns, dtype=self.dtype)
        self.format.look_up(self, rows, out)
        return out

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, output: Output) -> torch.Tensor:
        """Multiply x (T, columns), of contiguous rows, and store, add or gate the product by `output`. Returns `out`.

        Raises ValueError for an x of another shape, dtype or layout.
        """
        if x.shape[1] != self.columns or x.dtype != self.dtype or x.stride(1) != 1:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} of strides {x.stride()}, where a weight of {self.columns} columns "
                f"of {self.dtype} needs rows that are contiguous"
            )

        cpu.native.linear(
            self.native,
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            cpu.address(bias),
            out.data_ptr(),
            out.stride(0),
            output,
        )
        return out
