"""The algorithm for a message of each size, chosen among several: arithmetic on measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

HYSTERESIS = 0.05
"""A larger message goes another way than a smaller one only if it saves this part of the time: less may be noise."""


class Threshold(NamedTuple):
    """Messages of up to max_bytes, and above the threshold before, go by `algorithm`."""

    max_bytes: int
    algorithm: str


Table = tuple[Threshold, ...]
"""Thresholds with rising max_bytes, no two neighbours of one algorithm."""


def choose_algorithms(times: Mapping[int, Mapping[str, float]], hysteresis: float = HYSTERESIS) -> Table:
    """The table that follows from `times`: for each size in bytes, the seconds of each algorithm that can do it.

    The fastest is taken for the smallest size; then each size keeps the one before unless another is faster by more
    than `hysteresis` of its time. Raises ValueError for a size that no algorithm can do, or a time below 0.
    """
    chosen: dict[int, str] = {}
    current = ""
    for size in sorted(times):
        measured = times[size]
        if not measured or not all(seconds >= 0 for seconds in measured.values()):
            raise ValueError(f"{size} bytes took {dict(measured)}; an algorithm must have a time, and none be below 0")

        best = min(measured, key=lambda name: measured[name])
        if current not in measured or measured[best] < (1 - hysteresis) * measured[current]:
            current = best
        chosen[size] = current
    return make_table(chosen)


def make_table(chosen: Mapping[int, str]) -> Table:
    """The table by which messages of each size in `chosen` go its way, and those between two as the larger."""
    table: list[Threshold] = []
    for size in sorted(chosen):
        if table and table[-1].algorithm == chosen[size]:
            table.pop()
        table.append(Threshold(size, chosen[size]))
    return tuple(table)


def look_up(table: Table, size: int, default: str) -> str:
    """The algorithm for a message of `size` bytes; `default` above the last threshold."""
    for max_bytes, algorithm in table:
        if size <= max_bytes:
            return algorithm
    return default


def row_ladder(max_rows: int) -> list[int]:
    """Numbers of rows to measure: the powers of two below max_rows, and max_rows. None if that is below 1."""
    return [2**i for i in range(max(max_rows - 1, 0).bit_length())] + [max_rows] if max_rows > 0 else []


def slowest(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return the largest over the ranks of each of several figures: a sum is done when the last rank has it."""
    return [max(figures) for figures in zip(*ranks, strict=True)]


def describe(table: Table, default: str) -> str:
    """The table in words."""
    return ", ".join([*(f"{algorithm} up to {size:,} bytes" for size, algorithm in table), f"{default} above"])
