"""Collectives that copy: tensors of a device by way of the host's memory, or those of the host by way of a device."""

from __future__ import annotations

import torch

from .base import Collectives


class HostStagedCollectives(Collectives):
    """Copies tensors of `device` to the host, has CPU collectives do the work, and copies the result back.

    It serves ranks that share a GPU, which NCCL refuses. Each operation waits for the device: none fits a CUDA graph.
    """

    def __init__(self, inner: Collectives, device: torch.device) -> None:
        self._inner = inner
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.rank = inner.rank
        self.size = inner.size
        self.has_fixed_order = inner.has_fixed_order

    @property
    def device(self) -> torch.device:
        """The device whose tensors are carried, not the CPU that carries them."""
        return self._device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in `x` itself."""
        return x.copy_(self._inner.all_reduce(self._to_host(x)))

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x`, on rank `dst`'s device; None on the others."""
        parts = self._inner.gather(self._to_host(x), dst)
        return None if parts is None else [part.to(self._device) for part in parts]

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, copied into each rank's."""
        return x.copy_(self._inner.broadcast(self._to_host(x), src))

    def barrier(self) -> None:
        """Return once every rank is here; the device is not waited for."""
        self._inner.barrier()

    def close(self) -> None:
        """Close the CPU collectives."""
        self._inner.close()

    def _to_host(self, x: torch.Tensor) -> torch.Tensor:
        """x in pinned memory, good until the next call. Copies between it and the device wait until they are done."""
        if self._buffer.numel() < x.nbytes:
            with torch.inference_mode(False):  # it is written to outside of that mode, too
                self._buffer = torch.empty(x.nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._buffer[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


class DeviceStagedCollectives(Collectives):
    """Carries CPU tensors over collectives of a device, where a process group has no others: for set-up alone."""

    def __init__(self, inner: Collectives) -> None:
        self._inner = inner
        self.rank = inner.rank
        self.size = inner.size

    @property
    def device(self) -> torch.device:
        """The CPU, whose tensors are carried."""
        return torch.device("cpu")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in `x` itself."""
        return x.copy_(self._inner.all_reduce(self._to_device(x)))

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        """Every rank's `x` on rank `dst`, None on the others."""
        parts = self._inner.gather(self._to_device(x), dst)
        return None if parts is None else [part.cpu() for part in parts]

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank `src`'s `x`, copied into each rank's."""
        return x.copy_(self._inner.broadcast(self._to_device(x), src))

    def barrier(self) -> None:
        """Return once every rank is here."""
        self._inner.barrier()

    def close(self) -> None:
        """Close the device's collectives."""
        self._inner.close()

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._inner.device)
