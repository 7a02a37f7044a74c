"""An engine asks for the threads that it needs before it starts the first of them."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path

import pytest
from phalanx import LLM, ConfigError, SamplingParams
from phalanx.engine.client.thread_room import CLIENT_THREADS, check_thread_room, threads_of
from phalanx.engine.config import EngineConfig
from phalanx.tests.engine.conftest import CONFIG


def _limit_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As where the system has a limit: so many threads of Python's start, and no more."""
    start = threading.Thread.start
    left = [most]

    def limited(thread: threading.Thread) -> None:
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_without_room_for_its_threads_says_which_limit_to_raise(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    before = threading.active_count()
    _limit_threads(monkeypatch, 7)
    with pytest.raises(ConfigError, match=rf"starts 7 more threads.* ranks={ranks} needs \d+: raise .*ulimit -u"):
        LLM(str(tiny), **{**CONFIG, "ranks": ranks})
    assert threading.active_count() == before


def test_a_limit_on_one_processs_addresses_says_nothing_of_the_others(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(tiny), ranks=2)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (3 << 30, 3 << 30))
    _limit_threads(monkeypatch, CLIENT_THREADS)
    check_thread_room(config)
    with pytest.raises(ConfigError, match="starts 0 more threads"):
        check_thread_room(config)


def test_asking_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    check_thread_room(EngineConfig(model="m", ranks=3, threads=4))
    assert set(threading.enumerate()) <= before


def test_an_engine_asks_for_as_many_threads_as_it_has(tiny: Path) -> None:
    before = len(os.listdir("/proc/self/task"))
    with LLM(str(tiny), **CONFIG) as llm:
        llm.generate("ab", SamplingParams(max_tokens=2))
        more = len(os.listdir("/proc/self/task")) - before
    # Other tests may have left threads to an engine in the same process; none needs more than it asked for.
    assert more <= threads_of(EngineConfig(model=str(tiny), **CONFIG))


def test_more_ranks_and_more_threads_of_each_need_more() -> None:
    needed = [
        threads_of(EngineConfig(model="m", ranks=ranks, threads=threads))
        for ranks, threads in ((1, 1), (1, 8), (2, 1), (2, 8), (8, 8))
    ]
    assert needed[0] < needed[1] < needed[3] < needed[4]
    assert needed[0] < needed[2] < needed[3]
