"""The Triton attention kernels, run by Triton's interpreter, against the definition of attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.kernels.attention import AttentionMetadata, HeadNorms, TorchAttention
from phalanx.kernels.reference import paged_attention

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from phalanx.kernels.cuda import paged  # noqa: E402
from phalanx.kernels.cuda.attention import AttentionKernel, CudaAttention, TritonDecode, TritonPrefill  # noqa: E402
from phalanx.kernels.cuda.decode import _splits_used, decode_attention, plan_splits  # noqa: E402
from phalanx.kernels.cuda.prefill import prefill_attention, tma_fits  # noqa: E402

# (group, head_dim, block_size): tiles larger than blocks, as large and smaller; heads that are no power of two.
SHAPES = [(1, 64, 16), (4, 64, 64), (5, 128, 32), (7, 64, 128), (8, 80, 16), (5, 256, 16)]
DTYPES = [torch.float32, torch.bfloat16]
KV_HEADS = 2


class _Cache:
    """Pools of random keys and values in random blocks. All others are NaN, as a last owner may leave them."""

    def __init__(self, key_lengths: list[int], head_dim: int, block_size: int, dtype: torch.dtype, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        widest = max(1, *(-(-keys // block_size) for keys in key_lengths))
        blocks = widest * len(key_lengths) + 3
        # Block 0, which stands in a table past a row's end, is nobody's.
        order = 1 + torch.randperm(blocks - 1, generator=generator)[: widest * len(key_lengths)]
        self.table = torch.zeros(len(key_lengths), widest, dtype=torch.int64)
        pool = torch.full((2, blocks, block_size, KV_HEADS, head_dim), torch.nan, dtype=dtype)
        for row, keys in enumerate(key_lengths):
            used = -(-keys // block_size)
            self.table[row, :used] = order.view(-1, widest)[row, :used]
            places = torch.arange(keys)
            values = torch.randn(2, keys, KV_HEADS, head_dim, generator=generator).to(dtype)
            pool[:, self.table[row, places // block_size], places % block_size] = values
        self.k, self.v = pool

    def queries(self, count: int, group: int) -> torch.Tensor:
        """As a projection leaves them: a token's keys and values stand between its queries and the next one's."""
        generator = torch.Generator().manual_seed(1)
        heads = KV_HEADS * (group + 2)
        qkv = torch.randn(count, heads, self.k.shape[3], generator=generator).to(self.k.dtype)
        return qkv[:, : KV_HEADS * group]

    def expected(self, q: torch.Tensor, query_lengths: list[int], key_lengths: list[int]) -> torch.Tensor:
        return paged_attention(q, self.k, self.v, self.table, query_lengths, key_lengths)


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32 to 1e-5; bfloat16 to 2e-2, as weights and results are rounded to 8 bits."""
    exact = actual.dtype == torch.float32
    torch.testing.assert_close(actual.float(), expected, atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 1e-2)


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "head_dim", "block_size"), SHAPES)
def test_decode_is_attention_however_rows_are_split(
    group: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    keys = [1030, 0, 1, 129]  # of 8 splits the rows use all, none, one and two
    _check_decode(_Cache(keys, head_dim, block_size, dtype), keys, group, (1, 2, 5, 8))


def test_a_group_of_more_heads_than_a_program_takes_is_cut() -> None:
    keys = [200, 0, 5]
    _check_decode(_Cache(keys, 64, 64, torch.float32), keys, 33, (1, 2))


def _check_decode(cache: _Cache, keys: list[int], group: int, all_splits: tuple[int, ...]) -> None:
    q = cache.queries(len(keys), group)
    used = [row for row, count in enumerate(keys) if count]
    expected = paged_attention(q[used], cache.k, cache.v, cache.table[used], [1] * len(used), [keys[i] for i in used])
    for splits in all_splits:
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        decode_attention(q, cache.k, cache.v, cache.table.int(), _int32(keys), out, max(keys), splits)
        _close(out[used], expected)
        assert torch.equal(out[1], torch.zeros_like(out[1]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "head_dim", "block_size"), SHAPES)
def test_prefill_is_attention_of_whole_prompts_chunks_and_single_tokens(
    group: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    _check_prefill([20, 1, 35, 9, 1], [20, 50, 100, 130, 1], group, head_dim, block_size, dtype, tma=False)


@pytest.mark.parametrize(("group", "head_dim", "block_size"), [(7, 64, 128), (5, 128, 256), (1, 128, 128)])
def test_prefill_is_attention_where_whole_tiles_are_copied(group: int, head_dim: int, block_size: int) -> None:
    assert tma_fits(head_dim, 2, block_size)
    _check_prefill([20, 1, 35, 9, 128], [20, 129, 300, 130, 256], group, head_dim, block_size, torch.bfloat16, tma=True)


def test_whole_tiles_are_not_copied_where_they_do_not_fit() -> None:
    fits = [(64, 2, 128), (128, 2, 128), (128, 2, 512)]
    others = [(128, 2, 64), (128, 4, 128), (80, 2, 128), (256, 2, 128)]
    assert [tma_fits(*case) for case in (*fits, *others)] == [True] * 3 + [False] * 4
    _check_prefill([20, 1], [20, 129], 5, 128, 64, torch.bfloat16, tma=True)


def _check_prefill(
    queries: list[int], keys: list[int], group: int, head_dim: int, block_size: int, dtype: torch.dtype, tma: bool
) -> None:
    cache = _Cache(keys, head_dim, block_size, dtype)
    q = cache.queries(sum(queries), group)
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    cu_q = _int32([0, *queries]).cumsum(0, dtype=torch.int32)
    prefill_attention(q, cache.k, cache.v, cache.table.int(), cu_q, _int32(keys), out, max(queries), tma)
    _close(out, cache.expected(q, queries, keys))


def _metadata(cache: _Cache, decodes: int, queries: list[int], keys: list[int]) -> AttentionMetadata:
    return AttentionMetadata(
        num_decodes=decodes,
        slot_mapping=torch.empty(0, dtype=torch.int64),
        block_table=cache.table,
        cu_q=_int32([0, *queries]).cumsum(0, dtype=torch.int32),
        seqused_k=_int32(keys),
        query_lengths=tuple(queries),
        key_lengths=tuple(keys),
        block_size=cache.k.shape[1],
    )


@given(
    decode_keys=st.lists(st.integers(1, 300), max_size=4),
    chunks=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), max_size=3),
    group=st.sampled_from([1, 3, 5, 7, 8]),
    head_dim=st.sampled_from([64, 96, 128]),
    block_size=st.sampled_from([16, 32, 64, 256]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_the_backend_computes_any_mix_of_decodes_and_chunks(
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    group: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    queries = [1] * len(decode_keys) + [count for count, _ in chunks]
    keys = decode_keys + [count + before for count, before in chunks]
    if not keys:
        return
    cache = _Cache(keys, head_dim, block_size, dtype, seed)
    q = cache.queries(sum(queries), group)
    backend = CudaAttention(TritonDecode(), TritonPrefill())
    plan = backend.plan(_metadata(cache, len(decode_keys), queries, keys))
    assert [rows is None for rows in plan] == [not decode_keys, not chunks]
    out = backend.attend(q, cache.k, cache.v, plan)
    assert out.shape == q.shape
    assert out.dtype == dtype
    _close(out, cache.expected(q, queries, keys))


def test_a_plan_of_decodes_is_good_for_other_lengths_as_a_graph_replays_them() -> None:
    cache = _Cache([700, 700], 64, 64, torch.float32)
    q = cache.queries(2, 5)
    backend = CudaAttention(TritonDecode(), TritonPrefill())
    metadata = _metadata(cache, 2, [1, 1], [3, 9])
    plan = backend.plan(metadata)
    for keys in ([3, 9], [700, 1], [65, 640]):
        metadata.seqused_k.copy_(_int32(keys))
        _close(backend.attend(q, cache.k, cache.v, plan), cache.expected(q, [1, 1], keys))


def test_a_layers_step_is_that_of_the_plain_backend() -> None:
    """Rotate, store and attend: three decodes and a chunk of five tokens."""
    queries, keys, group, head_dim, block_size = [1, 1, 1, 5], [1, 17, 40, 21], 3, 64, 16
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(12, generator=generator).view(4, 3)
    slot_mapping = torch.tensor(
        [
            int(table[row, place // block_size]) * block_size + place % block_size
            for row, (count, length) in enumerate(zip(queries, keys, strict=True))
            for place in range(length - count, length)
        ]
    )
    cu_q = _int32([0, *queries]).cumsum(0, dtype=torch.int32)
    metadata = AttentionMetadata(3, slot_mapping, table, cu_q, _int32(keys), tuple(queries), tuple(keys), block_size)
    qkv = torch.randn(len(slot_mapping), KV_HEADS * (group + 2) * head_dim, generator=generator)
    angles = torch.randn(len(slot_mapping), 1, head_dim // 2, generator=generator)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), -angles.sin()), -1)
    norms = HeadNorms(*(torch.rand(2, head_dim, generator=generator) + 0.5), eps=1e-6)
    pool = torch.randn(2, 12, block_size, KV_HEADS, head_dim, generator=generator)
    results = []
    for backend in (TorchAttention(), CudaAttention(TritonDecode(), TritonPrefill())):
        k_cache, v_cache = pool.clone()
        q = backend.rotate_and_store(qkv.clone(), cos, sin, norms, k_cache, v_cache, slot_mapping)
        backend.store_kv(
            torch.ones(1, KV_HEADS, head_dim), torch.ones(1, KV_HEADS, head_dim), k_cache, v_cache, slot_mapping[:1]
        )
        results.append((k_cache, v_cache, backend.attend(q, k_cache, v_cache, backend.plan(metadata))))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class _Other(AttentionKernel):
    name, block_multiple, default_block_size = "other", 24, 48

    def __call__(self, *args: object) -> None:
        raise AssertionError


def test_the_backend_is_named_after_its_kernels_and_takes_blocks_that_suit_both() -> None:
    assert CudaAttention(TritonDecode(), TritonPrefill()).name == "triton"
    mixed = CudaAttention(TritonDecode(), _Other())
    assert mixed.name == "other for prompts, triton for decodes"
    assert mixed.block_multiple == 48
    assert mixed.default_block_size == 128
    assert mixed.supports_graph


@triton.jit
def _count_splits(keys, out, splits, fill):
    row = tl.program_id(0)
    tl.store(out + row, _splits_used(tl.load(keys + row), splits, fill))


@pytest.mark.parametrize(
    ("splits", "fill", "used"),
    [
        (1, 1, [0, 1, 1, 1, 1, 1, 1]),
        (8, 8, [0, 1, 1, 2, 8, 8, 8]),
        (8, 1, [0, 1, 1, 1, 1, 2, 8]),  # the GPU is full: only long rows are split
        (16, 4, [0, 1, 1, 2, 4, 4, 16]),
    ],
)
def test_a_row_uses_splits_by_its_length(splits: int, fill: int, used: list[int]) -> None:
    keys = _int32([0, 1, 128, 129, 4096, 4097, 100_000])
    out = torch.empty_like(keys)
    _count_splits[(len(keys),)](keys, out, splits, fill)
    assert out.tolist() == used


@pytest.mark.parametrize(
    ("programs", "max_k", "expected"),
    [
        (8, 2048, (16, 33)),  # one row of 8 KV heads: 128 programs, as each should have 128 keys
        (8, 32768, (33, 33)),
        (1, 32768, (128, 128)),
        (256 * 8, 2048, (1, 1)),
        (256 * 8, 32768, (2, 1)),
        (64 * 8, 32768, (8, 1)),
        (10_000, 32768, (1, 1)),
    ],
)
def test_the_grid_is_split_until_an_h100_is_full(programs: int, max_k: int, expected: tuple[int, int]) -> None:
    assert plan_splits(programs, 132, max_k) == expected


@triton.jit
def _load_far(pool, block, k, v):
    blocks = tl.load(block)
    start = pool - blocks.to(tl.int64) * (16 * 2 * 64)
    keys = paged._load_tile(start, 0, blocks, 0, 16, False, False, 2, 64, 16, 16)
    values = paged._load_tile(start + 64, 0, blocks, 0, 16, False, True, 2, 64, 16, 16)
    places = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(k + places, keys)
    tl.store(v + places, values)


def test_places_beyond_two_to_the_31_elements_are_found() -> None:
    pool = torch.randn(16, 2, 64)
    k, v = torch.empty(2, 16, 64)
    _load_far[(1,)](pool, _int32([2**24]), k, v)  # at element 2^35 of a pool that begins before this one
    assert torch.equal(k, pool[:, 0])
    assert torch.equal(v, pool[:, 1])


@pytest.mark.parametrize("block_size", [8, 48])
def test_a_block_size_that_is_no_power_of_two_from_16_on_is_refused(block_size: int) -> None:
    pool = torch.zeros(2, block_size, 1, 64)
    q = torch.zeros(1, 1, 64)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), _int32([1])
    with pytest.raises(ValueError, match=rf"block_size={block_size} is not a power of two of at least 16.*attention="):
        decode_attention(q, pool, pool, table, lengths, q.clone(), 16)
    with pytest.raises(ValueError, match=rf"block_size={block_size} is not a power of two of at least 16.*attention="):
        prefill_attention(q, pool, pool, table, _int32([0, 1]), lengths, q.clone(), 1)


def test_shapes_and_layouts_that_the_kernels_would_misread_are_refused() -> None:
    pool, q = torch.zeros(2, 16, 2, 64), torch.zeros(3, 4, 64)
    assert paged.shape_constants(q, pool, pool, q)["GROUP"] == 2
    wide = torch.zeros(2, 16, 1, 320)
    with pytest.raises(ValueError, match="heads of 320 elements are larger than 256"):
        paged.shape_constants(torch.zeros(1, 1, 320), wide, wide, torch.zeros(1, 1, 320))
    with pytest.raises(ValueError, match="do not fit each other"):
        paged.shape_constants(q[:, :3], pool, pool, q[:, :3].contiguous())
    with pytest.raises(ValueError, match="must be contiguous"):
        paged.shape_constants(q, pool.transpose(0, 1).contiguous().transpose(0, 1), pool, q)
    with pytest.raises(ValueError, match="must be adjacent"):
        paged.shape_constants(torch.zeros(3, 64, 4).transpose(1, 2), pool, pool, q)
