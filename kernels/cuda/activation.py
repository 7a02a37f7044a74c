"""SwiGLU's activation (Shazeer, arXiv:2002.05202) in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["silu_mul"]

_BLOCK = 2048


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for (T, 2 * C) holding gate and up side by side; returns (T, C) in the same dtype.

    Computed in float32 and rounded once. Raises ValueError if the numbers of a row are not adjacent.
    """
    if gate_up.stride(1) != 1:
        raise ValueError(f"gate and up have strides {gate_up.stride()}; the numbers of a row must be adjacent")

    rows = gate_up.shape[0]
    columns = gate_up.shape[1] // 2
    out = torch.empty(rows, columns, dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(columns, _BLOCK)
    if rows and columns:
        _silu_mul[(rows * blocks,)](gate_up, out, gate_up.stride(0), columns, blocks, _BLOCK)
    return out


@triton.jit(do_not_specialize=["blocks"])
def _silu_mul(gate_up, out, stride, columns, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    offsets = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    start = gate_up + row * stride + offsets
    gate = tl.load(start, inside, 0.0).to(tl.float32)
    up = tl.load(start + columns, inside, 0.0).to(tl.float32)
    tl.store(out + row * columns + offsets, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), inside)
