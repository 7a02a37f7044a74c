"""Attention as its definition reads, one row and one head at a time: what every backend is tested against."""

from __future__ import annotations

import math

import torch


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
) -> torch.Tensor:
    """Causal attention in float32 for queries (T, heads, head_dim) over pools (blocks, block_size, kv_heads, head_dim).

    Row r has query_lengths[r] queries at the end of key_lengths[r] keys, found through block_table[r]. Returns
    (T, heads, head_dim) float32.
    """
    group = q.shape[1] // k_cache.shape[2]
    out = torch.zeros(q.shape, dtype=torch.float32)
    first = 0
    for row, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        # The row's keys and values, gathered from its blocks.
        positions = torch.arange(keys)
        blocks = block_table[row][positions // k_cache.shape[1]]
        k = k_cache[blocks, positions % k_cache.shape[1]].float()
        v = v_cache[blocks, positions % k_cache.shape[1]].float()

        for i in range(queries):
            visible = keys - queries + i + 1
            for head in range(q.shape[1]):
                scores = k[:visible, head // group] @ q[first + i, head].float() / math.sqrt(q.shape[2])
                out[first + i, head] = scores.softmax(0) @ v[:visible, head // group]
        first += queries
    return out
