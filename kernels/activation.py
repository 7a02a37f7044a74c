"""SwiGLU's activation (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch

from . import cuda


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for (T, 2 * C) holding gate and up side by side; returns (T, C).

    Where Triton serves it is rounded once; torch rounds silu(gate) too, and may differ in the last bit.
    """
    if cuda.usable(gate_up.device):
        from .cuda import activation

        return activation.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
