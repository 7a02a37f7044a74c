"""The operations of a group of ranks. Layers call these without asking how many ranks there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ...kernels.norm import add_rms_norm


class CollectiveError(RuntimeError):
    """An operation between ranks failed: usually because another rank has gone. Names this rank and the operation."""


class CollectivesUnavailable(RuntimeError):
    """These ranks cannot talk in the way asked for; the message says why. Raised on all of them or on none."""


class Collectives(ABC):
    """Operations of one group of ranks: all call them in the same order, with tensors of the same shape and dtype."""

    rank: int
    size: int
    supports_graph = False
    """Whether all_reduce and what is made of it, on tensors of a GPU, may be captured in a CUDA graph."""
    has_fixed_order = True
    """Whether all_reduce adds the ranks up in the same order wherever an element stands in a tensor of any size."""

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, the same bits on each. Returns a tensor, maybe `x` itself; `x` may be overwritten."""

    def add_reduced(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add all_reduce(x) to the float32 `total`, of the same shape. `x` may be overwritten."""
        total.add_(self._sum(x))

    def add_reduced_norm(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        total: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Add all_reduce(x) and `bias` to `total`, in place, and return its RMSNorm: (T, H) in `dtype`.

        `x` is (T, H) and may be overwritten; `bias` (H,), or None; `total` (T, H) float32; `weight` (H,) float32.
        """
        return add_rms_norm(total, self._sum(x), bias, weight, eps, dtype)

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """all_reduce, but the result may be good until the next operation only."""
        return self.all_reduce(x)

    @property
    def reducer(self) -> tuple[int, int] | None:
        """Addresses for what is not Python: of a function that does add_reduced() of contiguous tensors, and of its
        first argument (kernels/cpu/add_reduced.h), good as long as this object. None if there is no such function.
        """
        return None

    @property
    def segment(self) -> int | None:
        """The file descriptor of memory in which each rank counts its operations; None if there is none."""
        return None

    @abstractmethod
    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x`, in rank order, on rank `dst`; None on the others."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, on every rank. The others' `x` gives shape and dtype and may be overwritten."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank is here."""

    @property
    def waited_s(self) -> list[float]:
        """Seconds that each rank has waited for others in these operations; empty where nobody measures it.

        Any thread may read it. The rank that the others wait for has waited least.
        """
        return []

    def warmup(self, sizes: Sequence[int]) -> None:
        """Run all_reduce once for messages of these many elements, so that the first step pays for no set-up."""
        for size in sizes:
            self.all_reduce(torch.zeros(size, device=self.device))

    def tune(self, columns: int, dtype: torch.dtype, max_rows: int) -> None:
        """Find out, by measuring, how to sum messages of 1 to max_rows rows of `columns` numbers of `dtype` fastest.

        All ranks call it, once, before the first step; where there is but one way it does nothing.
        """
        return

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device that the tensors passed in must be on."""

    @abstractmethod
    def close(self) -> None:
        """Release what this object made. A group passed in by the caller stays as it was."""
