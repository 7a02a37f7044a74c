"""Which way is taken for a message of which size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx.parallel.collectives.autotune_table import (
    HYSTERESIS,
    Threshold,
    choose_algorithms,
    describe,
    look_up,
    make_table,
    row_ladder,
    slowest,
)

WAYS = ("nccl", "one_shot", "two_shot", "multimem")
TIMES = st.dictionaries(
    st.integers(1, 2**30),
    st.dictionaries(st.sampled_from(WAYS), st.floats(1e-6, 1e-2), min_size=1),
    max_size=12,
)


@given(TIMES)
def test_a_table_rises_and_names_for_each_measured_size_a_way_that_can_and_is_nearly_the_fastest(
    times: dict[int, dict[str, float]],
) -> None:
    table = choose_algorithms(times)
    bounds = [threshold.max_bytes for threshold in table]
    assert bounds == sorted(set(bounds))
    assert all(a.algorithm != b.algorithm for a, b in itertools.pairwise(table))
    assert set(bounds) <= set(times)
    for size, measured in times.items():
        chosen = look_up(table, size, "none")
        assert measured[chosen] * (1 - HYSTERESIS) <= min(measured.values())


@given(TIMES, st.integers(0, 2**31))
def test_a_message_between_two_sizes_goes_as_the_larger_and_one_above_all_as_nothing_was_measured(
    times: dict[int, dict[str, float]], size: int
) -> None:
    table = choose_algorithms(times)
    larger = [measured for measured in times if measured >= size]
    assert look_up(table, size, "default") == (look_up(table, min(larger), "") if larger else "default")


def test_the_latency_of_each_way_decides_for_small_messages_and_its_bandwidth_for_large_ones() -> None:
    times = {
        size: {
            "one_shot": 4e-6 + size / 50e9,
            "two_shot": 7e-6 + size / 200e9,
            "nccl": 15e-6 + size / 300e9,
        }
        for size in (2**i for i in range(10, 26))
    }
    table = choose_algorithms(times)
    assert [threshold.algorithm for threshold in table] == ["one_shot", "two_shot", "nccl"]
    assert look_up(table, 2**10, "nccl") == "one_shot"
    assert look_up(table, 2**20, "nccl") == "two_shot"
    assert look_up(table, 2**25, "nccl") == "nccl"


def test_a_difference_within_the_noise_does_not_change_the_way() -> None:
    noisy = {100: {"a": 1.0, "b": 1.02}, 200: {"a": 1.03, "b": 1.0}, 400: {"a": 1.0, "b": 1.01}}
    assert choose_algorithms(noisy) == (Threshold(400, "a"),)
    assert choose_algorithms(noisy, hysteresis=0.0) == (Threshold(100, "a"), Threshold(200, "b"), Threshold(400, "a"))


def test_a_way_that_cannot_do_a_size_is_not_taken_for_it() -> None:
    times = {100: {"a": 1.0, "b": 5.0}, 200: {"b": 5.0, "c": 4.9}, 400: {"a": 1.0, "b": 5.0, "c": 4.9}}
    assert choose_algorithms(times) == (Threshold(100, "a"), Threshold(200, "c"), Threshold(400, "a"))


def test_nothing_measured_is_an_empty_table() -> None:
    assert choose_algorithms({}) == ()
    assert look_up((), 1, "nccl") == "nccl"


@pytest.mark.parametrize("measured", [{}, {"a": -1.0}, {"a": 1.0, "b": float("nan")}])
def test_a_size_without_a_time_or_with_an_impossible_one_is_refused(measured: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="512 bytes took"):
        choose_algorithms({512: measured})


def test_neighbours_of_one_way_are_one_threshold() -> None:
    assert make_table({4: "b", 1: "a", 2: "a", 8: "a"}) == (Threshold(2, "a"), Threshold(4, "b"), Threshold(8, "a"))


@pytest.mark.parametrize(
    ("max_rows", "ladder"), [(0, []), (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_rows_are_measured_in_powers_of_two_and_at_the_limit(max_rows: int, ladder: list[int]) -> None:
    assert row_ladder(max_rows) == ladder


def test_the_last_rank_to_be_done_counts() -> None:
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]


def test_a_table_reads_as_a_sentence() -> None:
    assert describe((Threshold(2048, "a"), Threshold(65536, "b")), "c") == (
        "a up to 2,048 bytes, b up to 65,536 bytes, c above"
    )
