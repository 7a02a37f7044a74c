"""Collectives and the control channel in shared memory, between real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.lab.traces import Traces
from phalanx.parallel.collectives import shared_memory
from phalanx.tests.parallel.collectives import programs as rank_programs
from phalanx.tests.parallel.collectives import shared_memory_programs as programs
from phalanx.tests.ranks import rank_processes, start_ranks

RunRanks = Callable[..., list[Any]]

pytestmark = pytest.mark.skipif(shared_memory.unavailable() is not None, reason=str(shared_memory.unavailable()))


@contextmanager
def _started(size: int, program: Callable[..., None], *args: Any) -> Iterator[list[BaseProcess]]:
    """Ranks that will not end in order, so that nobody waits for their results."""
    with rank_processes() as context:
        processes, _ = start_ranks(context, size, program, *args)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sums_are_those_in_rank_order_for_every_dtype_and_length(run_ranks: RunRanks, size: int) -> None:
    run_ranks(size, programs.sums)


@pytest.mark.parametrize("size", [2, 3])
def test_the_address_given_to_kernels_adds_the_same_sums(run_ranks: RunRanks, size: int) -> None:
    run_ranks(size, programs.reducer)


def test_sixteen_bit_floats_round_as_torch_rounds_them(run_ranks: RunRanks) -> None:
    run_ranks(3, programs.special_values)


def test_every_operation_takes_any_shape_and_dtype(run_ranks: RunRanks) -> None:
    run_ranks(3, programs.shapes)


def test_mixed_operations_give_the_same_bits_on_every_rank_and_in_every_run(run_ranks: RunRanks) -> None:
    first = run_ranks(3, programs.mixed, 5, 1000)
    second = run_ranks(3, programs.mixed, 5, 1000)
    assert len(set(first + second)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4, 8])
def test_thousands_of_mixed_operations_are_right_at_any_number_of_ranks(run_ranks: RunRanks, size: int) -> None:
    assert len(set(run_ranks(size, programs.mixed, size, 6000))) == 1
    run_ranks(size, programs.hammer, 50_000)


def test_ranks_that_outnumber_the_cores_make_progress(run_ranks: RunRanks) -> None:
    assert len(set(run_ranks(6, programs.hammer, 500))) == 1


def test_control_messages_of_any_length_arrive_whole_and_in_order(run_ranks: RunRanks) -> None:
    messages = [b"", b"x", bytes(range(256)) * 64, bytes(16385), b"long" * 100_000, os.urandom(5_000_001), b"", b"end"]
    assert run_ranks(3, programs.control, messages) == [[], messages, messages]


def test_rank_0_runs_ahead_of_those_that_receive(run_ranks: RunRanks) -> None:
    assert run_ranks(2, programs.run_ahead, 20_000) == [20_000, 20_000]


def test_a_rank_that_waits_for_a_message_sleeps_and_lets_its_threads_run(run_ranks: RunRanks) -> None:
    assert run_ranks(2, programs.idle_receiver)[1] < 0.2


def test_where_proc_is_closed_the_segment_is_named_only_while_it_is_opened(run_ranks: RunRanks) -> None:
    assert run_ranks(3, programs.by_name) == [[], [], []]


def test_ranks_that_cannot_share_memory_all_hear_why(run_ranks: RunRanks) -> None:
    for reasons in run_ranks(2, programs.cannot_share):
        assert "rank 1 of 2: the extension phalanx.parallel.collectives._native cannot be imported" in reasons[0]
        assert reasons[1] == "rank 1 of 2 is on another host than rank 0"
        assert reasons[2] == "rank 1 of 2: cannot map the segment"
        assert len(reasons) == 3


def test_each_rank_allocates_what_it_writes_to_and_together_they_have_it_all(run_ranks: RunRanks) -> None:
    rings, collectives = zip(*run_ranks(3, programs.allocate), strict=True)
    assert [len(ring) for ring in rings] == [1, 0, 0]
    parts = [part for [part] in collectives]
    assert parts[0][0] == 0
    assert [last for _, last in parts[:-1]] == [first for first, _ in parts[1:]]
    assert parts[1][1] - parts[1][0] == parts[2][1] - parts[2][0] == 2 * shared_memory._BUFFER_BYTES


def test_ranks_that_are_bound_to_cpus_of_their_own_count_them_all(run_ranks: RunRanks) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert run_ranks(2, programs.count_cores) == [[allowed, 1, min(2, allowed)]] * 2


def test_the_rank_that_the_others_wait_for_has_waited_least(run_ranks: RunRanks) -> None:
    for before, after in run_ranks(3, rank_programs.wait_for_a_late_rank, 1):
        assert before == [0.0] * 3
        assert min(after) == after[1]
        assert min(after[0], after[2]) >= 0.25


def test_every_rank_hears_every_ranks_text(run_ranks: RunRanks) -> None:
    assert run_ranks(3, programs.say) == [["", "zwei Kerne", "ένας κόμβος"]] * 3


def test_ranks_out_of_step_are_told_what_happened(run_ranks: RunRanks) -> None:
    zero, one = run_ranks(2, programs.misuse)
    disagreed = "rank 1 called another operation, or with another size or dtype"
    assert zero[0] == f"CollectiveError: rank 0 of 2: all_reduce failed: {disagreed}"
    assert one[0].startswith("CollectiveError: rank 1 of 2: all_reduce failed: rank 0 ")
    assert zero[1].endswith("barrier failed: an earlier operation failed on this rank")
    assert zero[2].endswith("barrier failed: it is closed here")
    assert one[3].endswith("barrier failed: rank 0 has closed its end")
    assert zero[4].endswith("barrier failed: rank 1 has not come within timeout_s=0.5")
    assert zero[5].startswith("KeyboardInterrupt")
    assert one[4].endswith("barrier failed: rank 0 gave up after an error of its own")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_all_others_soon(tmp_path: Path, victim: int) -> None:
    with _started(3, programs.lose_a_rank, str(tmp_path), victim) as processes:
        for process in processes:
            process.join(60)
    killed = float((tmp_path / "killed").read_text())
    for rank in {0, 1, 2} - {victim}:
        notes = (tmp_path / str(rank)).read_text().splitlines()
        at, said = notes[0].split(" ", 1)
        assert said == f"rank {rank} of 3: all_reduce failed: rank {victim} has died"
        assert float(at) - killed < 5
        # Rank 0 looks after all; the others hear of a follower's death through their next collective, of rank 0's here.
        operation = "send" if rank == 0 else "receive"
        assert f"rank {rank} of 3: {operation} failed: rank {victim if rank == 0 else 0} " in notes[1]


def test_nothing_is_left_when_all_ranks_are_killed(tmp_path: Path) -> None:
    traces = Traces()
    with _started(2, programs.wait_for_death, str(tmp_path)) as processes:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        files = [os.path.realpath(file) for process in processes for file in Path(f"/proc/{process.pid}/fd").iterdir()]
        assert sum("memfd:phalanx" in file for file in files) == 4
    # The test's own queue may hold names there; a segment never does.
    assert traces.shared_memory() == set()


def test_ranks_that_were_all_stopped_for_long_go_on(tmp_path: Path) -> None:
    with _started(2, programs.talk, str(tmp_path)) as processes:
        pids = [process.pid for process in processes if process.pid is not None]
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)
        for pid in reversed(pids):  # the receiver first
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.4)
        (tmp_path / "end").touch()
        for process in processes:
            process.join(60)
    assert {"done0", "done1"} <= set(os.listdir(tmp_path))
