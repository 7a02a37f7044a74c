"""What a rank's sampler computes over its vocabulary shard: masks, and the argmax of rows, with and without noise.

The noise is counter-based: a value depends on its key and counter alone, so any rank can make any part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from . import cpu, cuda
from .host_copies import to_device

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on an int64 tensor, in place (Steele, Lea, Flood, OOPSLA 2014)."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MULTIPLY_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLY_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def uniform(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in (0, 1), of the broadcast shape of two int64 tensors; about 2^-41 is the smallest value."""
    bits = mix(mix(key.clone()) + (counter + 1) * _GOLDEN)
    return ((_shift_right(bits, 24).to(torch.float32) + 0.5) * 2.0**-40).clamp_(max=1 - 2.0**-24)


def gumbel(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel float32 noise: argmax(logits + gumbel) is a draw from softmax(logits).

    E = -log(1 - u) is exponential, precise where it is small, and -log E is Gumbel: the right tail, which decides
    the argmax over a large vocabulary, keeps its resolution.
    """
    return uniform(key, counter).neg_().log1p_().neg_().log_().neg_()


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def derive_seed(seed: int, index: int) -> int:
    """A seed for the index-th of something seeded by `seed`: a signed 64-bit integer, equal on every machine."""
    return int(mix(torch.tensor(seed, dtype=torch.int64) + (index + 1) * _GOLDEN % 2**63))


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
        cpu.native.gumbel_argmax(values.data_ptr(), rows, size, *addresses)
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


def mask_rows(values: torch.Tensor, rows: Sequence[int], words: np.ndarray, offset: int) -> None:
    """Set columns of some rows of float32 (R, V) to -inf, in place: those whose bit is not set.

    `words` is int32 (len(rows), W); the bit of column j is number `offset` + j, the lowest of each word first.
    Nothing waits for the device.
    """
    index = np.array(rows, dtype=np.int64)
    if _usable(values):
        words = np.ascontiguousarray(words)
        cpu.native.mask(
            values.data_ptr(), index.ctypes.data, len(index), values.shape[1], words.ctypes.data, words.shape[1], offset
        )
        return

    there, packed = to_device([index], values.device)[0], to_device([words], values.device)[0]
    shifts = torch.arange(32, dtype=torch.int32, device=values.device)
    bits = (packed.unsqueeze(2) >> shifts) & 1
    forbidden = bits.flatten(1)[:, offset : offset + values.shape[1]] == 0
    values[there] = values[there].masked_fill_(forbidden, -torch.inf)


def _usable(values: torch.Tensor) -> bool:
    return values.dtype == torch.float32 and values.is_contiguous() and cpu.usable(values.device, values.dtype)
