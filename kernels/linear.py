"""Matrix multiplication with a weight that stays: on a CPU it is laid out once for the kernels that read it."""

from __future__ import annotations

from typing import ClassVar

import torch

from . import cpu
from .huge_pages import empty

_STORE, _STORE_FLOAT, _ADD_FLOAT, _SILU_MUL = range(4)


def row_multiple(columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a weight's rows must be padded to before it can be packed; 1 where it cannot be."""
    even = columns % 2 == 0 or dtype == torch.float32
    return cpu.PANEL if even and columns > 0 and cpu.usable(device, dtype) else 1


LARGEST_COMPRESSED = 0.85
"""Of what it takes uncompressed, so much may a weight take that is kept compressed."""


def head_quantization(quantization: str) -> str:
    """What becomes of the head, and of a table tied to it: never less than 8 bits of weight and 16 of x."""
    return "none" if quantization == "none" else "int8"


class PackedWeight:
    """A weight laid out in panels of 16 rows, as kernels/cpu/kernels.h has it: what is multiplied together stands so.

    `quantization` is one of KINDS. With none, bfloat16 numbers are kept bit for bit, but in 12 bits each where the
    kernels are fast at that and the numbers allow it (kernels/cpu/gemm/compressed.h). int8 keeps 8 bits of each number
    and a float32 scale for each 32 columns of a row, int4 keeps 4 bits and a scale for each 64; w8a8 keeps 8 bits and a
    scale for each row, and rounds x to 8 bits too, with a scale for each of its rows. All are symmetric: a number
    stands for itself times its scale.
    """

    KINDS = ("none", "int8", "int4", "w8a8")
    GROUPS: ClassVar[dict[str, int]] = {"int8": 32, "int4": 64}
    COMPRESSED_BYTES = 1.5 + 16 / 2048
    """Of a number that is kept compressed: a table of 16 bytes serves 2,048 of them."""
    _COMPRESSED = len(KINDS)

    def __init__(self, weight: torch.Tensor, rows: int, quantization: str = "none") -> None:
        """Of `weight` (padded rows, columns), the first `rows` count; see row_multiple.

        Without quantization the weight is packed in its own memory; with it, it is only read. `in_place` says whether
        that memory is needed from then on: not if the kernels' threads are bound to CPUs, for each then keeps what it
        multiplies with on its own NUMA node. Raises ValueError.
        """
        padded, columns = weight.shape
        self._columns = columns
        if padded % cpu.PANEL or not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} must be contiguous, of a multiple of 16 rows")
        self._rows, self._kind = rows, self.KINDS.index(quantization)
        self._dtype, self._code = weight.dtype, cpu.DTYPES[weight.dtype]
        self._weight = weight
        self._scales = self._sums = self._apart = torch.empty(0)
        self._together = 4 if quantization == "w8a8" else cpu.native.int8_together()
        self._group = self.GROUPS.get(quantization, columns)
        if quantization == "none":
            cpu.native.pack_weight(weight.data_ptr(), padded, columns, self._code)
            self._compress(weight)
            self._move(weight)
        else:
            self._quantize(weight, quantization)
        self._in_place = self._weight is weight
        self.native = cpu.native.Weight(
            self._weight.data_ptr(),
            self._kind,
            self._scales.data_ptr(),
            self._sums.data_ptr(),
            self._apart.data_ptr(),
            self._group,
            self._together,
            rows,
            columns,
            self._code,
        )

    def _compress(self, packed: torch.Tensor) -> None:
        """Keep a packed bfloat16 weight in 12 bits a number, unless that is slow or saves too little."""
        padded, columns = packed.shape
        if packed.dtype != torch.bfloat16 or columns % 8 or not cpu.compresses():
            return
        firsts = torch.empty(padded // cpu.PANEL, dtype=torch.int64)
        source = packed.data_ptr(), padded, columns
        apart = cpu.native.compress_weight(*source, 0, 0, firsts.data_ptr()) * cpu.native.GROUP_BYTES
        size = cpu.native.compressed_bytes(padded, columns)
        if size + apart > LARGEST_COMPRESSED * packed.nbytes:
            return
        self._kind = self._COMPRESSED
        self._weight = empty((size,), torch.uint8, packed.device)
        self._apart = empty((apart,), torch.uint8, packed.device)
        stored = self._weight.data_ptr(), self._apart.data_ptr(), firsts.data_ptr()
        cpu.native.compress_weight(*source, *stored)

    def _move(self, packed: torch.Tensor) -> None:
        """Let the threads write first to the memory of a weight that is not compressed, if they are bound to CPUs."""
        if self._kind == 0 and cpu.native.bound():
            self._weight = empty(tuple(packed.shape), packed.dtype, packed.device)
            cpu.native.copy_panels(packed.data_ptr(), *packed.shape, self._code, self._weight.data_ptr())

    def _quantize(self, weight: torch.Tensor, quantization: str) -> None:
        padded, columns = weight.shape
        multiple = 8 if quantization == "int4" else 4
        if weight.dtype != torch.bfloat16 or columns % multiple:
            raise ValueError(
                f"quantization={quantization} needs bfloat16 weights whose columns are a multiple of {multiple}, "
                f"not {columns} columns of {weight.dtype}: set dtype=bfloat16, or quantization=none"
            )
        source = weight.data_ptr(), padded, columns
        self._scales = torch.empty(padded, -(-columns // self._group))
        if quantization == "int4":
            self._weight = empty((padded, columns // 2), torch.uint8, weight.device)
            cpu.native.quantize_int4(*source, self._group, self._weight.data_ptr(), self._scales.data_ptr())
            return
        self._weight = empty((padded, columns), torch.int8, weight.device)
        self._sums = torch.empty(padded)
        stored = self._weight.data_ptr(), self._scales.data_ptr(), self._sums.data_ptr()
        cpu.native.quantize_int8(*source, self._together, self._group, *stored)

    @property
    def nbytes(self) -> int:
        """Bytes that multiplying reads of the weight and its scales."""
        return self._weight.nbytes + self._apart.nbytes + self._scales.nbytes

    @property
    def in_place(self) -> bool:
        """Whether the weight stands where it stood before it was packed."""
        return self._in_place

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
        """Rows of the weight by their int64 numbers (T,) -> (T, columns); zeros for a number that is none of a row.

        Raises ValueError for a weight of int4.
        """
        out = torch.empty(rows.shape[0], self._columns, dtype=self._dtype)
        places = rows.data_ptr(), rows.shape[0], out.data_ptr()
        if self._kind == 0:
            cpu.native.look_up(self._weight.data_ptr(), self._rows, self._columns, *places, self._code)
        elif self._kind == self._COMPRESSED:
            stored = self._weight.data_ptr(), self._apart.data_ptr()
            cpu.native.look_up_compressed(*stored, self._rows, self._columns, *places)
        elif self._sums.numel():
            stored = self._weight.data_ptr(), self._scales.data_ptr()
            shape = self._rows, self._columns, self._together, self._group
            cpu.native.look_up_int8(*stored, *shape, *places)
        else:
            raise ValueError("rows of a weight of 4 bits are not looked up")
        return out

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, output: int) -> torch.Tensor:
        if x.shape[1] != self._columns or x.dtype != self._dtype or x.stride(1) != 1:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype} of strides {x.stride()}, where a weight of {self._columns} columns "
                f"of {self._dtype} needs rows that are contiguous"
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
