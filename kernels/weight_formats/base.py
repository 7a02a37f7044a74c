"""The interface of a weight format: what it needs, where a matrix may be cut, its bytes, packing and looking up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from .packed import PackedWeight, Stored

PANEL_ROWS = 16
"""Rows of a weight that stand together once it is packed."""

Allocate = Callable[[tuple[int, ...], "torch.dtype", "torch.device"], "torch.Tensor"]
"""Makes the memory of what is packed: a tensor of this shape, dtype and device."""


class WeightFormat(ABC):
    """How the numbers of a weight (rows, columns) are kept, and multiplied from there: y = x W^T.

    A format never changes: what it packs is a PackedWeight. Its modules import torch only where they pack, so that
    configurations are checked and memory is planned without torch.
    """

    name: ClassVar[str]
    """The NAME in a user's quantization=NAME."""
    code: ClassVar[int]
    """The kernels' name of it (kernels/cpu/kernels.h, WeightKind)."""
    rounds: ClassVar[bool]
    """Whether packing rounds the numbers."""
    rounds_x: ClassVar[bool] = False
    """Whether x is rounded to 8 bits, so that products are of 8-bit integers."""
    column_cut: ClassVar[int] = 1
    """Columns stay together by so many, a power of two: a matrix may be cut before each multiple of it, and what is
    packed has a multiple of it. Rows may be cut anywhere, for each part is padded by itself (see row_multiple)."""

    deterministic: bool = False
    """Whether a row is multiplied in the same way beside any number of others, though another is faster for many."""

    def for_head(self) -> WeightFormat:
        """The format of the head and of a table tied to it: at least 8 bits of weight and 16 of x decide a token."""
        return self

    def made_deterministic(self) -> WeightFormat:
        """Return the format that multiplies a row in the same way beside any number of others: this one, if it does."""
        return self

    def preferred(self, dtype: torch.dtype) -> WeightFormat:
        """The format that a weight of this dtype gets on this machine if its numbers allow it."""
        return self

    def together(self) -> int:
        """Numbers of a row that stand side by side in a panel; the instruction set in use may decide."""
        return 1

    @abstractmethod
    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError, with the setting to change, if no weight of a model can be kept so on this device."""

    @abstractmethod
    def nbytes(self, rows: int, columns: int, itemsize: int) -> int:
        """Bytes that multiplying reads of a matrix; known before there is one.

        `rows` are those that are stored: the kernels' panels pad them to a multiple of 16. `itemsize` is of one number
        in the model's dtype.
        """

    @abstractmethod
    def store(self, weight: torch.Tensor, allocate: Allocate | None = None) -> Stored:
        """Lay out `weight`, contiguous (a multiple of 16 rows, columns), in its own memory or in new one.

        With `allocate` the whole result is in memory that it makes. Raises ValueError if this weight cannot be kept so.
        """

    @abstractmethod
    def look_up(self, packed: PackedWeight, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write rows of a weight, by int64 indices (T,), to `out` (T, columns); zeros where there is no such row.

        Raises ValueError if rows of this format cannot be looked up.
        """

    def pack(self, weight: torch.Tensor, rows: int, allocate: Allocate | None = None) -> PackedWeight:
        """Lay out `weight` (padded rows, columns), of which the first `rows` count, for the C++ kernels.

        A format that does not round packs it in its own memory, or in less; one that does only reads it. With
        `allocate` the whole result is in memory that it makes.
        Raises ValueError.
        """
        from .packed import PackedWeight

        if weight.shape[0] % PANEL_ROWS or not weight.is_contiguous():
            raise ValueError(f"a weight of shape {tuple(weight.shape)} must be contiguous, of a multiple of 16 rows")
        stored = self.store(weight, allocate)
        return PackedWeight(stored, rows, weight.shape[1], weight.dtype, in_place=stored.numbers is weight)
