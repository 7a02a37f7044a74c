"""The common part of the formats that round: they need bfloat16, a CPU and the C++ kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .base import WeightFormat

if TYPE_CHECKING:
    import torch

_SCALE_BYTES = 2  # bfloat16


class QuantizedFormat(WeightFormat):
    """Integers of a few bits, each of which stands for itself times a scale that `group` columns of a row share."""

    rounds = True
    bits: ClassVar[int]
    group: ClassVar[int | None]
    """None: one scale for a whole row."""

    def __init__(self, *, deterministic: bool = False) -> None:
        """`deterministic`: a row is multiplied in the same way beside any number of others, by its head's format too.

        Without it, int8 weights of many rows are multiplied in another way where the kernels have tiles.
        """
        self.deterministic = deterministic

    def made_deterministic(self) -> WeightFormat:
        """The same format, and the same head's, with its one way to multiply."""
        return type(self)(deterministic=True)

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError without the C++ kernels, on another device than a CPU and for another dtype."""
        import torch

        from .. import cpu

        if not cpu.usable(device, dtype) or dtype != torch.bfloat16:
            raise ValueError(
                f"quantization={self.name} needs phalanx's C++ kernels, a CPU and dtype=bfloat16; here are "
                f"{device.type}, {dtype} and kernels that are {'built' if cpu.native else 'not built'}: set "
                f"quantization=none"
            )

    def check_weight(self, weight: torch.Tensor) -> None:
        """Raises ValueError for a dtype or a number of columns that cannot be packed."""
        import torch

        if weight.dtype != torch.bfloat16 or weight.shape[1] % self.column_cut:
            raise ValueError(
                f"quantization={self.name} needs bfloat16 weights whose columns are a multiple of {self.column_cut}, "
                f"not {weight.shape[1]} columns of {weight.dtype}: set dtype=bfloat16, or quantization=none"
            )

    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """The numbers and their scales."""
        scales = 1 if self.group is None else -(-columns // self.group)
        return rows * columns * self.bits // 8 + rows * scales * _SCALE_BYTES
