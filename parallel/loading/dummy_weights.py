"""Random weights without a checkpoint: a weight depends on its name and indices alone, so N ranks hold one model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable

import torch

from ...kernels.sampling import mix
from .checkpoint import LoadReport, WeightSlice, take_out

STANDARD_DEVIATION = 0.02

CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**24}
"""Made at a time: on a CPU as many as stay in its cache."""


def fill_dummy(
    slices: list[WeightSlice],
    seed: int,
    deviation: float = STANDARD_DEVIATION,
    filled: Callable[[WeightSlice], None] = lambda part: None,
) -> LoadReport:
    """Fill every slice with uniform random numbers of mean 0 (norm weights: 1) and standard deviation `deviation`.

    `filled` is called after each. The list is empty in the end, as load_weights() leaves it.

    The hashes of an element's row and of its column, made odd, are multiplied modulo 2^64, and the product's high bits
    are the number (Dietzfelbinger et al., A Reliable Randomized Algorithm for the Closest-Pair Problem, 1997: such a
    family is universal): one multiplication an element, any part of a tensor alone, and no matrix of low rank.
    """
    started = time.monotonic()
    for part in take_out(slices):
        _fill(part, seed, deviation)
        filled(part)
    return LoadReport(bytes_read=0, shard_bytes=0, seconds=time.monotonic() - started, files=0)


def _fill(part: WeightSlice, seed: int, deviation: float) -> None:
    device = part.destination.device
    digest = hashlib.blake2b(f"{seed}:{part.name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little", signed=True)
    mean = 1.0 if len(part.shape) == 1 and "norm" in part.name else 0.0
    # The numbers below are uniform over 2^31 integers around 0, whose standard deviation is 2^30 / sqrt(3).
    scale = deviation * math.sqrt(3) * 2.0**-30

    rows = part.index[0]
    columns = part.index[1] if len(part.index) > 1 else slice(0, 1)
    target = part.destination.view(rows.stop - rows.start, columns.stop - columns.start)

    # Rows count in even numbers and columns in odd ones, so that none of their hashes agree.
    column_hash = mix((torch.arange(columns.start, columns.stop, device=device) * 2 + 1) ^ key) | 1

    step = max(1, CHUNK_ELEMENTS[device.type] // max(1, len(column_hash)))
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        row_hash = mix((torch.arange(first, last, device=device) * 2) ^ key) | 1
        bits = (row_hash.unsqueeze(1) * column_hash) >> 33
        target[first - rows.start : last - rows.start].copy_(bits.to(torch.float32).mul_(scale).add_(mean))
