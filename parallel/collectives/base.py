"""What ranks can do together. Layers call these without asking how many ranks there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class CollectiveError(RuntimeError):
    """An operation between ranks failed: usually because another rank has gone. Names this rank and the operation."""


class Collectives(ABC):
    """Operations of one group of ranks: all call them in the same order, with tensors of the same shape and dtype."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, the same bits on each. Returns a tensor, maybe `x` itself; `x` may be overwritten."""

    def add_reduced(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add all_reduce(x) to the float32 `total`, of the same shape. `x` may be overwritten."""
        total.add_(self.all_reduce(x))

    @abstractmethod
    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x`, in rank order, on rank `dst`; None on the others."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, on every rank. The others' `x` gives shape and dtype and may be overwritten."""

    @abstractmethod
    def barrier(self) -> None:
        """Return once every rank is here."""

    def warmup(self, sizes: Sequence[int]) -> None:
        """Run all_reduce once for messages of these many elements, so that the first step pays for no set-up."""
        for size in sizes:
            self.all_reduce(torch.zeros(size, device=self.device))

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tensors passed in must be."""

    @abstractmethod
    def close(self) -> None:
        """Release what this object made. A group passed in by the caller stays as it was."""
