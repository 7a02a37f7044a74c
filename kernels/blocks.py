"""A decoder layer's two halves in one call each, for a rank on a CPU: norm, projections and what is between them.

With few tokens a step, what Python does between the parts would be a tenth of it.
"""

from __future__ import annotations

from typing import Any

import torch

from . import cpu
from .attention import HeadNorms
from .cpu.attention import cache_shape
from .linear import PackedWeight


def attention_block(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    qkv: tuple[PackedWeight, torch.Tensor | None],
    output: tuple[PackedWeight, torch.Tensor | None],
    head_norms: HeadNorms | None,
    heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    plan: Any,
    out: torch.Tensor | None,
) -> None:
    """RMSNorm of the float32 `residual` (T, hidden), QKV projection, rotation, attention by CpuAttention's `plan`, and
    the output projection, which is added to the residual or, if there is an `out` (T, hidden), stored there.

    Projections are (weight, bias); the other arguments are those of AttentionBackend.rotate_and_store.
    """
    block_size, kv_heads, head_dim, int8_cache = cache_shape(k_cache)
    cpu.native.attention_block(
        residual.data_ptr(),
        *residual.shape,
        norm_weight.data_ptr(),
        eps,
        qkv[0].native,
        cpu.address(qkv[1]),
        cos.data_ptr(),
        sin.data_ptr(),
        cpu.address(head_norms.query if head_norms else None),
        cpu.address(head_norms.key if head_norms else None),
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        int8_cache,
        plan,
        heads,
        kv_heads,
        head_dim,
        block_size,
        output[0].native,
        cpu.address(output[1]),
        cpu.address(out),
    )


def mlp_block(
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate_up: tuple[PackedWeight, torch.Tensor | None],
    down: tuple[PackedWeight, torch.Tensor | None],
    out: torch.Tensor | None,
) -> None:
    """RMSNorm of the float32 `residual` (T, hidden), SwiGLU and the down projection, which goes where
    attention_block's output goes.
    """
    cpu.native.mlp_block(
        residual.data_ptr(),
        *residual.shape,
        norm_weight.data_ptr(),
        eps,
        gate_up[0].native,
        cpu.address(gate_up[1]),
        down[0].native,
        cpu.address(down[1]),
        cpu.address(out),
    )
