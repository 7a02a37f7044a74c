"""The torch attention backend against the definition of attention, over paged caches of any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.kernels.attention import AttentionMetadata, TorchAttention, choose_backend
from phalanx.kernels.reference import paged_attention


def _metadata(
    table: torch.Tensor, query_lengths: list[int], key_lengths: list[int], block_size: int
) -> AttentionMetadata:
    places = [
        table[row, position // block_size] * block_size + position % block_size
        for row, (queries, keys) in enumerate(zip(query_lengths, key_lengths, strict=True))
        for position in range(keys - queries, keys)
    ]
    return AttentionMetadata(
        num_decodes=next((i for i, queries in enumerate(query_lengths) if queries > 1), len(query_lengths)),
        slots=torch.tensor(places),
        block_table=table,
        cu_q=torch.tensor([0, *query_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seqused_k=torch.tensor(key_lengths, dtype=torch.int32),
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        block_size=block_size,
    )


@given(
    decode_keys=st.lists(st.integers(1, 70), max_size=6),
    chunks=st.lists(st.tuples(st.integers(2, 20), st.integers(0, 40)), max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 5, 7, 8]),
    head_dim=st.sampled_from([16, 64]),
    block_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_it_computes_attention_for_any_mix_of_decodes_and_chunks(
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    query_lengths = [1] * len(decode_keys) + [queries for queries, _ in chunks]
    key_lengths = decode_keys + [queries + before for queries, before in chunks]
    if not query_lengths:
        return
    generator = torch.Generator().manual_seed(seed)
    widest = max(-(-keys // block_size) for keys in key_lengths)
    blocks = widest * len(key_lengths) + 3
    table = torch.randperm(blocks, generator=generator)[: widest * len(key_lengths)].view(len(key_lengths), widest)
    shape = (blocks, block_size, kv_heads, head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    tokens = sum(query_lengths)
    q = torch.randn(tokens, kv_heads * group, head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(tokens, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))

    backend, metadata = TorchAttention(), _metadata(table, query_lengths, key_lengths, block_size)
    backend.store_kv(k, v, k_cache, v_cache, metadata.slots)
    out = backend.attend(q, k_cache, v_cache, backend.plan(metadata))

    assert torch.equal(k_cache.flatten(0, 1)[metadata.slots], k)
    expected = paged_attention(q, k_cache, v_cache, table, query_lengths, key_lengths)
    torch.testing.assert_close(out.float(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="auto, torch"):
        choose_backend("magic")
