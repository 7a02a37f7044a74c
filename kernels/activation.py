"""SwiGLU's activation (Shazeer, arXiv:2002.05202)."""

from __future__ import annotations

import torch


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for (T, 2 * C) holding gate and up side by side; returns (T, C)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)
