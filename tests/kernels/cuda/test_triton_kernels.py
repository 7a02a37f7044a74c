"""The Triton kernels around attention, run by Triton's interpreter, against torch's definitions of their results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.kernels import activation, cpu, cuda, norm, sampling
from phalanx.kernels.attention import HeadNorms
from phalanx.kernels.rope import RotaryEmbedding, apply_rope

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from phalanx.kernels.cuda import activation as triton_activation  # noqa: E402
from phalanx.kernels.cuda import norm as triton_norm  # noqa: E402
from phalanx.kernels.cuda import rope as triton_rope  # noqa: E402
from phalanx.kernels.cuda import sampling as triton_sampling  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""Half a unit in the last place; a whole one of float32, in which results are computed, and of bfloat16, to which the
interpreter does not round: it cuts digits off."""


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    cuda.interpret(True)
    yield
    cuda.interpret(False)


@pytest.fixture
def without_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "native", None)


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(actual: torch.Tensor, expected: torch.Tensor, slack: float = 1.0) -> None:
    """To `slack` roundings of the dtype; float32 sums may be off by some more."""
    tolerance = slack * ROUNDING[actual.dtype] + 4e-6
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double(), (x.shape[-1],), weight.double(), eps)


# RMSNorm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (0, 64), (3, 17), (2, 5120), (1, 16384), (4, 3, 80), (0, 3, 64)])
def test_rms_norm_is_its_definition(shape: tuple[int, ...], given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x, weight = 3 * _random(*shape, dtype=given_dtype), _random(shape[-1], seed=1)
    normed = triton_norm.rms_norm(x, weight, 1e-5, dtype)
    assert normed.dtype == dtype
    _close(normed, _rms_norm(x, weight, 1e-5))


def test_heads_are_normalised_where_a_projection_has_them() -> None:
    qkv, weight = _random(5, 9, 48, dtype=torch.bfloat16), _random(48, seed=1)
    heads = qkv[:, 2:7]
    _close(triton_norm.rms_norm(heads, weight, 1e-6, torch.bfloat16), _rms_norm(heads, weight, 1e-6))
    rows = qkv.flatten(1)[:, 96:144]
    _close(triton_norm.rms_norm(rows, weight, 1e-6, torch.float32), _rms_norm(rows, weight, 1e-6))


@given(
    rows=st.integers(0, 5), columns=st.integers(1, 700), dtype=st.sampled_from(DTYPES),
    added=st.sampled_from(DTYPES), biased=st.booleans(), seed=st.integers(0, 99),
    served=st.sampled_from(["triton", "torch"]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_add_rms_norm_adds_in_place_and_normalises_the_sum(
    rows: int, columns: int, dtype: torch.dtype, added: torch.dtype, biased: bool, seed: int, served: str
) -> None:
    before, weight = _random(rows, columns, seed=seed), _random(columns, seed=seed + 1)
    # As many numbers again stand between its rows.
    addend = _random(rows, 2 * columns, dtype=added, seed=seed + 2)[:, :columns]
    bias = _random(columns, dtype=added, seed=seed + 3) if biased else None
    total = before.clone()
    cuda.interpret(served == "triton")
    normed = norm.add_rms_norm(total, addend, bias, weight, 1e-6, dtype)
    cuda.interpret(True)
    expected = before + addend.float()
    if bias is not None:
        expected += bias.float()
    assert torch.equal(total, expected)
    assert normed.dtype == dtype
    _close(normed, _rms_norm(expected, weight, 1e-6))


@pytest.mark.parametrize("total", [torch.zeros(2, 8).bfloat16(), torch.zeros(8, 2).T, torch.zeros(16)])
def test_a_total_of_another_kind_is_refused(total: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(T, H\), float32 and contiguous"):
        triton_norm.add_rms_norm(total, total, None, torch.ones(8), 1e-6, torch.float32)


def test_rows_that_are_not_adjacent_are_refused() -> None:
    total, across = torch.zeros(2, 8), torch.zeros(8, 2).T
    with pytest.raises(ValueError, match="must be \\(2, 8\\)"):
        triton_norm.add_rms_norm(total, across, None, torch.ones(8), 1e-6, torch.float32)
    with pytest.raises(ValueError, match="H adjacent"):
        triton_norm.rms_norm(across, torch.ones(8), 1e-6, torch.float32)
    with pytest.raises(ValueError, match="must be adjacent"):
        triton_activation.silu_mul(across)
    with pytest.raises(ValueError, match="must be \\(R, V\\), float32"):
        triton_sampling.argmax(across)


# SwiGLU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (1, 1), (3, 33), (2, 2048), (2, 5000)])
def test_silu_mul_is_its_definition_rounded_once(rows: int, columns: int, dtype: torch.dtype) -> None:
    wide = 4 * _random(rows, 2 * columns + 3, dtype=dtype)
    gate_up = wide[:, : 2 * columns]
    gate, up = gate_up.double().chunk(2, dim=-1)
    result = triton_activation.silu_mul(gate_up)
    assert result.dtype == dtype
    _close(result, torch.nn.functional.silu(gate) * up)


# Rotary embedding and the paged cache


def _tables(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = RotaryEmbedding(
        head_dim=head_dim, max_position=4096, table_length=4096, dtype=dtype, device=torch.device("cpu"),
        kind="default", theta=10000.0, factor=1.0, original_max_position=0, beta_fast=32.0, beta_slow=1.0,
        attention_factor=None, mscale=None, mscale_all_dim=None, truncate=True, low_freq_factor=1.0,
        high_freq_factor=4.0,
    )  # fmt: skip
    return embedding(positions, positions + 1)


def _rotated(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Rounded between norm and rotation, in the interpreter's way, and not after it."""
    if weight is not None:
        heads = triton_norm.rms_norm(heads, weight, eps, heads.dtype)
    return apply_rope(heads.double(), cos.double(), sin.double())


BLOCK_SIZE = 4


def _pools(slot_mapping: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return pools of keys and values, behind a block that is not theirs."""
    shape = (2 + max([0, *slot_mapping]) // BLOCK_SIZE, BLOCK_SIZE, kv_heads, head_dim)
    return [torch.full(shape, torch.nan, dtype=dtype)[1:] for _ in "kv"]


def _stored(pool: torch.Tensor, slot_mapping: list[int]) -> torch.Tensor:
    """What the places hold; all others, also before the pool, must be as they were."""
    places = pool._base.flatten(0, 1)
    used = [BLOCK_SIZE + index for index in slot_mapping]
    others = torch.ones(len(places), dtype=torch.bool)
    others[used] = False
    assert places[others].isnan().all()
    return places[used]


@given(
    slot_mapping=st.lists(st.integers(-9, 40), max_size=6, unique=True), kv_heads=st.integers(1, 3),
    group=st.integers(1, 7), head_dim=st.sampled_from([2, 48, 64, 80, 128]), dtype=st.sampled_from(DTYPES),
    normed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_heads_are_normalised_rotated_and_stored(
    slot_mapping: list[int], kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, normed: bool, seed: int
) -> None:
    slot_mapping = [max(index, -1) for index in slot_mapping]
    tokens, heads = len(slot_mapping), kv_heads * group
    wide = 2 * _random(tokens, (heads + 2 * kv_heads) * head_dim + 8, dtype=dtype, seed=seed)
    qkv, before = wide[:, :-8], wide[:, -8:].clone()
    q, k, v = qkv.clone().view(tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = _tables(torch.arange(tokens) * 7 + seed, head_dim, dtype)
    weights = [_random(head_dim, seed=seed + i) if normed else None for i in (1, 2)]
    norms = HeadNorms(*weights, 1e-6) if normed else None
    k_cache, v_cache = _pools(slot_mapping, kv_heads, head_dim, dtype)
    result = triton_rope.rotate_and_store(qkv, cos, sin, norms, k_cache, v_cache, torch.tensor(slot_mapping).long())
    assert result.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    kept = [token for token, index in enumerate(slot_mapping) if index >= 0]
    used = [slot_mapping[token] for token in kept]
    # Rounding a rotated number is relative to its pair's length; a norm on the brink may be rounded to the next number.
    _close(result, _rotated(q, cos, sin, weights[0], 1e-6), slack=4.0)
    _close(_stored(k_cache, used), _rotated(k, cos, sin, weights[1], 1e-6)[kept], slack=4.0)
    assert torch.equal(_stored(v_cache, used), v[kept])
    assert torch.equal(wide[:, -8:], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 64), (3, 80), (8, 128), (9, 129)])
def test_keys_and_values_are_stored(kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    slot_mapping = [9, -1, 0, 22]
    k_cache, v_cache = _pools(slot_mapping, kv_heads, head_dim, dtype)
    heads = _random(len(slot_mapping), 3 * kv_heads, head_dim, dtype=dtype)
    k, v = heads[:, kv_heads:-kv_heads], heads[:, -kv_heads:]
    triton_rope.store_kv(k, v, k_cache, v_cache, torch.tensor(slot_mapping))
    used, kept = [9, 0, 22], [0, 2, 3]
    assert torch.equal(_stored(k_cache, used), k[kept])
    assert torch.equal(_stored(v_cache, used), v[kept])


def test_no_tokens_are_stored_nowhere() -> None:
    k_cache, v_cache = _pools([3], 2, 64, torch.float32)
    nothing = torch.empty(0, 2, 64)
    triton_rope.store_kv(nothing, nothing, k_cache, v_cache, torch.empty(0, dtype=torch.int64))
    assert k_cache.isnan().all()
    assert v_cache.isnan().all()


FAR = tl.constexpr(2**26)
"""A place of a pool of heads of 64 numbers, at element 2^32 for one head a token."""


@triton.jit
def _store_far(k, v, k_cache, v_cache, slot_mapping):
    triton_rope._store_kv(k, v, k_cache - FAR * 64, v_cache - FAR * 64, slot_mapping, 64, 64, 64, 64)


@triton.jit
def _rotate_far(qkv, cos, sin, k_cache, v_cache, slot_mapping):
    k_cache, v_cache = k_cache - FAR * 64, v_cache - FAR * 64
    triton_rope._rotate_and_store(
        qkv, cos, sin, cos, cos, k_cache, v_cache, slot_mapping, 192, 64, 0.0, 1, 1, 64, False, 1
    )


def test_places_beyond_two_to_the_31_elements_are_found() -> None:
    qkv, slot_mapping = _random(2, 192), torch.tensor([1, 0])
    k, v = qkv[:, 64:128].contiguous(), qkv[:, 128:].contiguous()
    cos, sin = torch.ones(2, 1, 64), torch.zeros(2, 1, 64)  # turned by nothing
    for launch in (
        lambda *pools: _store_far[(2, 1)](k, v, *pools, slot_mapping + FAR.value),
        lambda *pools: _rotate_far[(2, 2)](qkv, cos, sin, *pools, slot_mapping + FAR.value),
    ):
        k_cache, v_cache = torch.empty(2, 64), torch.empty(2, 64)
        launch(k_cache, v_cache)
        assert torch.equal(k_cache[slot_mapping], k)
        assert torch.equal(v_cache[slot_mapping], v)


def test_shapes_that_do_not_fit_are_refused() -> None:
    pool, slot_mapping = torch.zeros(2, 16, 2, 64), torch.zeros(3, dtype=torch.int64)
    qkv, table, kv = torch.zeros(3, 6 * 64), torch.zeros(3, 1, 64), torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match=r"must be contiguous and \(blocks"):
        triton_rope.store_kv(kv, kv, pool.transpose(0, 1), pool, slot_mapping)
    with pytest.raises(ValueError, match=r"must be contiguous and \(blocks"):
        triton_rope.rotate_and_store(qkv, table, table, None, pool, pool[:1], slot_mapping)
    with pytest.raises(ValueError, match="do not fit each other"):
        triton_rope.store_kv(kv, kv, pool, pool, slot_mapping[:2])
    for projection, cos in ((qkv[:, :-1], table), (qkv[:, :192], table), (qkv, table[:, :, :32])):
        with pytest.raises(ValueError, match="do not fit each other"):
            triton_rope.rotate_and_store(projection, cos, cos, None, pool, pool, slot_mapping)
    with pytest.raises(ValueError, match="must be adjacent"):
        triton_rope.rotate_and_store(torch.zeros(384, 3).T, table, table, None, pool, pool, slot_mapping)


# Sampling


def _first_of_the_largest(row: torch.Tensor) -> int:
    """NaN is larger than all others."""
    candidates = row.isnan() if row.isnan().any() else row == row.max()
    return int(candidates.nonzero()[0])


@given(
    rows=st.integers(0, 4), columns=st.one_of(st.integers(1, 300), st.integers(4000, 9000)), seed=st.integers(0, 99),
    nan=st.booleans(), lowest=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_largest_is_the_first_of_equals_and_nan_before_all(
    rows: int, columns: int, seed: int, nan: bool, lowest: bool
) -> None:
    wide = _random(rows, columns + 2, seed=seed).mul(0.7).round()  # many ties, and zeros of both signs
    values = wide[:, :-2]
    if rows and nan:
        values[0, columns // 2 :] = -torch.tensor(torch.nan)
    if rows and lowest:
        values[-1] = -torch.inf
    most, places = triton_sampling.argmax(values)
    expected = torch.tensor([_first_of_the_largest(row) for row in values], dtype=torch.int64)
    assert torch.equal(places, expected)
    torch.testing.assert_close(most, values.gather(1, expected.unsqueeze(1)).squeeze(1), rtol=0, atol=0, equal_nan=True)


def test_zeros_of_either_sign_are_equal() -> None:
    most, places = triton_sampling.argmax(torch.tensor([[-1.0, -0.0, 0.0], [0.0, -0.0, -1.0]]))
    assert most.tolist() == [0.0, 0.0]
    assert places.tolist() == [1, 0]


def test_a_whole_vocabulary_has_its_largest_anywhere() -> None:
    values = _random(6, 152_064).clamp_(max=4.0)
    peaks = torch.tensor([0, 1023, 4096, 77_777, 151_552, 152_063])
    values[torch.arange(6), peaks] = 5.0
    most, places = triton_sampling.argmax(values)
    assert torch.equal(places, peaks)
    assert most.tolist() == [5.0] * 6


@pytest.mark.parametrize("block", [16, 32, 48, 8192])
@pytest.mark.parametrize("columns", [1, 16, 100, 4096, 9001])
def test_block_maxima_are_those_of_each_block(columns: int, block: int) -> None:
    values = _random(3, columns)
    values[1, columns // 3] = torch.nan
    values[2] = -torch.inf
    padded = torch.nn.functional.pad(values, (0, -columns % block), value=-torch.inf)
    expected = padded.view(3, -1, block).amax(dim=2)
    torch.testing.assert_close(triton_sampling.block_maxima(values, block), expected, rtol=0, atol=0, equal_nan=True)
    assert triton_sampling.block_maxima(values[:0], block).shape == (0, expected.shape[1])


@triton.jit
def _draw(seeds, counters, uniform, gumbel, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    key = triton_sampling._mix(tl.load(seeds + i).to(tl.uint64, bitcast=True))
    drawn = triton_sampling._uniform(key, tl.load(counters + i))
    tl.store(uniform + i, drawn)
    tl.store(gumbel + i, triton_sampling._gumbel(drawn))


def test_noise_has_the_bits_that_it_has_elsewhere() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.iinfo(torch.int64)
    seeds, counters = torch.randint(whole.min, whole.max, (2, 65_536), generator=generator)
    seeds[:4] = torch.tensor([0, -1, whole.max, whole.min])
    counters[0] = -1  # of seed 0: the smallest number
    uniform, gumbel = torch.empty(65_536), torch.empty(65_536)
    _draw[(1,)](seeds, counters, uniform, gumbel, 65_536)
    assert torch.equal(uniform, sampling.uniform(seeds, counters))
    assert float(uniform[0]) == 2.0**-41
    torch.testing.assert_close(gumbel, sampling.gumbel(seeds, counters), rtol=1e-6, atol=1e-6)


@triton.jit
def _transform(uniform, gumbel, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(gumbel + i, triton_sampling._gumbel(tl.load(uniform + i)))


def test_noise_is_precise_at_both_ends() -> None:
    uniform = torch.cat((2.0 ** torch.linspace(-41, -1, 2048), 1 - 2.0 ** torch.linspace(-24, -1, 2048)))
    gumbel = torch.empty(4096)
    _transform[(1,)](uniform, gumbel, 4096)
    torch.testing.assert_close(gumbel.double(), -(-(-uniform.double()).log1p()).log(), rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize(("rows", "columns"), [(0, 10), (1, 1), (3, 500), (2, 5000), (1, 20_000)])
def test_the_noisiest_is_the_largest_of_value_and_gumbel_noise(rows: int, columns: int) -> None:
    values = 3 * _random(rows, columns)
    temperature = torch.linspace(0.3, 2.0, rows).unsqueeze(1)
    seed = torch.arange(rows).unsqueeze(1) * 2**40 - 17
    counter = (torch.arange(rows).unsqueeze(1) << 32) | 5
    scores = values / temperature + sampling.gumbel(seed, counter + torch.arange(columns))
    most, places = triton_sampling.gumbel_argmax(values, temperature, seed, counter)
    torch.testing.assert_close(most, scores.amax(dim=1), rtol=1e-6, atol=1e-6)
    # Another logarithm may be an ulp off, and decide between equals.
    torch.testing.assert_close(scores.gather(1, places.unsqueeze(1)).squeeze(1), most, rtol=1e-6, atol=1e-6)


def test_rows_that_are_invalid_are_found_so_with_noise_too() -> None:
    values = _random(2, 100)
    values[0, 70] = torch.nan
    values[1] = -torch.inf
    ones = torch.ones(2, 1, dtype=torch.int64)
    most, places = triton_sampling.gumbel_argmax(values, ones.float(), ones, ones)
    assert most[0].isnan()
    assert most[1] == -torch.inf
    assert places.tolist() == [70, 0]


# What serves where


ROWS = torch.zeros(2, 32)
ONES = torch.ones(2, 1, dtype=torch.int64)
SERVED: list[tuple[Any, str, Any, tuple[Any, ...]]] = [
    (norm, "rms_norm", triton_norm, (ROWS, torch.ones(32), 1e-6, torch.float32)),
    (norm, "add_rms_norm", triton_norm, (ROWS, ROWS, None, torch.ones(32), 1e-6, torch.float32)),
    (activation, "silu_mul", triton_activation, (ROWS,)),
    (sampling, "argmax", triton_sampling, (ROWS,)),
    (sampling, "gumbel_argmax", triton_sampling, (ROWS, ONES.float(), ONES, ONES)),
    (sampling, "block_maxima", triton_sampling, (ROWS, 16)),
]


@pytest.mark.parametrize(("module", "name", "kernels", "arguments"), SERVED, ids=[name for _, name, _, _ in SERVED])
def test_triton_serves_where_it_is_usable_and_torch_elsewhere(
    module: Any, name: str, kernels: Any, arguments: tuple[Any, ...], without_cpp: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    computed = getattr(module, name)(*arguments)
    monkeypatch.setattr(kernels, name, lambda *given: ("Triton", given))
    assert getattr(module, name)(*arguments) == ("Triton", arguments)
    cuda.interpret(False)
    torch.testing.assert_close(getattr(module, name)(*arguments), computed)


def test_no_columns_have_no_largest() -> None:
    most, places = sampling.gumbel_argmax(torch.empty(2, 0), ONES.float(), ONES, ONES)
    assert most.tolist() == [-torch.inf] * 2
    assert places.tolist() == [0, 0]
    assert sampling.argmax(torch.empty(2, 0))[0].tolist() == [-torch.inf] * 2
