"""Collectives through a store that all ranks reach: slow, for bringing a group together. Nothing is unpickled.

The store is a file that all ranks of one host can open, which needs no socket, and whoever may not open it cannot take
part; or the one that torchrun keeps for the ranks it started.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import torch

from .base import CollectiveError, Collectives


class FileStoreCollectives(Collectives):
    """Collectives of small CPU tensors over a store. It grows with every operation: for set-up alone."""

    def __init__(self, store: Path | Any, rank: int, size: int, timeout_s: float) -> None:
        """`store` is torch's, or the path of a file in a folder that only the ranks' user may enter.

        No rank waits for another yet.
        """
        self.rank = rank
        self.size = size
        self.store: Any = torch._C._distributed_c10d.FileStore(str(store), size) if isinstance(store, Path) else store
        self.store.set_timeout(datetime.timedelta(seconds=timeout_s))
        self._operations = 0
        self._name = f"rank {rank} of {size}"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in rank order and in the dtype of `x`. Raises CollectiveError."""
        parts = self._exchange(x, "all_reduce")
        return torch.stack(parts).sum(dim=0, dtype=x.dtype)

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x` on rank `dst`, None on the others, which read all parts too. Raises CollectiveError."""
        parts = self._exchange(x, "gather")
        return parts if self.rank == dst else None

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`. Every rank writes its own as well. Raises CollectiveError."""
        return self._exchange(x, "broadcast")[src]

    def barrier(self) -> None:
        """Return once every rank has written a byte. Raises CollectiveError."""
        self._exchange(torch.zeros(1, dtype=torch.uint8), "barrier")

    def close(self) -> None:
        """Nothing is left to release: the file belongs to whoever made its folder."""

    def _exchange(self, x: torch.Tensor, operation: str) -> list[torch.Tensor]:
        """Return every rank's `x`, in rank order. Raises CollectiveError if a rank does not come in time."""
        self._operations += 1
        mine = x.detach().contiguous()
        self.store.set(self._key(self.rank), mine.reshape(-1).view(torch.uint8).numpy().tobytes())

        parts = []
        for rank in range(self.size):
            try:
                data = self.store.get(self._key(rank))
            except RuntimeError as error:
                raise CollectiveError(f"{self._name} waited for rank {rank} in {operation}: {error}") from error
            if len(data) != mine.nbytes:
                raise CollectiveError(
                    f"{self._name} got {len(data)} bytes of rank {rank} in {operation}, not {mine.nbytes}"
                )
            parts.append(torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape) if data else mine.clone())
        return parts

    def _key(self, rank: int) -> str:
        return f"{self._operations}/{rank}"
