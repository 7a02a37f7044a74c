"""The machine's rates: what is made of repeats, and that the C++ kernels measure what they say."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from phalanx.benchmarks.lab import rates
from phalanx.benchmarks.lab.rates import BUSY_ABOVE, ONE_THREAD, Limits, Rate, limits_from, measure_now, rate_of
from phalanx.kernels import cpu

MEASURED = (
    "read_gb_s",
    "l1_read_gb_s",
    "l2_read_gb_s",
    "vectors_bf16_gflops",
    "tiles_bf16_gflops",
    "bf16_matmul_gflops",
    "tiles_int8_gflops",
    "int8_matmul_gflops",
)
built = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")


def machine(cpu_share: float = 1.0, **best: float | None) -> Limits:
    """Limits made of rates by name, without a suffix those of all threads; others are not there."""
    measured: dict[str, Rate | None] = {}
    for name in MEASURED:
        for suffix, share in (("", 1.0), (ONE_THREAD, 0.5)):
            value = best.get(name)
            measured[name + suffix] = None if value is None else Rate(share * value, 0.02, 6)
    return limits_from(measured, threads=2, cpu_share=cpu_share)


def test_a_rate_is_the_best_repeat_and_says_how_far_below_it_the_median_is() -> None:
    rate = rate_of([20e9, 25e9, 10e9])
    assert rate == Rate(best=25.0, apart=0.2, repeats=3)
    assert str(rate) == "25.0 (3 repeats, 20% apart)"
    assert rate_of([]) is None


def test_the_limit_of_arithmetic_is_the_best_of_vectors_tiles_and_torch() -> None:
    found = machine(read_gb_s=25, vectors_bf16_gflops=400, tiles_bf16_gflops=4000, bf16_matmul_gflops=900)
    assert (found.bf16_gflops, found.bf16_gflops_one_thread) == (4000, 2000)
    assert found.int8_gflops is found.tiles_int8_gflops is None
    assert found.gflops(int8=True) == found.gflops(int8=False) == 4000
    assert machine(read_gb_s=25, vectors_bf16_gflops=400, bf16_matmul_gflops=450).bf16_gflops == 450
    for vectors, both in ((400, 400), (4, 9)):
        found = machine(read_gb_s=25, vectors_bf16_gflops=vectors, tiles_int8_gflops=9, int8_matmul_gflops=7)
        assert (found.int8_gflops, found.gflops(int8=True)) == (9, both)
    with pytest.raises(ValueError, match="neither"):
        machine(read_gb_s=25)


def test_a_machine_whose_repeats_are_far_apart_is_said_to_be_busy() -> None:
    quiet = machine(read_gb_s=25.1, vectors_bf16_gflops=400)
    assert "read_gb_s: 25.1 (6 repeats, 2% apart)" in quiet.lines()
    assert "tiles_bf16_gflops: None" in quiet.lines()
    assert "busy" not in "".join(quiet.lines())
    values = asdict(quiet)
    values["apart"] = {**values["apart"], "read_gb_s": BUSY_ABOVE + 0.01}
    busy = Limits(**values)
    assert busy.unsteady == ["read_gb_s"]
    assert busy.lines()[-1].startswith("the machine is busy: medians are more than 10% below the best repeats of read")


def test_a_machine_whose_cores_others_use_is_busy_however_close_the_repeats_are() -> None:
    found = machine(cpu_share=0.55, read_gb_s=25, vectors_bf16_gflops=400)
    assert found.lines()[-1] == "the machine is busy: others took 45% of the cores' time"
    assert "busy" not in "".join(machine(cpu_share=0.95, read_gb_s=25, vectors_bf16_gflops=400).lines())


def test_limits_are_plain_data() -> None:
    found = machine(read_gb_s=25, vectors_bf16_gflops=400)
    assert Limits(**json.loads(json.dumps(asdict(found)))) == found


@built
def test_the_kernels_measure_every_pattern_of_reading_in_turn() -> None:
    found = cpu.native.read_rate(100_000, 0.0)
    assert set(found) == {"one stream", "one stream, prefetched", "four streams"}
    assert {len(repeats) for repeats in found.values()} == {3}
    assert all(rate > 0 for repeats in found.values() for rate in repeats)


@built
@pytest.mark.parametrize(("name", "arguments"), [("cache_rate", (1,)), ("cache_rate", (2,)), ("multiply_rate", (10,))])
def test_the_kernels_return_every_repeat(name: str, arguments: tuple[int, ...]) -> None:
    found = getattr(cpu.native, name)(*arguments, 0.0)
    assert len(found) == 3
    assert min(found) > 0


@built
def test_there_is_no_third_cache_to_measure() -> None:
    with pytest.raises(ValueError, match="1 or 2"):
        cpu.native.cache_rate(3, 0.0)


@built
@pytest.mark.parametrize("int8", [False, True])
def test_tiles_have_a_rate_where_there_are_tiles(int8: bool) -> None:
    chosen = cpu.native.kernels()
    cpu.native.use_kernels("portable")
    try:
        assert cpu.native.tile_rate(int8, 10) == []
    finally:
        cpu.native.use_kernels(chosen)
    assert all(rate > 0 for rate in cpu.native.tile_rate(int8, 10))


@built
def test_the_rates_of_now_are_those_of_memory_and_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "NOW_GIB", 0.001)
    monkeypatch.setattr(rates, "NOW_S", 0.0)
    found = measure_now()
    assert found["read_gb_s"] > 0
    assert 0 < found["cpu_share"] <= 1
    assert set(found) - {"read_gb_s", "cpu_share"} in (set(), {"bf16_gflops", "int8_gflops"})


def test_without_the_kernels_torch_reads_and_nothing_is_said_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "native", None)
    assert measure_now() == {}
    found = rates.read_rate(0.0, 0.001, 1)
    assert found is not None
    assert found.best > 0
