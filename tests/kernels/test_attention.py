"""The attention backends against the definition of attention, over paged caches of any shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phalanx.kernels import cpu
from phalanx.kernels.attention import AttentionBackend, AttentionMetadata, TorchAttention
from phalanx.kernels.cpu.attention import CpuAttention
from phalanx.kernels.reference import paged_attention

INSTRUCTION_SETS = [
    name
    for name in ("avx512_amx", "emulated_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
    if cpu.native and cpu.native.can_run(name)
]


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
        slot_mapping=torch.tensor(places),
        block_table=table,
        cu_q=torch.tensor([0, *query_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seqused_k=torch.tensor(key_lengths, dtype=torch.int32),
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        block_size=block_size,
    )


def _check(
    backend: AttentionBackend,
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
    stale: float,
) -> None:
    """Rows of one query and of several (queries, keys before them), in a pool whose other places hold `stale`."""
    query_lengths = [1] * len(decode_keys) + [queries for queries, _ in chunks]
    key_lengths = decode_keys + [queries + before for queries, before in chunks]
    if not query_lengths:
        return
    generator = torch.Generator().manual_seed(seed)
    widest = max(-(-keys // block_size) for keys in key_lengths)
    blocks = widest * len(key_lengths) + 3
    table = torch.randperm(blocks, generator=generator)[: widest * len(key_lengths)].view(len(key_lengths), widest)
    tokens = sum(query_lengths)
    q = torch.randn(tokens, kv_heads * group, head_dim, generator=generator).to(dtype)
    plain = [torch.zeros(blocks, block_size, kv_heads, head_dim) for _ in range(2)]
    width, kept_as = backend.cache_head(head_dim, dtype)
    int8_cache = kept_as == torch.int8
    stale = -1 if int8_cache else stale  # four bytes of -1 are a scale that is NaN
    caches = [torch.full((blocks, block_size, kv_heads, width), stale, dtype=kept_as) for _ in range(2)]
    # As an engine would: the older tokens of all rows first, then the step's own.
    for first, last in ((0, 1), (1, 2)):
        lengths = [(keys - queries, keys) for queries, keys in zip(query_lengths, key_lengths, strict=True)]
        slot_mapping = torch.tensor(
            [
                int(table[row, place // block_size]) * block_size + place % block_size
                for row, ends in enumerate(lengths)
                for place in range((0, *ends)[first], (0, *ends)[last])
            ],
            dtype=torch.int64,
        )
        k, v = (torch.randn(len(slot_mapping), kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        backend.store_kv(k, v, caches[0], caches[1], slot_mapping)
        if int8_cache:
            k, v = _rounded(k), _rounded(v)
        plain[0].flatten(0, 1)[slot_mapping], plain[1].flatten(0, 1)[slot_mapping] = k.float(), v.float()
    metadata = _metadata(table, query_lengths, key_lengths, block_size)
    out = backend.attend(q, caches[0], caches[1], backend.plan(metadata))
    expected = paged_attention(q, plain[0], plain[1], table, query_lengths, key_lengths)
    exact = dtype == torch.float32 and not int8_cache
    torch.testing.assert_close(out.float(), expected, atol=1e-5 if exact else 2e-2, rtol=1e-2)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Each head to 8-bit numbers and back."""
    scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
    return (x.float() / scale).round() * scale


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
def test_torch_computes_attention_for_any_mix_of_decodes_and_chunks(
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    _check(TorchAttention(), decode_keys, chunks, kv_heads, group, head_dim, block_size, dtype, seed, 1.0)


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = cpu.native.kernels()
    cpu.native.use_kernels(request.param)
    yield request.param
    cpu.native.use_kernels(chosen)


@given(
    decode_keys=st.lists(st.one_of(st.integers(1, 70), st.integers(1000, 2100)), max_size=5),
    chunks=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 150)), max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13]),
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32, 48, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    int8_cache=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_kernels_compute_attention_for_any_mix_of_decodes_and_chunks(
    instructions: str,
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    int8_cache: bool,
    threads: int,
    seed: int,
) -> None:
    cpu.set_threads(threads)
    # A block's last owner may have left NaN: nobody else may see it.
    _check(CpuAttention(int8_cache), decode_keys, chunks, kv_heads, group, head_dim, block_size, dtype, seed, torch.nan)


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_querys_bits_depend_neither_on_the_chunk_it_is_in_nor_on_its_neighbours(
    instructions: str, int8_cache: bool, dtype: torch.dtype
) -> None:
    backend, count, block_size, kv_heads, head_dim = CpuAttention(int8_cache), 600, 16, 3, 64
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(count, 3 * kv_heads, head_dim, generator=generator)
    k, v = (torch.randn(count, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    table = torch.arange(-(-count // block_size)).unsqueeze(0)
    width, kept_as = backend.cache_head(head_dim, dtype)
    caches = [torch.zeros(table.shape[1], block_size, kv_heads, width, dtype=kept_as) for _ in range(2)]
    backend.store_kv(k, v, *caches, torch.arange(count))

    def attend(first: int, last: int) -> torch.Tensor:
        metadata = _metadata(table, [last - first], [last], block_size)
        return backend.attend(q[first:last].to(dtype), *caches, backend.plan(metadata))

    whole = attend(0, count)
    for chunk in (1, 13, 37, 100):
        for first in range(count - 3 * chunk, count, chunk):
            assert torch.equal(attend(first, first + chunk), whole[first : first + chunk]), (chunk, first)
