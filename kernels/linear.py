"""Matrix multiplication with a weight that stays: on a CPU it is laid out once for the kernels that read it."""

from __future__ import annotations

import torch

from . import cpu

_STORE, _STORE_FLOAT, _ADD_FLOAT, _SILU_MUL = range(4)


def row_multiple(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a weight's rows must be padded to before it can be packed; 1 where it cannot be."""
    even = columns % 2 == 0 or dtype == torch.float32
    return cpu.PANEL if even and columns > 0 and cpu.usable(device, dtype) else 1


class PackedWeight:
    """A weight in panels of 16 rows: what is read together while multiplying stands together (kernels/cpu/kernels.h)."""

    def __init__(self, weight: torch.Tensor, rows: int) -> None:
        """Packs `weight` (padded rows, columns) in its own memory; `rows` of them count. See row_multiple."""
        padded, self._columns = weight.shape
        if padded % cpu.PANEL or not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} must be contiguous, of a multiple of 16 rows")
        self._weight, self._rows, self._padded = weight, rows, padded
        self._dtype, self._code = weight.dtype, cpu.DTYPES[weight.dtype]
        cpu.native.pack_weight(weight.data_ptr(), padded, self._columns, self._code)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (T, columns) W^T + bias (rows,) -> (T, rows), summed up in float32 and rounded once."""
        out = torch.empty(x.shape[0], self._rows, dtype=self._dtype)
        return self._multiply(x, bias, out, _STORE)

    def linear_float(self, x: torch.Tensor) -> torch.Tensor:
        """x (T, columns) W^T -> float32 (T, rows)."""
        out = torch.empty(x.shape[0], self._rows, dtype=torch.float32)
        return self._multiply(x, None, out, _STORE_FLOAT)

    def add_to(self, total: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add x W^T + bias to the float32 `total` (T, rows)."""
        self._multiply(x, bias, total, _ADD_FLOAT)

    def silu_mul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """silu(x Wg^T + bg) * (x Wu^T + bu) -> (T, rows / 2): Wg is the first half of the rows, padded by itself."""
        out = torch.empty(x.shape[0], self._rows // 2, dtype=self._dtype)
        return self._multiply(x, bias, out, _SILU_MUL)

    def look_up(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the weight by their int64 numbers (T,) -> (T, columns); zeros for a number that is none of a row."""
        out = torch.empty(rows.shape[0], self._columns, dtype=self._dtype)
        cpu.native.look_up(
            self._weight.data_ptr(),
            self._rows,
            self._columns,
            rows.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
            self._code,
        )
        return out

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, output: int) -> torch.Tensor:
        if x.shape[1] != self._columns or x.dtype != self._dtype or x.stride(1) != 1:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} of strides {x.stride()}, where a weight of {self._columns} columns "
                f"of {self._dtype} needs rows that are contiguous"
            )
        cpu.native.linear(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            self._weight.data_ptr(),
            self._rows,
            self._columns,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            output,
            self._code,
        )
        return out
