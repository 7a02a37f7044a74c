"""Argmax of each row of a vocabulary shard's logits, in Triton, with Gumbel noise or without: kernels/sampling.py.

A number and its column become one 64-bit key: keys compare as numbers do, and of equal numbers the first column has the
larger key. So a maximum is one of integers, in any order of the same result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["argmax", "block_maxima", "gumbel_argmax"]

_CHUNK = 4096
"""Columns in a program. One row of a vocabulary of 152,064 then has 38 programs."""
_TILE = 1024
"""Columns at a time: 8 a thread, as noise takes many registers."""

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLY_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = tl.constexpr(0x94D049BB133111EB)
_LOWEST_KEY = tl.constexpr(-(1 << 63))
_ALL_BUT_SIGN = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)


def argmax(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's largest value and its first column: float32 (R, V) -> float32 (R,), int64 (R,).

    NaN is larger than all others; V is 1 at least. Raises ValueError for another dtype, or if the numbers of a row are
    not adjacent.
    """
    return _argmax(values, None)


def gumbel_argmax(
    values: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, counter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the argmax of each row of values / temperature + Gumbel noise, as argmax() of float32 (R, V).

    `temperature` is float32 (R, 1), `seed` int64 (R, 1); the noise of column j is that of counter + j, int64 (R, 1):
    of the same random bits as kernels/sampling.py has. Raises ValueError as argmax().
    """
    return _argmax(values, (temperature, seed, counter))


def block_maxima(values: torch.Tensor, block: int) -> torch.Tensor:
    """Return the largest of each `block` columns: float32 (R, V) -> (R, ceil(V / block)).

    The last block may be shorter. A block with NaN has NaN. Raises ValueError as argmax().
    """
    _check(values)
    rows, columns = values.shape
    blocks = triton.cdiv(columns, block)
    maxima = torch.empty(rows, blocks, dtype=torch.float32, device=values.device)
    padded = triton.next_power_of_2(block)
    together = max(1, _CHUNK // padded)

    if maxima.numel():
        _block_maxima[(rows, triton.cdiv(blocks, together))](
            values, maxima, values.stride(0), columns, blocks, BLOCK=block, PADDED=padded, TOGETHER=together
        )
    return maxima


def _argmax(
    values: torch.Tensor, noise: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's largest value and its column; `noise` is (temperature, seed, counter), each (R, 1), or None."""
    _check(values)
    rows, columns = values.shape
    chunks = triton.cdiv(columns, _CHUNK)
    partial = torch.empty(rows, chunks, dtype=torch.int64, device=values.device)
    most = torch.empty(rows, dtype=torch.float32, device=values.device)
    indices = torch.empty(rows, dtype=torch.int64, device=values.device)

    if rows:
        settings = [values] * 3 if noise is None else [column.contiguous() for column in noise]
        grid = rows, chunks
        _chunk_maxima[grid](
            values, *settings, partial, values.stride(0), columns, NOISY=noise is not None, CHUNK=_CHUNK, TILE=_TILE
        )
        _row_maxima[(rows,)](partial, most, indices, chunks, BLOCK=triton.next_power_of_2(chunks))
    return most, indices


def _check(values: torch.Tensor) -> None:
    if values.dtype != torch.float32 or values.ndim != 2 or values.stride(1) != 1:
        raise ValueError(
            f"values are {tuple(values.shape)} {values.dtype} of strides {values.stride()}; they must be (R, V), "
            "float32, the numbers of a row adjacent"
        )


@triton.jit
def _chunk_maxima(
    values,
    temperature,
    seed,
    counter,
    partial,
    stride,
    columns,
    NOISY: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row, chunk): the largest key of the chunk's columns."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    if NOISY:
        scale = tl.load(temperature + row)
        key = _mix(tl.load(seed + row).to(tl.uint64, bitcast=True))
        first_counter = tl.load(counter + row)

    best = tl.full([TILE], _LOWEST_KEY, tl.int64)
    for first in range(0, CHUNK, TILE):
        column = chunk * CHUNK + first + tl.arange(0, TILE)
        inside = column < columns
        scores = tl.load(values + row * stride + column, inside, 0.0)
        if NOISY:
            scores = tl.div_rn(scores, tl.zeros_like(scores) + scale) + _gumbel(_uniform(key, first_counter + column))
        # A column's 31 bits are turned, so that the first of equal numbers has the largest key.
        keys = (_ordered(scores).to(tl.int64) << 32) | (column ^ _ALL_BUT_SIGN).to(tl.int64)
        best = tl.maximum(best, tl.where(inside, keys, _LOWEST_KEY))
    tl.store(partial + row * tl.num_programs(1) + chunk, tl.max(best, 0))


@triton.jit(do_not_specialize=["chunks"])
def _row_maxima(partial, most, indices, chunks, BLOCK: tl.constexpr):
    """Program (row): the largest key of its chunks, taken apart."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    key = tl.max(tl.load(partial + row * chunks + chunk, chunk < chunks, _LOWEST_KEY), 0)
    tl.store(most + row, _number((key >> 32).to(tl.int32)))
    tl.store(indices + row, (key & _ALL_BUT_SIGN) ^ _ALL_BUT_SIGN)


@triton.jit(do_not_specialize=["blocks"])
def _block_maxima(
    values,
    maxima,
    stride,
    columns,
    blocks,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Program (row, TOGETHER blocks)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    i = tl.arange(0, PADDED)[None, :]
    column = block[:, None] * BLOCK + i
    inside = (i < BLOCK) & (column < columns)
    found = tl.load(values + row * stride + column, inside, float("-inf"))
    tl.store(maxima + row * blocks + block, _number(tl.max(_ordered(found), 1)), block < blocks)


@triton.jit
def _ordered(x):
    """int32 numbers that compare as float32 `x` does: zeros are equal, NaN is the largest."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    is_nan = (bits & _ALL_BUT_SIGN) > _INFINITY
    return tl.where(is_nan, _ALL_BUT_SIGN, bits ^ ((bits >> 31) & _ALL_BUT_SIGN))


@triton.jit
def _number(ordered):
    """The float32 number that _ordered() made an integer of."""
    return (ordered ^ ((ordered >> 31) & _ALL_BUT_SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(key, counter):
    """Uniform float32 in (0, 1) of a mixed key and int64 counters, bit for bit as kernels/sampling.py has it."""
    bits = _mix(key + (counter + 1).to(tl.uint64, bitcast=True) * _GOLDEN)
    return tl.minimum(((bits >> 24).to(tl.int64).to(tl.float32) + 0.5) * 2.0**-40, 1 - 2.0**-24)


@triton.jit
def _gumbel(uniform):
    """-log(-log(1 - u)), precise for small u too: what 1 - u loses by rounding is made good.

    Goldberg, What Every Computer Scientist Should Know About Floating-Point Arithmetic, theorem 4.
    """
    rest = 1.0 - uniform
    taken = 1.0 - rest
    exponential = -tl.log(rest) * (uniform / tl.where(taken == 0.0, 1.0, taken))
    return -tl.log(tl.where(taken == 0.0, uniform, exponential))


@triton.jit
def _mix(x):
    """SplitMix64's finaliser on uint64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * _MULTIPLY_1
    x = (x ^ (x >> 27)) * _MULTIPLY_2
    return x ^ (x >> 31)
