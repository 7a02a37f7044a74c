"""Sums in memory that GPUs share, over a stand-in for it: which way is taken, on whose word, and what without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.config import EngineConfig
from phalanx.engine.errors import ConfigError
from phalanx.launch.ranks.rank_info import RankInfo
from phalanx.launch.ranks.session import join
from phalanx.parallel.collectives.autotune_table import Threshold
from phalanx.parallel.collectives.peer_memory import check_reach
from phalanx.tests.parallel.collectives import symmetric_memory_programs as programs

RunRanks = Callable[..., list[Any]]


@pytest.mark.parametrize("size", [2, 3])
def test_each_message_goes_the_way_its_size_and_dtype_say_and_sums_up(
    run_ranks: RunRanks, tmp_path: Path, size: int
) -> None:
    run_ranks(size, programs.sums, str(tmp_path))


@pytest.mark.parametrize("size", [2, 3])
def test_fused_sums_among_others_are_right_and_the_same_on_every_rank(
    run_ranks: RunRanks, tmp_path: Path, size: int
) -> None:
    pytest.importorskip("triton")
    run_ranks(size, programs.fused, str(tmp_path))


def test_rank_0_decides_by_the_slowest_rank_and_all_go_by_its_tables(run_ranks: RunRanks, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    results = run_ranks(2, programs.tuned, str(tmp_path))
    assert results[0][:2] == results[1][:2]
    sums, norms, logged = results[0]
    # Rows of 128 bytes; a part of the buffer holds 32. From the third row count on, rank 1 is slow at one_shot.
    assert sums == (Threshold(256, "one_shot"), Threshold(4096, "two_shot"))
    assert norms == (Threshold(4096, "fused"),)
    assert logged == [
        "all-reduce: one_shot up to 256 bytes, two_shot up to 4,096 bytes, process group above",
        "all-reduce and norm: fused up to 4,096 bytes, unfused above",
    ]
    assert results[1][2] == []


def test_all_ranks_hear_the_same_reason_why_there_is_no_symmetric_memory(run_ranks: RunRanks) -> None:
    told, *others = run_ranks(3, programs.unavailable)
    assert all(other == told for other in others)
    assert told["a CPU"] == "rank 0 of 3: symmetric memory is of GPUs, not of cpu"
    assert "rank 0 of 3: the GPU of rank 1 is not visible to it" in told["a GPU that rank 0 does not see"]
    assert "rank 0 of 3: GPU 0 has no native atomic operations in the memory of GPU 1" in told["GPUs on PCIe"]
    assert told["no allocator"].startswith("rank 0 of 3: ")
    assert told["one rank's failure"] == "rank 2 of 3: no fabric"
    assert told["two hosts"] == "rank 1 of 3 is on another host than rank 0"


def test_what_one_rank_cannot_do_none_does(run_ranks: RunRanks) -> None:
    assert run_ranks(2, programs.common_algorithms) == [("one_shot", "two_shot")] * 2


def test_auto_does_without_and_says_so_once_but_what_is_asked_for_by_name_must_be(run_ranks: RunRanks) -> None:
    reason = "rank 0 of 2: symmetric memory is of GPUs, not of cpu"
    results = run_ranks(2, programs.fall_back)
    assert [records for records, _ in results] == [
        [f"ranks talk over NCCL alone, which is slower for small messages: {reason}"],
        [],
    ]
    assert [raised for _, raised in results] == [reason] * 2


def test_ranks_that_share_a_gpu_or_have_no_nccl_go_by_the_host_unless_nccl_was_asked_for(run_ranks: RunRanks) -> None:
    reasons = ["ranks 0 and 1 of 3 share a GPU, and NCCL needs one for each", "their process group has no NCCL"]
    logged = [f"ranks send tensors by way of the host, which is slow: {reason}" for reason in reasons]
    answers = [True, False, True]
    first, *others = run_ranks(3, programs.by_host)
    assert first == (answers, logged, reasons)
    assert others == [(answers, [], reasons)] * 2


def test_a_rank_needs_to_see_and_reach_every_other_gpu_but_its_own() -> None:
    check_reach([7, 8, 7], 0, {7: 0, 8: 1}, lambda source, target: (source, target) == (0, 1))
    with pytest.raises(RuntimeError, match="GPU 1 has no native atomic operations in the memory of GPU 0"):
        check_reach([7, 8, 7], 1, {7: 0, 8: 1}, lambda source, target: False)
    with pytest.raises(RuntimeError, match=r"the GPU of rank 1 is not visible to it \(CUDA_VISIBLE_DEVICES\)"):
        check_reach([7, 8], 0, {7: 0}, lambda source, target: True)


@pytest.mark.parametrize("collectives", ["nccl", "symmetric_memory"])
def test_what_gpus_alone_can_do_is_refused_on_a_cpu(collectives: str) -> None:
    config = EngineConfig(model="m", device="cpu", ranks=2, collectives=collectives)
    with pytest.raises(ConfigError, match=f"collectives={collectives} needs device=cuda"):
        join(config, RankInfo(size=2, local_size=2, launched=True))
