"""What is done later, all of it by one thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
from phalanx.engine.client.resume.timers import Timers

PATIENCE_S = 60.0


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def timers() -> Iterator[Timers]:
    made = Timers("phalanx-test")
    made.start()
    yield made
    made.close()


def test_what_is_due_first_is_done_first_and_what_is_cancelled_never(timers: Timers) -> None:
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    held, go_on = threading.Event(), threading.Event()
    timers.after(0.0, lambda: (held.set(), go_on.wait(PATIENCE_S), None)[2])
    assert held.wait(PATIENCE_S)
    timers.after(0.2, lambda: done.put("last"))
    cancelled = timers.after(0.1, lambda: done.put("cancelled"))
    timers.after(0.0, lambda: done.put("first"))
    timers.after(0.0, lambda: done.put("second"))
    timers.after(1e18, lambda: done.put("never"))  # more seconds than any wait of the system's may have
    timers.cancel(cancelled)
    timers.cancel(cancelled)
    go_on.set()
    assert [done.get(timeout=PATIENCE_S) for _ in range(3)] == ["first", "second", "last"]
    assert done.empty()


def test_an_action_that_fails_holds_up_no_other(timers: Timers) -> None:
    done = threading.Event()
    timers.after(0.0, lambda: _raise(ValueError("a fault")))
    timers.after(0.0, done.set)
    assert done.wait(PATIENCE_S)


def test_closing_waits_for_what_has_begun_and_begins_nothing(timers: Timers) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []
    timers.after(0.0, lambda: (begun.set(), go_on.wait(PATIENCE_S), done.append("first"))[2])
    timers.after(0.0, lambda: done.append("second"))
    assert begun.wait(PATIENCE_S)
    go_on.set()
    timers.close()
    assert "first" in done
    length = len(done)
    timers.after(0.0, lambda: done.append("late"))
    timers.close()
    assert len(done) == length


def test_an_action_may_close_them_and_those_that_never_started_close_too(timers: Timers) -> None:
    closed = threading.Event()
    timers.after(0.0, lambda: (timers.close(), closed.set())[1])
    assert closed.wait(PATIENCE_S)
    Timers("phalanx-test").close()
