"""Collectives and the control channel between real processes, over gloo and in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx.parallel.collectives.local import LocalCollectives, LocalControl
from phalanx.parallel.group import local_group
from phalanx.tests.parallel.collectives import programs
from phalanx.tests.ranks import rank_processes, start_ranks

RunRanks = Callable[..., list[Any]]


WAYS = ["gloo", "shared_memory"]


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [2, 3])
def test_every_operation_gives_every_rank_what_it_promises(
    run_ranks: RunRanks, size: int, way: str, staged: bool
) -> None:
    results = run_ranks(size, programs.exchange, way, staged)
    assert [result["gathered"] for result in results[:-1]] == [None] * (size - 1)
    assert results[-1]["gathered"] == [[rank, 2**40 + rank] for rank in range(size)]
    assert all(result["broadcast"] == [size - 1.0] * 3 for result in results)


@pytest.mark.parametrize("way", WAYS)
def test_control_messages_of_any_length_arrive_whole_and_in_order(run_ranks: RunRanks, way: str) -> None:
    messages = [b"", b"x", bytes(range(256)) * 64, bytes(16384), bytes(16385), b"long" * 100_000, b"end"]
    assert run_ranks(3, programs.control, messages, way) == [[], messages, messages]


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_dies_is_noticed_by_the_others_with_rank_and_operation(tmp_path: Path, way: str) -> None:
    with rank_processes() as context:
        processes, _ = start_ranks(context, 3, programs.lose_a_rank, str(tmp_path), way)
    for process in processes:
        process.join(60)
    for rank in range(2):
        assert f"rank {rank} of 3: all_reduce failed" in (tmp_path / str(rank)).read_text()


@pytest.mark.parametrize(
    ("way", "host", "control", "words"),
    [
        ("gloo", "gloo", "BroadcastControl", "over gloo, whose sockets listen: collectives=gloo asks for it"),
        ("auto", "SharedMemoryCollectives", "SharedMemoryControl", "in memory that the ranks share"),
    ],
)
def test_plans_and_small_cpu_tensors_go_over_gloo_or_in_shared_memory(
    run_ranks: RunRanks, way: str, host: str, control: str, words: str
) -> None:
    assert run_ranks(2, programs.hosts, way) == [(host, control, f"plans and CPU tensors travel {words}")] * 2


def test_ranks_that_cannot_share_memory_say_why_they_need_sockets(run_ranks: RunRanks) -> None:
    for host, control, words in run_ranks(2, programs.hosts_where_memory_cannot_be_shared):
        assert (host, control) == ("gloo", "BroadcastControl")
        assert "over gloo, whose sockets listen: rank 1 of 2: the extension" in words


def test_a_group_of_gpus_alone_carries_small_cpu_tensors_too(run_ranks: RunRanks) -> None:
    sums, theirs = [1, 2**41], [1, 2**40]
    assert run_ranks(2, programs.by_way_of_a_device) == [
        [sums, theirs, None],
        [sums, theirs, [[0, 2**40], theirs]],
    ]


def test_ranks_on_a_cpu_cannot_ask_for_nccl(run_ranks: RunRanks) -> None:
    with pytest.raises(AssertionError, match="CollectivesUnavailable: NCCL carries tensors of GPUs only"):
        run_ranks(2, programs.hosts, "nccl")


def test_a_group_of_one_needs_nobody() -> None:
    group = local_group(torch.device("cpu"))
    x = torch.ones(3)
    assert group.collectives.all_reduce(x) is x
    assert group.collectives.gather(x) == [x]
    assert isinstance(group.collectives, LocalCollectives)
    assert isinstance(group.control, LocalControl)
    group.close()


@pytest.mark.slow
def test_a_rank_reads_its_shard_and_holds_little_more_while_it_loads(run_ranks: RunRanks, tmp_path: Path) -> None:
    from phalanx.launch.cli.presets import load_preset
    from phalanx.launch.model_files.random_model import make_random_model

    folder = make_random_model(tmp_path / "model", load_preset("qwen2_5_0_5b")["shape"])
    for size in (1, 2, 3):
        for loaded in run_ranks(size, programs.load, str(folder)):
            assert loaded["read"] <= 1.05 * loaded["shard"]
            assert loaded["rise"] <= loaded["shard"] + 300e6
            # The KV pool of this test is 1 MiB, and a tied head is no second copy.
            assert loaded["shard"] < 1.1 * 2 * 494e6 / size
