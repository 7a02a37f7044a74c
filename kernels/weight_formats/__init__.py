"""Weight formats: how a matrix is kept and multiplied. Nobody outside this package compares a format's name.

A new one is a class of WeightFormat in a module of its own, registered here.
"""

from __future__ import annotations

from .base import WeightFormat
from .bf16_in_12_bits import BF16_IN_12_BITS
from .int4 import INT4
from .int8 import INT8, W8A8
from .plain import PLAIN_PANELS

__all__ = ["NAMES", "PLAIN_PANELS", "WeightFormat", "get_weight_format", "stored_format"]

_FORMATS: dict[str, WeightFormat] = {each.name: each for each in (PLAIN_PANELS, INT8, W8A8(), INT4)}

NAMES = tuple(_FORMATS)
"""The values of the setting quantization."""


def get_weight_format(name: str, *, deterministic: bool = False) -> WeightFormat:
    """The format of quantization=NAME. Raises ValueError for a name that is none of NAMES.

    A `deterministic` one multiplies a row of x in the same way, and so to the same bits, beside any number of others.
    """
    if name not in _FORMATS:
        raise ValueError(f"quantization={name!r} is not supported; it must be one of {', '.join(NAMES)}")
    return _FORMATS[name].made_deterministic() if deterministic else _FORMATS[name]


def stored_format(name: str) -> WeightFormat:
    """The format that a packed weight is in, by its name: also one that nobody asks for. Raises ValueError."""
    for each in (*_FORMATS.values(), BF16_IN_12_BITS):
        if each.name == name:
            return each
    raise ValueError(f"no weight is stored in a format named {name!r}")
