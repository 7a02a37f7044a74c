"""The largest of each row, of a vocabulary shard's logits: one pass over them."""

from __future__ import annotations

import torch

from . import cpu


def largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest value and its first column: float32 (R, V) -> float32 (R,), int64 (R,). NaN is the largest."""
    if not _usable(values):
        found = values.max(dim=1)
        return found.values, found.indices
    rows, size = values.shape
    most, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    cpu.native.argmax(values.data_ptr(), rows, size, most.data_ptr(), places.data_ptr())
    return most, places


def block_maxima(values: torch.Tensor, block: int) -> torch.Tensor:
    """The largest of each `block` columns, a multiple of 16: float32 (R, V) -> (R, ceil(V / block)).

    The last block may be shorter. A block with NaN has NaN.
    """
    rows, size = values.shape
    if _usable(values):
        maxima = torch.empty(rows, -(-size // block))
        cpu.native.block_maxima(values.data_ptr(), rows, size, block, maxima.data_ptr())
        return maxima
    whole = size // block * block
    maxima = values[:, :whole].view(rows, -1, block).amax(dim=2)
    if whole < size:
        maxima = torch.cat((maxima, values[:, whole:].amax(dim=1, keepdim=True)), dim=1)
    return maxima


def _usable(values: torch.Tensor) -> bool:
    return cpu.usable(values.device, values.dtype) and values.dtype == torch.float32 and values.is_contiguous()
