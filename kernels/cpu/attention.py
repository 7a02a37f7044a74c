"""Paged attention by phalanx's own kernels for CPUs."""

from __future__ import annotations

from typing import Any

import torch

from .. import cpu
from ..attention import AttentionBackend, AttentionMetadata, HeadNorms

SCALE_BYTES = 4
"""The scale of one head's key or value in a pool of 8-bit numbers: scales stand behind a block's numbers, by head."""


class CpuAttention(AttentionBackend):
    """phalanx's own kernels. A block's keys and values stand as their products read them (kernels/cpu/kernels.h)."""

    name = "cpu"
    block_multiple = cpu.PANEL
    default_block_size = cpu.PANEL
    supports_graph = False
    has_fused_decoder = True

    def __init__(self, int8_cache: bool = False) -> None:
        """`int8_cache`: the pool keeps 8 bits of each number, and a float32 scale for each head of a token."""
        self._int8_cache = int8_cache

    def cache_head(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """The head's elements in the model's dtype; with an int8 cache, bytes: the numbers and one float32 scale."""
        return (head_dim + SCALE_BYTES, torch.int8) if self._int8_cache else (head_dim, dtype)

    def plan(self, metadata: AttentionMetadata) -> Any:
        """The C++ kernels' plan, which reads the metadata's tensors by address: good as long as these."""
        return cpu.native.AttentionPlan(
            metadata.block_table.data_ptr(),
            metadata.block_table.stride(0),
            metadata.cu_q.data_ptr(),
            metadata.seqused_k.data_ptr(),
            len(metadata.query_lengths),
        )

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values as AttentionBackend.store_kv: as a projection without queries, which is not rotated."""
        self.rotate_and_store(torch.cat((k, v), dim=1).flatten(1), None, None, None, k_cache, v_cache, slot_mapping)

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        norms: HeadNorms | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """As AttentionBackend.rotate_and_store, in `qkv` itself. Without `cos` and `sin` nothing is rotated."""
        block_size, kv_heads, head_dim, int8_cache = cache_shape(k_cache)
        all_heads = qkv.shape[1] // head_dim
        heads = all_heads - 2 * kv_heads

        cpu.native.rope(
            qkv.data_ptr(),
            qkv.stride(0),
            cpu.address(cos),
            cpu.address(sin),
            cpu.address(norms.query if norms else None),
            cpu.address(norms.key if norms else None),
            norms.eps if norms else 0.0,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            int8_cache,
            slot_mapping.data_ptr(),
            qkv.shape[0],
            heads,
            kv_heads,
            head_dim,
            block_size,
            cpu.DTYPES[qkv.dtype],
        )

        return qkv.view(-1, all_heads, head_dim)[:, :heads]

    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        """Attention as AttentionBackend.attend, by the tasks of `plan`."""
        block_size, kv_heads, head_dim, int8_cache = cache_shape(k_cache)
        out = torch.empty(q.shape, dtype=q.dtype)
        cpu.native.attention(
            plan,
            q.shape[1],
            kv_heads,
            head_dim,
            block_size,
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            int8_cache,
            out.data_ptr(),
            cpu.DTYPES[q.dtype],
        )
        return out


def cache_shape(cache: torch.Tensor) -> tuple[int, int, int, bool]:
    """(block_size, kv_heads, head_dim, whether it keeps 8-bit numbers) of a layer's pool of CpuAttention."""
    _, block_size, kv_heads, width = cache.shape
    int8_cache = cache.dtype == torch.int8
    return block_size, kv_heads, width - SCALE_BYTES * int8_cache, int8_cache
