"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467) in Triton, alone and with the residual sum before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32, returned in `dtype`.

    `x` is (T, H) or heads (T, heads, H), maybe a slice of a projection, of any float dtype; `weight` (H,). Raises
    ValueError if the numbers of a row are not adjacent.
    """
    if x.ndim not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(
            f"x is {tuple(x.shape)} of strides {x.stride()}; it must be (T, H) or (T, heads, H), H adjacent"
        )

    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    heads = x.shape[1] if x.ndim == 3 else 1
    rows = x.shape[0] * heads
    columns = x.shape[-1]
    if rows:
        strides = x.stride(0), x.stride(1) if x.ndim == 3 else 0
        _rms_norm[(rows,)](x, weight, out, *strides, heads, columns, eps, **_row_options(columns))
    return out


def add_rms_norm(
    total: torch.Tensor,
    addend: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add `addend` and then `bias` to `total`, in place; return RMSNorm(total) in `dtype`. One pass over the numbers.

    `total` is (T, H) float32, contiguous; `addend` (T, H) and `bias` (H,) are of any float dtype; `weight` is (H,).
    Raises ValueError for another layout.
    """
    if total.dtype != torch.float32 or total.ndim != 2 or not total.is_contiguous():
        raise ValueError(f"total is {tuple(total.shape)} {total.dtype}; it must be (T, H), float32 and contiguous")
    if addend.shape != total.shape or addend.stride(1) != 1:
        raise ValueError(
            f"what is added is {tuple(addend.shape)} of strides {addend.stride()}; it must be {tuple(total.shape)}, "
            "the numbers of a row adjacent"
        )

    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    rows, columns = total.shape
    if rows:
        _add_rms_norm[(rows,)](
            total,
            addend,
            weight if bias is None else bias,
            weight,
            out,
            addend.stride(0),
            columns,
            eps,
            HAS_BIAS=bias is not None,
            **_row_options(columns),
        )
    return out


def _row_options(columns: int) -> dict[str, int]:
    """Options of one program a row, which holds it in registers: 16 numbers a thread where it is long enough."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _rms_norm(x, weight, out, row_stride, head_stride, heads, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = row // heads * row_stride + row % heads * head_stride
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    values = tl.load(x + start + offsets, inside, 0.0).to(tl.float32)
    normed = _normalised(values, weight, offsets, inside, columns, eps)
    tl.store(out + row * columns + offsets, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _add_rms_norm(
    total, addend, bias, weight, out, addend_stride, columns, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < columns
    index = row * columns + offsets
    summed = tl.load(total + index, inside, 0.0)
    summed += tl.load(addend + row * addend_stride + offsets, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        summed += tl.load(bias + offsets, inside, 0.0).to(tl.float32)
    tl.store(total + index, summed, inside)
    normed = _normalised(summed, weight, offsets, inside, columns, eps)
    tl.store(out + index, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _normalised(values, weight, offsets, inside, columns, eps):
    scale = tl.rsqrt(tl.sum(values * values, 0) / columns + eps)
    return values * scale * tl.load(weight + offsets, inside, 0.0).to(tl.float32)
