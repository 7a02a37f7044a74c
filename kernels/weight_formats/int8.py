"""Weights of 8 bits: with x of 16 bits and a scale for each 32 columns, or with x of 8 bits and one for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import WeightFormat
from .quantized import QuantizedFormat

if TYPE_CHECKING:
    import torch

    from .base import Allocate
    from .packed import PackedWeight, Stored


class EightBitPanels(QuantizedFormat):
    """Some numbers of a row side by side in a panel, as the instructions multiply them."""

    bits = 8
    column_cut = 4

    def for_head(self) -> WeightFormat:
        """8 bits, and x of 16."""
        return INT8.made_deterministic() if self.deterministic else INT8

    def store(self, weight: torch.Tensor, allocate: Allocate | None = None) -> Stored:
        """Store the numbers in new memory, with scales and the sum of what each row became."""
        import torch

        from .. import cpu
        from ..huge_pages import empty
        from .packed import Stored

        self.check_weight(weight)
        rows, columns = weight.shape
        group = self.group or columns
        together = self.together()
        make = allocate or empty
        scales = make((rows, -(-columns // group)), torch.bfloat16, weight.device)
        numbers = make((rows, columns), torch.int8, weight.device)
        sums = make((rows,), torch.float32, weight.device)

        to = numbers.data_ptr(), scales.data_ptr(), sums.data_ptr()
        cpu.native.quantize_int8(weight.data_ptr(), rows, columns, together, group, *to)
        return Stored(self, numbers, group=group, scales=scales, sums=sums, together=together)

    def look_up(self, packed: PackedWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows as numbers times scales, rounded to bfloat16."""
        from .. import cpu

        stored = packed.stored
        shape = packed.rows, packed.columns, stored.together, stored.group
        wanted = rows.data_ptr(), rows.shape[0], out.data_ptr()
        cpu.native.look_up_int8(stored.numbers.data_ptr(), stored.scales.data_ptr(), *shape, *wanted)


class Int8(EightBitPanels):
    """x keeps 16 bits: one scale for a whole row would lose more of the likeliest tokens.

    Where tiles multiply (AMX), many rows are multiplied with the weights rounded to bfloat16 instead, and with x as it
    is: about three times as fast. A row's bits then depend on whether there are many; not so if it is `deterministic`.
    """

    name = "int8"
    code = 1
    group = 32

    def together(self) -> int:
        """Four where tiles multiply them, two where vectors do."""
        from .. import cpu

        count: int = cpu.native.int8_together()
        return count


class W8A8(EightBitPanels):
    """x is rounded to 8 bits too, with a scale for each of its rows."""

    name = "w8a8"
    code = 3
    group = None
    rounds_x = True

    def together(self) -> int:
        """Four: what one instruction multiplies and adds up."""
        return 4


INT8 = Int8()
