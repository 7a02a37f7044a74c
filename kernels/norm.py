"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from . import cpu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; computed in float32, returned in `dtype`."""
    if x.dtype == torch.float32 and x.ndim == 2 and cpu.usable(x.device, dtype):
        out = torch.empty(x.shape, dtype=dtype)
        cpu.native.norm(x.data_ptr(), weight.data_ptr(), eps, out.data_ptr(), *x.shape, cpu.DTYPES[dtype])
        return out
    return torch.nn.functional.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(dtype)
