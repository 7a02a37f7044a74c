"""The C++ kernels against what they stand for, over random shapes, on every instruction set this machine has."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phalanx.kernels import cpu
from phalanx.kernels.attention import HeadNorms, TorchAttention
from phalanx.kernels.cpu.attention import CpuAttention
from phalanx.kernels.norm import rms_norm
from phalanx.kernels.sampling import argmax, block_maxima, gumbel, gumbel_argmax, mask_rows
from phalanx.kernels.weight_formats import NAMES, plain
from phalanx.kernels.weight_formats.packed import PackedWeight, row_multiple
from phalanx.parallel.topology.topology import format_cpu_list
from phalanx.tests.kernels.packing import pack
from phalanx.tests.threads import pool_cpus

INSTRUCTION_SETS = [
    name
    for name in ("avx512_amx", "emulated_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
    if cpu.native and cpu.native.can_run(name)
]
pytestmark = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
checked = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen, threads = cpu.native.kernels(), cpu.native.threads()
    cpu.native.use_kernels(request.param)
    yield request.param
    cpu.native.use_kernels(chosen)
    cpu.set_threads(threads)


def _random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _padded(weight: torch.Tensor, pieces: int = 1) -> torch.Tensor:
    """With rows of NaN between and after the pieces: nothing of them may show."""
    parts = []
    for piece in weight.chunk(pieces) if pieces > 1 else [weight]:
        missing = -len(piece) % cpu.PANEL
        parts += [piece, torch.full((missing, weight.shape[1]), torch.nan, dtype=weight.dtype)]
    return torch.cat(parts).contiguous()


def _close(value: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # What adds up to nearly nothing is as far off as its terms are.
    scale = max(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(value.double(), expected, atol=TOLERANCE[dtype] * scale, rtol=0)


@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([97, 800])),
    n=st.integers(1, 90),
    k=st.one_of(st.integers(1, 40), st.sampled_from([300, 1024, 1500])),
    dtype=DTYPES,
    bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@checked
def test_a_packed_weight_multiplies_like_the_plain_one(
    instructions: str, rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, threads: int, seed: int
) -> None:
    cpu.set_threads(threads)
    k += k % 2 if dtype == torch.bfloat16 else 0
    weight, x = _random(n, k, dtype=dtype, seed=seed) / k**0.5, _random(rows, k + 6, dtype=dtype, seed=seed + 1)[:, :k]
    b = _random(n, dtype=dtype, seed=seed + 2) if bias else None
    packed = pack(_padded(weight), n)
    product = x.double() @ weight.double().T
    expected = product if b is None else product + b.double()
    _close(packed.linear(x, b), expected, dtype)
    _close(packed.linear_float(x), product, torch.float32)
    total = _random(rows, n, dtype=torch.float32, seed=seed + 3)
    expected_total = total.double() + expected
    packed.add_to(total, x, b)
    _close(total, expected_total, torch.float32)


@given(
    rows=st.integers(1, 40), half=st.integers(1, 70), k=st.integers(1, 80), dtype=DTYPES, bias=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@checked
def test_a_gated_layer_is_silu_of_one_half_times_the_other(
    instructions: str, rows: int, half: int, k: int, dtype: torch.dtype, bias: bool, threads: int, seed: int
) -> None:
    cpu.set_threads(threads)
    k += k % 2 if dtype == torch.bfloat16 else 0
    weight, x = _random(2 * half, k, dtype=dtype, seed=seed), _random(rows, k, dtype=dtype, seed=seed + 1)
    b = _random(2 * half, dtype=dtype, seed=seed + 2) if bias else None
    product = x.double() @ weight.double().T + (0 if b is None else b.double())
    gate, up = product.chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    _close(pack(_padded(weight, 2), 2 * half).silu_mul(x, b), expected, dtype)


@given(rows=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 40), dtype=DTYPES, seed=st.integers(0, 99))
@checked
def test_rows_are_looked_up_in_a_packed_weight(
    instructions: str, rows: int, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    k *= 2
    weight = _random(n, k, dtype=dtype, seed=seed)
    numbers = torch.randint(-3, n + 3, (rows,), generator=torch.Generator().manual_seed(seed))
    inside = (numbers >= 0) & (numbers < n)
    expected = torch.where(inside.unsqueeze(1), weight[numbers.clamp(0, n - 1)], 0)
    assert torch.equal(pack(_padded(weight), n).look_up(numbers), expected)


def _compressed(weight: torch.Tensor, rows: int, whether: bool) -> PackedWeight:
    """However slow the kernels are at it and little it saves, or not at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "compresses", lambda: whether)
        patch.setattr(plain, "LARGEST_COMPRESSED", 100.0)
        packed = pack(weight.clone(), rows)
    assert packed.in_place == (not whether)
    return packed


@given(
    rows=st.one_of(st.integers(1, 40), st.sampled_from([97, 300])), n=st.integers(1, 90), k=st.integers(1, 180),
    apart=st.sampled_from([0.0, 0.2, 1.0]), threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@checked
def test_compressing_a_weight_changes_no_bit(
    instructions: str, rows: int, n: int, k: int, apart: float, threads: int, seed: int
) -> None:
    cpu.set_threads(threads)
    k *= 8
    weight, x = _random(n, k, dtype=torch.bfloat16, seed=seed), _random(rows, k, dtype=torch.bfloat16, seed=seed + 1)
    random = torch.Generator().manual_seed(seed)
    # Some groups of 128 columns have numbers of every size, zeros and what is nearly zero among them.
    wild = torch.rand(k // 128 + 1, generator=random).repeat_interleave(128)[:k] < apart
    sizes = torch.exp2(torch.randint(-60, 1, (n, k), generator=random).float())
    weight = torch.where(wild, weight * sizes, weight.float()).bfloat16()
    weight[0, ::7], weight[-1, ::5] = 0.0, 1e-39
    packed, plain = (_compressed(_padded(weight), n, whether) for whether in (True, False))
    everything = torch.arange(-1, n + 1)
    assert torch.equal(packed.look_up(everything).view(torch.int16), plain.look_up(everything).view(torch.int16))
    assert torch.equal(packed.look_up(everything)[1:-1], weight)
    found, expected = packed.linear_float(x), plain.linear_float(x)
    if packed.nbytes == cpu.native.compressed_bytes(-(-n // 16) * 16, k):  # none stands apart
        assert torch.equal(found, expected)
    # A group that stands apart is summed up by itself: the sum is rounded elsewhere, the same for every row.
    size = float(x.float().norm(dim=1).max() * weight.float().norm(dim=1).max())
    assert (found - expected).abs().max() <= 1e-6 * size
    assert torch.equal(packed.linear_float(x[: rows // 2 + 1]), found[: rows // 2 + 1])


def test_a_compressed_weight_takes_12_bits_a_number_unless_that_does_not_pay() -> None:
    weight = _random(64, 1280, dtype=torch.bfloat16, seed=0)
    assert _compressed(weight, 64, True).nbytes == 64 * 1280 * 1.5 + 4 * 192  # 10 tables of 16 bytes, in whole lines
    if not cpu.compresses():
        assert pack(weight.clone(), 64).in_place
        return
    assert pack(weight.clone(), 64).nbytes < 0.76 * weight.nbytes
    sizes = torch.exp2(torch.randint(-60, 1, (64, 1280), generator=torch.Generator().manual_seed(0)).float())
    assert pack((weight * sizes).bfloat16(), 64).in_place


@pytest.mark.parametrize("kind", NAMES)
def test_a_products_bits_depend_on_its_own_row_alone(instructions: str, kind: str) -> None:
    weight, x = _random(208, 704, dtype=torch.bfloat16, seed=0), _random(75, 704, dtype=torch.bfloat16, seed=1)
    packed = pack(weight, 200, kind, deterministic=True)
    whole = packed.linear_float(x)
    for count in (1, 2, 3, 4, 5, 7, 11, 13, 40):
        cpu.set_threads(1 + count % 3)
        assert torch.equal(packed.linear_float(x[10 : 10 + count]), whole[10 : 10 + count]), count


@given(rows=st.integers(1, 40), size=st.integers(1, 200), dtype=DTYPES, seed=st.integers(0, 99))
@checked
def test_rms_norm_is_its_definition(instructions: str, rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    x, weight = _random(rows, size, dtype=torch.float32, seed=seed), _random(size, dtype=torch.float32, seed=seed + 1)
    expected = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    _close(rms_norm(x, weight, 1e-5, dtype), expected, dtype)


@given(
    tokens=st.integers(1, 40), heads=st.integers(1, 9), kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 128]), block_size=st.sampled_from([16, 48]), dtype=DTYPES,
    normed=st.booleans(), threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@checked
def test_heads_are_normalised_rotated_and_stored_as_torch_does_it(
    instructions: str, tokens: int, heads: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    normed: bool, threads: int, seed: int,
) -> None:  # fmt: skip
    cpu.set_threads(threads)
    heads *= kv_heads
    qkv = _random(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=seed)
    angles = torch.outer(torch.arange(tokens) * 3.0, 0.7 ** torch.arange(head_dim // 2)).unsqueeze(1)
    cos, sin = (torch.cat((t, s * t), -1).to(dtype) for t, s in ((angles.cos(), 1), (angles.sin(), -1)))
    norms = None
    if normed:
        weights = (_random(head_dim, dtype=torch.float32, seed=seed + i) for i in (1, 2))
        norms = HeadNorms(*weights, 1e-6)
    blocks = -(-tokens // block_size) + 1
    slot_mapping = torch.arange(tokens) + block_size  # block 0 stays empty
    ours, theirs = ([torch.zeros(blocks, block_size, kv_heads, head_dim, dtype=dtype) for _ in range(2)] for _ in "ab")
    expected = TorchAttention().rotate_and_store(qkv.clone(), cos, sin, norms, *theirs, slot_mapping)
    # Keys and values stand in an order of our own; stored plainly, what torch made stands in the same.
    again = [torch.zeros_like(cache) for cache in ours]
    k, v = (cache.flatten(0, 1)[slot_mapping] for cache in theirs)
    CpuAttention().store_kv(k, v, *again, slot_mapping)
    q = CpuAttention().rotate_and_store(qkv, cos, sin, norms, *ours, slot_mapping)
    for value, wanted in ((q, expected), *zip(ours, again, strict=True)):
        # torch rounds to bfloat16 after each of its operations.
        torch.testing.assert_close(value, wanted, atol=1e-5 if dtype == torch.float32 else 6e-2, rtol=1e-2)


@given(size=st.integers(1, 300), offset=st.integers(0, 31), density=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
@checked
def test_masked_columns_become_minus_infinity(instructions: str, size: int, offset: int, density: float) -> None:
    rng = np.random.default_rng(size)
    allowed = rng.random((2, -(-(offset + size) // 32) * 32)) < density
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    x = _random(5, size, dtype=torch.float32, seed=offset)
    x[3, size // 2] = torch.nan

    expected = x.clone()
    expected[[3, 0]] = expected[[3, 0]].masked_fill(~torch.from_numpy(allowed[:, offset : offset + size]), -torch.inf)
    by_torch = x.double()  # the kernels take float32
    mask_rows(x, [3, 0], words, offset)
    mask_rows(by_torch, [3, 0], words, offset)
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(by_torch.float(), expected, rtol=0, atol=0, equal_nan=True)


@given(rows=st.integers(1, 20), size=st.integers(1, 300), seed=st.integers(0, 99), nan=st.booleans())
@checked
def test_the_largest_of_rows_and_of_their_blocks_are_torchs(
    instructions: str, rows: int, size: int, seed: int, nan: bool
) -> None:
    x = _random(rows, size, dtype=torch.float32, seed=seed).mul(3).round()  # many ties: the first wins
    if nan:
        x[0, size // 2] = torch.nan
    x[-1] = -torch.inf
    values, places = argmax(x)
    padded = torch.nn.functional.pad(x, (0, -size % 32), value=-torch.inf)
    torch.testing.assert_close(
        block_maxima(x, 32), padded.view(rows, -1, 32).amax(dim=2), equal_nan=True, rtol=0, atol=0
    )
    for row in range(rows):
        first = int(x[row].isnan().nonzero()[0]) if x[row].isnan().any() else int((x[row] == x[row].max()).nonzero()[0])
        assert int(places[row]) == first
        assert torch.equal(values[row].isnan(), x[row, first].isnan())


@given(
    rows=st.integers(1, 12), size=st.integers(1, 700), spread=st.sampled_from([0.1, 3.0, 30.0]), seed=st.integers(0, 99)
)
@checked
def test_the_noisiest_is_the_largest_of_value_and_gumbel_noise(
    instructions: str, rows: int, size: int, spread: float, seed: int
) -> None:
    x = _random(rows, size, dtype=torch.float32, seed=seed) * spread
    temperature = torch.linspace(0.3, 2.0, rows).unsqueeze(1)
    seeds = torch.arange(rows).unsqueeze(1) * 2**40 - seed
    counter = (torch.arange(rows).unsqueeze(1) << 32) | seed
    scores = x / temperature + gumbel(seeds, counter + torch.arange(size))
    most, places = gumbel_argmax(x, temperature, seeds, counter)
    torch.testing.assert_close(most, scores.amax(dim=1), atol=1e-5, rtol=1e-5)
    # Another logarithm may be an ulp off, and decide between equals.
    torch.testing.assert_close(
        scores.gather(1, places.unsqueeze(1)), scores.amax(dim=1, keepdim=True), atol=1e-5, rtol=1e-5
    )
    x[0, size // 2] = torch.nan
    assert gumbel_argmax(x, temperature, seeds, counter)[0][0].isnan()


def test_several_threads_may_compute_at_once(instructions: str) -> None:
    cpu.set_threads(3)
    packed = pack(_random(256, 64, dtype=torch.float32, seed=0), 256)
    x = _random(50, 64, dtype=torch.float32, seed=1)
    expected = packed.linear(x, None)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            if not torch.equal(packed.linear(x, None), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def _compute_in_child(results: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    x = torch.ones(4, 64)
    results.put(float(pack(torch.ones(512, 64), 512).linear(x, None).sum()))


def test_a_forked_child_has_threads_of_its_own() -> None:
    cpu.set_threads(2)
    pack(torch.ones(512, 64), 512).linear(torch.ones(4, 64), None)  # the parent's threads run
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_compute_in_child, args=(results,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert results.get() == 4 * 512 * 64


def _compute() -> None:
    weight = _random(512, 64, dtype=torch.float32, seed=0)
    x = _random(4, 64, dtype=torch.float32, seed=1)
    _close(pack(weight.clone(), 512).linear(x, None), x.double() @ weight.double().T, torch.float32)


@pytest.fixture
def two_cpus() -> Iterator[tuple[int, int]]:
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        pytest.skip("only one CPU may be used here")
    yield allowed[0], allowed[1]
    cpu.set_threads(1)


def _pool_is_on(*cpus: int | str) -> bool:
    expected = sorted(map(str, cpus))
    return pool_cpus(expected) == expected


def test_the_pools_threads_run_on_the_cpus_they_are_given_and_the_caller_where_it_did(
    two_cpus: tuple[int, int],
) -> None:
    first, second = two_cpus
    before = os.sched_getaffinity(0)
    cpu.set_threads(2, [first, second])
    assert _pool_is_on(second)
    _compute()
    cpu.set_threads(4, [second, first, second, first])
    assert _pool_is_on(first, second, first)
    assert cpu.native.bound()
    _compute()
    assert _pool_is_on(first, second, first)
    assert os.sched_getaffinity(0) == before
    cpu.set_threads(2)
    _compute()
    assert _pool_is_on(format_cpu_list(before))
    assert not cpu.native.bound()


def test_a_cpu_that_is_refused_is_an_error_and_the_threads_go_on_unbound(two_cpus: tuple[int, int]) -> None:
    everywhere = format_cpu_list(os.sched_getaffinity(0))
    for wrong in (-1, 100_000):
        with pytest.raises(OSError, match="Invalid argument"):
            cpu.set_threads(3, [*two_cpus, wrong])
        assert cpu.native.threads() == 3
        assert not cpu.native.bound()
        _compute()
        assert _pool_is_on(everywhere, everywhere)
    with pytest.raises(ValueError, match="1 CPUs for 2 threads; give one for each"):
        cpu.set_threads(2, [two_cpus[0]])


def _threads_of_child(results: multiprocessing.SimpleQueue) -> None:  # type: ignore[type-arg]
    pack(torch.ones(512, 64), 512).linear(torch.ones(4, 64), None)  # torch's own products may hang after a fork
    everywhere = format_cpu_list(os.sched_getaffinity(0))
    results.put((cpu.native.bound(), _pool_is_on(everywhere)))


def test_a_forked_childs_threads_are_not_on_its_parents_cpus_alone(two_cpus: tuple[int, int]) -> None:
    cpu.set_threads(2, two_cpus)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_threads_of_child, args=(results,), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert results.get() == (False, True)


def test_bound_threads_move_a_weight_that_is_not_compressed_to_memory_they_touch_first(
    two_cpus: tuple[int, int],
) -> None:
    weight, x = _random(96, 64, dtype=torch.float32, seed=0), _random(5, 64, dtype=torch.float32, seed=1)
    cpu.set_threads(2)
    plain = pack(weight.clone(), 90)
    cpu.set_threads(2, two_cpus)
    source = weight.clone()
    moved = pack(source, 90)
    source.fill_(torch.nan)
    assert (plain.in_place, moved.in_place) == (True, False)
    assert moved.nbytes == plain.nbytes
    assert torch.equal(moved.linear(x, None), plain.linear(x, None))
    assert torch.equal(moved.look_up(torch.arange(90)), weight[:90])


def test_what_cannot_be_packed_is_refused() -> None:
    device = torch.device("cpu")
    assert row_multiple(64, torch.bfloat16, device) == cpu.PANEL
    assert row_multiple(63, torch.bfloat16, device) == row_multiple(64, torch.float16, device) == 1
    with pytest.raises(ValueError, match="multiple of 16 rows"):
        pack(torch.ones(17, 4), 17)
    with pytest.raises(ValueError, match=r"x is \(2, 5\)"):
        pack(torch.ones(16, 4), 16).linear(torch.ones(2, 5), None)
    with pytest.raises(ValueError, match="cannot run the kernels magic"):
        cpu.native.use_kernels("magic")


def test_missing_kernels_are_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(cpu, "_warned", False)
    with caplog.at_level(logging.WARNING, logger="phalanx"):
        cpu.warn_if_missing()
        cpu.warn_if_missing()
    assert len(caplog.records) == 1
    assert "C++ kernels are not built" in caplog.text
    assert not cpu.usable(torch.device("cpu"), torch.bfloat16)
    assert row_multiple(64, torch.bfloat16, torch.device("cpu")) == 1
    cpu.set_threads(2)


@given(
    rows=st.one_of(st.integers(1, 30), st.just(110)), n=st.integers(1, 70), k=st.integers(1, 180),
    kind=st.sampled_from(["int8", "w8a8", "int4"]), deterministic=st.booleans(), bias=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@checked
def test_a_quantized_weight_is_near_the_plain_one_and_multiplies_as_what_it_became(
    instructions: str, rows: int, n: int, k: int, kind: str, deterministic: bool, bias: bool, threads: int, seed: int
) -> None:
    cpu.set_threads(threads)
    k *= 8
    weight, x = _random(n, k, dtype=torch.bfloat16, seed=seed), _random(rows, k, dtype=torch.bfloat16, seed=seed + 1)
    b = _random(n, dtype=torch.bfloat16, seed=seed + 2) if bias else None
    padded = _padded(weight)
    padded[n:] = 0
    packed = pack(padded, n, kind, deterministic=deterministic)
    assert torch.equal(padded[:n], weight)
    # Few rows of x and many may be multiplied in two ways: with as many unit vectors.
    many = rows > cpu.native.MOST_INTEGER_ROWS
    vectors = torch.eye(k, dtype=torch.bfloat16)
    vectors = torch.cat([vectors, vectors.new_zeros(cpu.native.MOST_INTEGER_ROWS, k)]) if many else vectors
    at_once = len(vectors) if many else cpu.native.MOST_INTEGER_ROWS
    became = torch.cat([packed.linear_float(each) for each in vectors.split(at_once)])[:k]
    became = became.T.double()
    if kind == "int4":
        step = weight.double().abs().amax() / 7
        assert (became - weight.double()).abs().mean() <= 0.15 * weight.double().abs().mean()
    else:
        step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    # Tiles multiply numbers times scales as bfloat16: half a unit of its 8 bits more.
    bound = {"int8": 1.05 if many and not deterministic else 0.54, "w8a8": 0.52, "int4": 4}[kind]
    assert ((became - weight.double()).abs() <= bound * step).all()
    product = x.double() @ became.T
    # x keeps 16 bits, 8 in w8a8; its largest element sets the step.
    loss = {"int8": 1e-3, "w8a8": 2e-2, "int4": 1e-5}[kind]
    size = float(x.double().norm(dim=1).max() * became.norm(dim=1).max())
    assert (packed.linear_float(x).double() - product).abs().max() <= loss * size
    total = torch.ones(rows, n)
    packed.add_to(total, x, b)
    expected = 1 + product + (0 if b is None else b.double())
    assert (total.double() - expected).abs().max() <= loss * size + 1e-5


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_rows_are_looked_up_in_a_weight_of_8_bits(instructions: str, kind: str) -> None:
    weight = _random(40, 24, dtype=torch.bfloat16, seed=3)
    padded = _padded(weight)
    padded[40:] = 0
    found = pack(padded, 40, kind).look_up(torch.tensor([39, -1, 0, 40, 7]))
    step = weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert not found[[1, 3]].any()
    places = [39, 0, 7]
    assert ((found[[0, 2, 4]].float() - weight[places].float()).abs() <= 0.5 * step[places] + 0.02).all()


def test_scales_of_8_bits_leave_less_error_than_the_largest_numbers(instructions: str) -> None:
    weight = _random(64, 512, dtype=torch.bfloat16, seed=5)
    packed = pack(_padded(weight), 64, "int8", deterministic=True)
    became = packed.linear_float(torch.eye(512, dtype=torch.bfloat16)).T.double()
    groups = weight.double().view(-1, 32)
    step = groups.abs().amax(dim=1, keepdim=True) / 127
    plain = (groups - (groups / step).round() * step).square().sum()
    assert (became.reshape(-1, 32) - groups).square().sum() <= 0.83 * plain


@pytest.mark.parametrize("kind", ["int8", "w8a8", "int4"])
@pytest.mark.parametrize("size", [1e-40, 2e-38, 1e-36, 1e-30, 1e25])
def test_numbers_near_the_ends_of_floats_are_quantized_to_what_is_near_them(
    instructions: str, kind: str, size: float
) -> None:
    weight = _random(16, 64, dtype=torch.float32, seed=6).clamp(-1, 1).mul(size).bfloat16()
    x = _random(2, 64, dtype=torch.bfloat16, seed=7).clamp(-1, 1)
    found = pack(_padded(weight), 16, kind).linear_float(x).double()
    # A scale that is no normal float has no inverse: what it would stand for becomes 0.
    loss = 64 * (0.15 * weight.double().abs().amax() + 127 * torch.finfo(torch.float32).tiny)
    assert (found - x.double() @ weight.double().T).abs().max() <= loss


def test_what_cannot_be_quantized_is_refused_with_the_setting() -> None:
    for weight, kind in ((torch.ones(16, 6, dtype=torch.bfloat16), "int8"), (torch.ones(16, 8), "int4")):
        with pytest.raises(ValueError, match=rf"quantization={kind} needs bfloat16.*quantization=none"):
            pack(weight, 16, kind)
    with pytest.raises(ValueError, match="4 bits"):
        pack(torch.ones(16, 8, dtype=torch.bfloat16), 16, "int4").look_up(torch.tensor([0]))


@pytest.mark.parametrize("kind", ["none", "int8", "w8a8", "int4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 5, 18])
def test_what_is_not_finite_stays_so_in_its_own_row(instructions: str, kind: str, value: float, rows: int) -> None:
    packed = pack(_random(32, 64, dtype=torch.bfloat16, seed=0), 32, kind)
    x = _random(rows, 64, dtype=torch.bfloat16, seed=1)
    x[0, 20] = value
    found = packed.linear_float(x)
    assert not found[0].isfinite().any()
    assert found[1:].isfinite().all()


def test_without_columns_nothing_is_largest() -> None:
    numbers = torch.ones(2, 1, dtype=torch.int64)
    noisy = gumbel_argmax(torch.empty(2, 0), torch.ones(2, 1), numbers, numbers)
    for found in (argmax(torch.empty(2, 0)), noisy):
        assert found[0].tolist() == [-torch.inf] * 2
