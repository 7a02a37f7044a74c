"""Weights packed for tests by their format's name."""

from __future__ import annotations

import torch
from phalanx.kernels.weight_formats import get_weight_format
from phalanx.kernels.weight_formats.packed import PackedWeight


def pack(weight: torch.Tensor, rows: int, name: str = "none", *, deterministic: bool = False) -> PackedWeight:
    """As WeightFormat.pack, of the format that quantization=NAME is."""
    return get_weight_format(name, deterministic=deterministic).pack(weight, rows)
