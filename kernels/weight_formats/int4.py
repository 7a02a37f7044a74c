"""Weights of 4 bits, with a scale for each 64 columns of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import WeightFormat
from .int8 import INT8
from .quantized import QuantizedFormat

if TYPE_CHECKING:
    import torch

    from .base import Allocate
    from .packed import PackedWeight, Stored


class Int4(QuantizedFormat):
    """x stays bfloat16: a number of 4 bits is an exact one of those."""

    name = "int4"
    code = 2
    bits = 4
    group = 64
    column_cut = 8

    def for_head(self) -> WeightFormat:
        """8 bits."""
        return INT8.made_deterministic() if self.deterministic else INT8

    def store(self, weight: torch.Tensor, allocate: Allocate | None = None) -> Stored:
        """Store the numbers in new memory, with a scale for each group."""
        import torch

        from .. import cpu
        from ..huge_pages import empty
        from .packed import Stored

        self.check_weight(weight)
        rows, columns = weight.shape
        make = allocate or empty
        scales = make((rows, -(-columns // self.group)), torch.bfloat16, weight.device)
        numbers = make((rows, columns // 2), torch.uint8, weight.device)
        to = numbers.data_ptr(), scales.data_ptr()
        cpu.native.quantize_int4(weight.data_ptr(), rows, columns, self.group, *to)
        return Stored(self, numbers, group=self.group, scales=scales)

    def look_up(self, packed: PackedWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Raises ValueError: the head, and so a table that is looked up, keeps 8 bits."""
        raise ValueError("rows of a weight of 4 bits are not looked up")


INT4 = Int4()
