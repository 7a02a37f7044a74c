"""Collectives over a torch.distributed process group: gloo for CPU ranks, NCCL for CUDA ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .base import CollectiveError, Collectives


class ProcessGroupCollectives(Collectives):
    """Wraps a ProcessGroup, or a bare backend such as ProcessGroupGloo; tensors must be on `device`."""

    def __init__(self, group: Any, device: torch.device) -> None:
        # The group's own methods, not torch.distributed's functions: they also serve a group that no registry knows.
        self._group = group
        self._device = device
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.supports_graph = device.type == "cuda"
        self.has_fixed_order = self.size <= 2  # each slice of a ring begins at another rank

    @property
    def device(self) -> torch.device:
        """The device that the group's backend carries tensors of."""
        return self._device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in `x` itself where it is contiguous. Raises CollectiveError."""
        x = x.contiguous()
        options = _on_this_stream(dist.AllreduceOptions())
        self._wait("all_reduce", lambda: self._group.allreduce([x], options))
        return x

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x` on rank `dst`, None on the others. Raises CollectiveError."""
        x = x.contiguous()
        options = _on_this_stream(dist.GatherOptions())
        options.rootRank = dst
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == dst else None
        self._wait("gather", lambda: self._group.gather([parts] if parts else [], [x], options))
        return parts

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, in each rank's own where it is contiguous. Raises CollectiveError."""
        x = x.contiguous()
        options = _on_this_stream(dist.BroadcastOptions())
        options.rootRank = src
        options.rootTensor = 0
        self._wait("broadcast", lambda: self._group.broadcast([x], options))
        return x

    def barrier(self) -> None:
        """Return once every rank is here. Raises CollectiveError."""
        options = _on_this_stream(dist.BarrierOptions())
        options.device = self._device
        self._wait("barrier", lambda: self._group.barrier(options))

    def close(self) -> None:
        """Let go of the process group, which whoever made it destroys."""
        self._group = None

    def _wait(self, operation: str, start: Callable[[], Any]) -> None:
        try:
            work = start()
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {self.rank} of {self.size}: {operation} failed, as when another rank has gone or is stuck "
                f"(timeout_s bounds the wait): {error}"
            ) from error


def _on_this_stream(options: Any) -> Any:
    """NCCL then needs no stream of its own, nor events between the two."""
    options.asyncOp = False
    return options
