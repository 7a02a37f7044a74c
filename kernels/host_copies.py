"""Small arrays on their way to the device of a step, for which the host does not wait.

What torch copies from ordinary memory, the list in `x[[2, 5]]` too, waits for all that the device still has to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

TORCH_DTYPES = {"int64": torch.int64, "int32": torch.int32, "bool": torch.bool, "float32": torch.float32}


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays, of TORCH_DTYPES, as tensors on the device; on a CPU they may share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return copy_together(arrays, device)


def copy_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copy the arrays, of TORCH_DTYPES, to the device by one copy, for which the host does not wait. Same shapes."""
    ends = np.cumsum([_aligned(array.nbytes) for array in arrays])
    # The memory comes from torch's allocator of pinned memory, which reuses it only after the copy is done.
    packed = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = packed.numpy()

    pieces = []
    for array, end in zip(arrays, ends.tolist(), strict=True):
        first = end - _aligned(array.nbytes)
        host[first : first + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        pieces.append((first, array))

    there = packed.to(device, non_blocking=True)
    return [
        there[first : first + array.nbytes].view(TORCH_DTYPES[array.dtype.name]).view(array.shape)
        for first, array in pieces
    ]


def _aligned(size: int) -> int:
    return -(-size // 16) * 16
