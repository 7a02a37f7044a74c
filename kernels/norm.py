"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from . import cpu, cuda


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32, returned in `dtype`."""
    if x.dtype == torch.float32 and x.ndim == 2 and cpu.usable(x.device, dtype):
        out = torch.empty(x.shape, dtype=dtype)
        cpu.native.norm(x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), *x.shape, cpu.DTYPES[dtype])
        return out
    if cuda.usable(x.device):
        from .cuda import norm

        return norm.rms_norm(x, weight, eps, dtype)
    return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(dtype)


def add_rms_norm(
    total: torch.Tensor,
    addend: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Add `addend` (T, H) and `bias`, (H,) or None, to the float32 `total` (T, H), in place; returns its RMSNorm.

    The norm's `weight` is float32 (H,); the result (T, H) in `dtype`.
    """
    if cuda.usable(total.device):
        from .cuda import norm

        return norm.add_rms_norm(total, addend, bias, weight, eps, dtype)
    total.add_(addend)
    if bias is not None:
        total.add_(bias)
    return rms_norm(total, weight, eps, dtype)
