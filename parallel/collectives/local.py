"""One rank alone: every operation is already done, and nobody is there to be told."""

from __future__ import annotations

import torch

from ..control import ControlChannel
from .base import Collectives


class LocalCollectives(Collectives):
    """Collectives of a group of one."""

    rank = 0
    size = 1
    supports_graph = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def device(self) -> torch.device:
        """The device that the group was made for."""
        return self._device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` itself."""
        return x

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Return `x` alone."""
        return [x]

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Return `x` itself."""
        return x

    def barrier(self) -> None:
        """Return at once."""
        return

    def close(self) -> None:
        """Nothing is held, so nothing is released."""
        return


class LocalControl(ControlChannel):
    """The channel of a group of one, which has nobody to send to."""

    def send(self, data: bytes) -> None:
        """Do nothing."""
        return

    def receive(self) -> bytes:
        """Raises RuntimeError: rank 0 receives nothing."""
        raise RuntimeError("a group of one rank has no follower to receive control messages")
