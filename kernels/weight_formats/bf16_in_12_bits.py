"""bfloat16 numbers, bit for bit, in 12 bits each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import PANEL_ROWS, WeightFormat

if TYPE_CHECKING:
    import torch

    from .base import Allocate
    from .packed import PackedWeight, Stored

_GROUP_COLUMNS = 128  # of a panel, that share a table of 16 upper bytes
_TABLE_BYTES = 16
_LINE_BYTES = 64  # the tables of a panel are padded to whole cache lines


@dataclass(frozen=True)
class GroupsApart:
    """The groups of a weight that have more than 16 upper bytes, and are kept as they were."""

    firsts: torch.Tensor
    """int64 (panels,): the index of each panel's first group among them."""
    nbytes: int


class Bf16In12Bits(WeightFormat):
    """An index of 4 bits into a table of upper bytes, and the lower byte as it is (kernels/cpu/gemm/compressed.h).

    No user asks for it: a plain bfloat16 weight becomes this where it gains by it.
    """

    name = "bf16_12"
    code = 4
    rounds = False
    column_cut = 8

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError without the C++ kernels, on another device than a CPU and for another dtype."""
        import torch

        from .. import cpu

        if not cpu.usable(device, dtype) or dtype != torch.bfloat16:
            raise ValueError(
                f"12 bits a number need the C++ kernels, a CPU and bfloat16, not {device.type} and {dtype}: set "
                f"dtype=bfloat16 and device=cpu"
            )

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes without the groups that stand apart: how many do depends on the numbers."""
        tables = -(-columns // _GROUP_COLUMNS) * _TABLE_BYTES
        panel = PANEL_ROWS * columns * 12 // 8 + -(-tables // _LINE_BYTES) * _LINE_BYTES
        return -(-rows // PANEL_ROWS) * panel

    def store(self, weight: torch.Tensor, allocate: Allocate | None = None) -> Stored:
        """Compress into new memory, however little that saves; `weight` holds plain panels from then on."""
        from .. import cpu

        self.check(weight.device, weight.dtype)
        if weight.shape[1] % self.column_cut:
            raise ValueError(f"12 bits a number need a multiple of {self.column_cut} columns, not {weight.shape[1]}")
        cpu.native.pack_weight(weight.data_ptr(), *weight.shape, cpu.DTYPES[weight.dtype])
        return self.compress(weight, self.find_apart(weight), allocate)

    def find_apart(self, panels: torch.Tensor) -> GroupsApart:
        """Count the groups of plain bfloat16 panels (padded rows, columns) that have to stand apart."""
        import torch

        from .. import cpu

        firsts = torch.empty(panels.shape[0] // PANEL_ROWS, dtype=torch.int64)
        count = cpu.native.compress_weight(panels.data_ptr(), *panels.shape, 0, 0, firsts.data_ptr())
        return GroupsApart(firsts, count * cpu.native.GROUP_BYTES)

    def compress(self, panels: torch.Tensor, groups: GroupsApart, allocate: Allocate | None = None) -> Stored:
        """Compress plain panels, which are only read, into new memory, or into that which `allocate` makes."""
        import torch

        from .. import cpu
        from ..huge_pages import empty
        from .packed import Stored

        rows, columns = panels.shape
        make = allocate or empty
        numbers = make((self.nbytes(rows, columns, panels.itemsize),), torch.uint8, panels.device)
        apart = make((groups.nbytes,), torch.uint8, panels.device)
        to = numbers.data_ptr(), apart.data_ptr(), groups.firsts.data_ptr()
        cpu.native.compress_weight(panels.data_ptr(), rows, columns, *to)
        return Stored(self, numbers, group=columns, apart=apart)

    def look_up(self, packed: PackedWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write the rows as they were before, bit for bit."""
        from .. import cpu

        stored = packed.stored.numbers.data_ptr(), packed.stored.apart.data_ptr()
        wanted = rows.data_ptr(), rows.shape[0], out.data_ptr()
        cpu.native.look_up_compressed(*stored, packed.rows, packed.columns, *wanted)


BF16_IN_12_BITS = Bf16In12Bits()
