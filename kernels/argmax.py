"""Argmax of each row of a vocabulary shard's logits, with and without Gumbel noise: one pass over them."""

from __future__ import annotations

import torch

from . import cpu, cuda
from .noise import gumbel


def argmax(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's largest value and its first column: float32 (R, V) -> float32 (R,), int64 (R,).

    NaN is larger than all others; without columns it is -inf in column 0.
    """
    if not values.shape[1]:
        return values.new_full((len(values),), -torch.inf), values.new_zeros(len(values), dtype=torch.int64)
    if _usable(values):
        rows, size = values.shape
        most = torch.empty(rows)
        indices = torch.empty(rows, dtype=torch.int64)
        cpu.native.argmax(values.data_ptr(), rows, size, most.data_ptr(), indices.data_ptr())
        return most, indices
    if cuda.usable(values.device):
        from .cuda import sampling

        return sampling.argmax(values)

    found = values.max(dim=1)
    return found.values, found.indices


def gumbel_argmax(
    values: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, counter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the argmax of each row of values / temperature + Gumbel noise, as argmax() of float32 (R, V).

    `temperature` is float32 (R, 1), `seed` int64 (R, 1); the noise of column j is that of counter + j, int64 (R, 1).
    """
    rows, size = values.shape
    if _usable(values):
        most = torch.empty(rows)
        indices = torch.empty(rows, dtype=torch.int64)
        settings = [column.contiguous() for column in (temperature, seed, counter)]
        addresses = (column.data_ptr() for column in (*settings, most, indices))
        cpu.native.noisy_argmax(values.data_ptr(), rows, size, *addresses)
        return most, indices
    if size and cuda.usable(values.device):
        from .cuda import sampling

        return sampling.gumbel_argmax(values, temperature, seed, counter)

    # A few rows at a time: within the cache on a CPU, bounded in memory elsewhere.
    step = max(1, (1 << 18 if values.device.type == "cpu" else 1 << 24) // max(1, size))
    columns = torch.arange(size, device=values.device)
    found = []
    for first in range(0, rows, step):
        some = slice(first, first + step)
        noise = gumbel(seed[some], counter[some] + columns)
        found.append(argmax((values[some] / temperature[some]).add_(noise)))
    return torch.cat([most for most, _ in found]), torch.cat([indices for _, indices in found])


def block_maxima(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return the largest of each `block` columns, a multiple of 16: float32 (R, V) -> (R, ceil(V / block)).

    The last block may be shorter. A block with NaN has NaN.
    """
    rows, size = values.shape
    if _usable(values):
        maxima = torch.empty(rows, -(-size // block))
        cpu.native.block_maxima(values.data_ptr(), rows, size, block, maxima.data_ptr())
        return maxima
    if cuda.usable(values.device):
        from .cuda import sampling

        return sampling.block_maxima(values, block)

    whole = size // block * block
    maxima = values[:, :whole].view(rows, -1, block).amax(dim=2)
    if whole < size:
        maxima = torch.cat((maxima, values[:, whole:].amax(dim=1, keepdim=True)), dim=1)
    return maxima


def _usable(values: torch.Tensor) -> bool:
    return values.dtype == torch.float32 and values.is_contiguous() and cpu.usable(values.device, values.dtype)
