"""Weights in the model's dtype, number by number as in the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import WeightFormat
from .bf16_in_12_bits import BF16_IN_12_BITS

if TYPE_CHECKING:
    import torch

    from .base import Allocate
    from .packed import PackedWeight, Stored

LARGEST_COMPRESSED = 0.85
"""The most that a weight may take in 12 bits a number to be kept so, as a share of what it takes plain."""


class PlainPanels(WeightFormat):
    """Numbers as they are: on a CPU in panels, on a GPU and without the C++ kernels as torch has them.

    A bfloat16 weight is kept in 12 bits a number, bit for bit, where the kernels are fast at that and it gains enough.
    """

    name = "none"
    code = 0
    rounds = False

    def preferred(self, dtype: torch.dtype) -> WeightFormat:
        """12 bits for bfloat16, where the kernels expand them as fast as they multiply."""
        import torch

        from .. import cpu

        return BF16_IN_12_BITS if dtype == torch.bfloat16 and cpu.compresses() else self

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Every device and dtype will do: what the kernels cannot multiply, torch multiplies."""

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The plain numbers: whether a weight is kept in 12 bits depends on its numbers, so none is taken to be."""
        return rows * columns * itemsize

    def store(self, weight: torch.Tensor, allocate: Allocate | None = None) -> Stored:
        """Store panels in the weight's own memory; if threads are bound to CPUs, in memory that they touch first.

        With `allocate` they stand in the memory that it makes.
        """
        from .. import cpu
        from ..huge_pages import empty
        from .packed import Stored

        rows, columns = weight.shape
        cpu.native.pack_weight(weight.data_ptr(), rows, columns, cpu.DTYPES[weight.dtype])

        if self.preferred(weight.dtype) is BF16_IN_12_BITS and columns % BF16_IN_12_BITS.column_cut == 0:
            apart = BF16_IN_12_BITS.find_apart(weight)
            if BF16_IN_12_BITS.nbytes(rows, columns, weight.itemsize) + apart.nbytes <= (
                LARGEST_COMPRESSED * weight.nbytes
            ):
                return BF16_IN_12_BITS.compress(weight, apart, allocate)

        # Whoever writes first to memory has it on its own NUMA node.
        if allocate is not None or cpu.native.bound():
            panels = (allocate or empty)((rows, columns), weight.dtype, weight.device)
            cpu.native.copy_panels(weight.data_ptr(), rows, columns, cpu.DTYPES[weight.dtype], panels.data_ptr())
            weight = panels
        return Stored(self, weight, group=columns)

    def look_up(self, packed: PackedWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows as they are."""
        from .. import cpu

        shape = packed.rows, packed.columns
        wanted = rows.data_ptr(), rows.shape[0], out.data_ptr()
        cpu.native.look_up(packed.stored.numbers.data_ptr(), *shape, *wanted, cpu.DTYPES[packed.dtype])


PLAIN_PANELS = PlainPanels()
