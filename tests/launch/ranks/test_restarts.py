"""When a group is started again, and how one that hangs is told from one that is slow."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.engine.client.group_failure import GroupState, read_state, write_whole
from phalanx.engine.execution.heartbeat import BEATS_FILE, Beat, BeatsReader, Heartbeat, make_beats_file
from phalanx.launch.ranks.hang_watch import HangWatch, Sight, Stall
from phalanx.launch.ranks.restarts import Restarts


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


# -- restarts


def test_a_group_is_started_again_at_once_then_later_and_later_then_no_more(clock: _Clock) -> None:
    restarts = Restarts(4, 600.0, clock)
    assert [restarts.pause_s("SIGKILL", was_ready=True) for _ in range(5)] == [0.0, 0.5, 1.0, 2.0, None]
    assert restarts.count == 4
    clock.now += 601
    assert restarts.pause_s("SIGKILL", was_ready=True) == 0.0


def test_what_would_fail_again_is_not_tried_again(clock: _Clock) -> None:
    restarts = Restarts(4, 600.0, clock)
    assert restarts.pause_s("CheckpointError", was_ready=True) is None
    assert restarts.pause_s("ConfigError", was_ready=True) is None
    assert restarts.pause_s("SIGKILL", was_ready=False) is None  # the first start is its user's to judge
    assert restarts.pause_s("SIGKILL", was_ready=True) == 0.0
    assert restarts.pause_s("SIGKILL", was_ready=False) is not None  # while it was started again


def test_what_the_supervisor_says_is_read_whole(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    state = GroupState("stalled", "rank 1 is stopped", 2)
    write_whole(tmp_path / "state.json", state)
    assert read_state(tmp_path) == state


# -- heartbeats


def test_a_rank_tells_its_phase_and_its_step(tmp_path: Path, clock: _Clock) -> None:
    path = tmp_path / BEATS_FILE
    make_beats_file(path, 2)
    reader = BeatsReader(path, 2)
    heartbeat = Heartbeat(path, 1, clock)
    heartbeat.shares(7)
    heartbeat.step(12, 64)
    heartbeat.phase("compute")
    assert reader.read() == [Beat(0, "starting", 0, 0.0, 0), Beat(12, "compute", 64, 1000.0, 7)]
    reader.close()
    Heartbeat(tmp_path / "none").phase("compute")  # nobody looks


# -- hangs


def _sight(*phases: str, step: int = 5, tokens: int = 4, flags: tuple[int, ...] = (), **more: object) -> Sight:
    beats = [Beat(step, phase, tokens, 0.0, -1) for phase in phases]
    values: dict[str, object] = {"stopped": (), "starved_s": [0.0] * len(phases), **more}
    return Sight(beats, flags, **values)  # type: ignore[arg-type]


def _look_for(watch: HangWatch, clock: _Clock, sight: Sight, seconds: float) -> Stall | None:
    """Look ten times a second, until it is a stall or the time has passed."""
    for _ in range(round(10 * seconds)):
        clock.now += 0.1
        if (stall := watch.look(sight)) is not None:
            return stall
    return None


@pytest.fixture
def watch(clock: _Clock) -> HangWatch:
    watch = HangWatch(2.0, 60.0, clock)
    watch.look(_sight("wait", "compute", step=3))
    watch.look(_sight("wait", "compute", step=4))
    return watch


def test_a_group_that_does_not_get_on_hangs_and_the_rank_furthest_behind_is_named(
    watch: HangWatch, clock: _Clock
) -> None:
    sight = _sight("wait", "compute", flags=(9, 8))
    assert _look_for(watch, clock, sight, 1.9) is None
    stall = _look_for(watch, clock, sight, 0.5)
    assert stall is not None
    assert stall.rank == 1
    assert "rank 1 does not get on" in stall.why
    assert not stall.stopped
    assert "rank 0: 'wait' of step 5 (4 tokens), after 9 sums" in stall.why


def test_flags_count_on_beyond_32_bits(watch: HangWatch, clock: _Clock) -> None:
    stall = _look_for(watch, clock, _sight("wait", "compute", flags=(2**32 - 1, 0)), 3)
    assert stall is not None
    assert stall.rank == 0


def test_a_stopped_rank_is_named_also_when_nothing_is_due(watch: HangWatch, clock: _Clock) -> None:
    assert _look_for(watch, clock, _sight("waiting", "waiting"), 100) is None
    stall = _look_for(watch, clock, _sight("waiting", "waiting", stopped=(1,)), 3)
    assert stall is not None
    assert stall.rank == 1
    assert "rank 1 is stopped" in stall.why
    assert stall.stopped


def test_one_more_sum_of_any_rank_is_progress(watch: HangWatch, clock: _Clock) -> None:
    for number in range(100):
        assert _look_for(watch, clock, _sight("wait", "compute", flags=(number, number)), 1.5) is None


def test_ranks_that_get_no_core_do_not_hang(watch: HangWatch, clock: _Clock) -> None:
    for tick in range(190):  # for nine tenths of the time others have the cores
        assert _look_for(watch, clock, _sight("wait", "compute", starved_s=(50.0, 0.09 * tick)), 0.1) is None


def test_a_machine_that_holds_up_the_watch_too_counts_little(watch: HangWatch, clock: _Clock) -> None:
    watch.look(_sight("wait", "compute"))
    clock.now += 30
    assert watch.look(_sight("wait", "compute")) is None


def test_a_long_step_has_time_by_its_tokens(watch: HangWatch, clock: _Clock) -> None:
    # Seen: 100 tokens in 1.5 s. Of 2,000 tokens all may come at once.
    assert _look_for(watch, clock, _sight("wait", "compute", tokens=100), 1.5) is None
    watch.look(_sight("wait", "compute", step=6, tokens=2000, flags=(1, 1)))
    assert _look_for(watch, clock, _sight("wait", "compute", step=6, tokens=2000, flags=(1, 1)), 30) is None
    # Never longer than ranks wait for one another.
    assert _look_for(watch, clock, _sight("wait", "compute", step=6, tokens=2000, flags=(1, 1)), 40) is not None


def test_the_first_step_of_its_size_is_not_judged_where_sums_cannot_be_seen(watch: HangWatch, clock: _Clock) -> None:
    assert _look_for(watch, clock, _sight("wait", "compute", tokens=500), 59) is None
    assert _look_for(watch, clock, _sight("wait", "compute", tokens=500), 2) is not None


def test_a_start_that_does_not_get_on_is_a_hang_of_the_rank_that_has_come_least_far(clock: _Clock) -> None:
    watch = HangWatch(2.0, 60.0, clock)
    met = _sight("preparing", "loading", "preparing", step=0, tokens=0, flags=(3, 2, 3))
    watch.look(_sight("joining", "joining", "joining", step=0, tokens=0))
    assert _look_for(watch, clock, met, 53) is None  # ranks that wait for one another have 60 s
    stall = _look_for(watch, clock, met, 2)
    assert stall is not None
    assert "rank 1 does not get on" in stall.why
    assert "rank 1: 'loading', after 2 sums" in stall.why


def test_in_the_same_phase_of_a_start_sums_tell_who_is_behind(clock: _Clock) -> None:
    watch = HangWatch(2.0, 60.0, clock)
    sight = _sight("reading", "reading", "reading", step=0, tokens=0, flags=(3, 3, 2))
    watch.look(sight)
    stall = _look_for(watch, clock, sight, 56)
    assert stall is not None
    assert stall.rank == 2


def test_until_they_have_met_ranks_tell_themselves_for_whom_they_wait(clock: _Clock) -> None:
    watch = HangWatch(2.0, 60.0, clock)
    sight = _sight("joining", "starting", step=0, tokens=0)
    watch.look(sight)
    assert _look_for(watch, clock, sight, 80) is None
    stall = _look_for(watch, clock, sight, 20)
    assert stall is not None
    assert stall.rank == 1


def test_a_long_start_gives_steps_no_more_time(clock: _Clock) -> None:
    watch = HangWatch(2.0, 60.0, clock)
    assert _look_for(watch, clock, _sight("loading", "loading", step=0, tokens=0, flags=(1, 1)), 40) is None
    watch.look(_sight("waiting", "waiting", step=0, tokens=0, flags=(2, 2)))
    assert _look_for(watch, clock, _sight("wait", "compute", flags=(3, 3)), 2.5) is not None
