"""Memory for tensors that are read whole again and again: on a CPU in huge pages, where the system has them."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

HUGE_PAGE = 2 * 2**20
LEAST_BYTES = 2 * HUGE_PAGE
"""Smaller tensors gain nothing."""


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor, in huge pages if it is a large one on a CPU.

    The processor finds those with a fraction of the table walks (madvise(2), MADV_HUGEPAGE). They are zero, and cost
    nothing until they are written to.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    # Private: memory that is shared, mmap's default, has huge pages only where a system's settings go out of their way.
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel built without them refuses: ordinary pages hold the same.
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)

    # madvise() concerns whole huge pages, but mmap() aligns to small ones: the tensor starts at the first whole one.
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + size].view(dtype).view(shape)
