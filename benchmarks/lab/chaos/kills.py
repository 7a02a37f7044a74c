"""Kills or stops ranks one after the other, each at a random moment amid sixteen requests of every kind."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from .answers import Asked, ask_all, judge
from .questions import Question, questions
from .server import Server, summary

LOOK_S = 0.01
UNNOTICED_S = 120.0
"""Seconds after which nothing is expected to come of a fault any more."""
PARTS = {
    "to notice": (None, "noticed_s"),
    "to end the other ranks and start new ones": ("noticed_s", "started_s"),
    "to load, join and warm up": ("started_s", "ready_s"),
    "until the server says so": ("ready_s", "serving_s"),
    "from then to the next text of a stream": ("serving_s", "text_s"),
}
"""What the time from a fault to the next text goes into, by the events between which it passes."""


@dataclass(frozen=True)
class Plan:
    """What is done to a group."""

    number: signal.Signals
    """SIGKILL or SIGSTOP."""
    times: int
    tokens: int
    """About so many in an answer."""
    step_timeout_s: float
    seed: int


@dataclass
class Watch:
    """When what happened after a fault, in seconds since it."""

    at: float = 0.0
    events: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    """What the server said while it was not ready."""

    def note(self, name: str) -> None:
        """Note that something has happened now, unless it has before."""
        self.events.setdefault(name, round(time.monotonic() - self.at, 3))


def disturb_group(model: Path, ranks: int, plan: Plan) -> dict[str, Any]:
    """Start a group, disturb it `plan.times` times, and return each fault's figures and all verdicts."""
    settings = (f"step_timeout_s={plan.step_timeout_s}", "max_model_len=2048", "restart_window_s=0.5")
    # A small budget makes several steps of the long prompt, so that kills meet it half computed.
    server = Server(model, ranks, "max_num_batched_tokens=256", *settings)
    asked = questions(plan.tokens)
    rows: list[dict[str, Any]] = []
    words: list[str] = []
    left: list[str] = []
    try:
        expected, _ = _undisturbed(server, asked)
        again, seconds = _undisturbed(server, asked)
        words += _judged(again, expected)[1]
        before: dict[str, dict[str, int]] = {}
        moments = random.Random(plan.seed)
        for number in range(plan.times):
            moment = moments.uniform(0.05, 0.95) * seconds
            row, found = _one_fault(server, asked, expected, number % ranks, moment, plan)
            rows.append(row)
            words += found
            print(f"{ranks} ranks: {row}", file=sys.stderr, flush=True)
            server.wait_until_ready()
            # What the first fault brings stays, as the file that tells of the last failure: what each brings grows.
            before = before or server.holds()
        left = server.grown(before)
    finally:
        left += server.stop()

    if words or left:
        print(f"what the server said is in {server.folder}", *words[:20], sep="\n", file=sys.stderr)
    else:
        server.remove()
    names = ("noticed_s", "not_ready_s", "started_s", "ready_s", "serving_s", "text_s")
    return {
        "faults": len(rows),
        "requests": len(rows) * len(asked),
        "same": sum(row["same"] for row in rows),
        "differences": words,
        "left_behind": left,
        "undisturbed_s": round(seconds, 1),
        "seconds_since_the_fault": {name: summary(rows, name) for name in names},
        "seconds_go_into": {part: _between(rows, *events) for part, events in PARTS.items()},
        "each": rows,
    }


def _between(rows: list[dict[str, Any]], begin: str | None, end: str) -> dict[str, float | None]:
    """Median and most of the seconds between two events."""
    known = [row for row in rows if row.get(end) is not None and (begin is None or row.get(begin) is not None)]
    return summary([{"s": row[end] - (row[begin] if begin is not None else 0.0)} for row in known], "s")


def _undisturbed(server: Server, asked: list[Question]) -> tuple[list[Asked], float]:
    began = time.monotonic()
    answers = ask_all(server.url, asked)
    return answers, time.monotonic() - began


def _judged(answers: list[Asked], expected: list[Asked]) -> tuple[int, list[str]]:
    verdicts = [judge(answer, other.answer) for answer, other in zip(answers, expected, strict=True)]
    return sum(verdict == "same" for verdict, _ in verdicts), [words for _, words in verdicts if words]


def _one_fault(
    server: Server, asked: list[Question], expected: list[Asked], rank: int, moment: float, plan: Plan
) -> tuple[dict[str, Any], list[str]]:
    """Disturb one rank `moment` seconds after sixteen requests began. Returns the figures, and what differs."""
    server.wait_until_ready()
    victims = server.ranks()
    watch = Watch()
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(ask_all, server.url, asked)
        time.sleep(moment)
        watch.at = time.monotonic()
        victims[rank].send_signal(plan.number)
        watcher = threading.Thread(target=_watch, args=(server, {each.pid for each in victims.values()}, watch))
        watcher.start()
        got = answers.result()
        watch.note("all_ended_s")
        watcher.join()

    after = [at - watch.at for each in got for at in each.arrivals if at > watch.at + watch.events.get("ready_s", 0)]
    same, words = _judged(got, expected)
    row = {
        "rank": rank,
        "after_s": round(moment, 2),
        **watch.events,
        "text_s": round(min(after), 3) if after else None,
        "same": same,
        "reason": watch.reason,
    }
    if f"rank {rank} " not in watch.reason:
        words.append(f"the server did not name the rank: {watch.reason!r}")
    return row, [f"rank {rank} after {moment:.2f} s: {each}" for each in words]


def _watch(server: Server, before: set[int], watch: Watch) -> None:
    """Note when the supervisor has noticed, new ranks are there, all are ready, and the server says so itself."""
    ill = False
    while "serving_s" not in watch.events and time.monotonic() - watch.at < UNNOTICED_S:
        phase = server.state.phase
        if phase in ("stalled", "restarting"):
            watch.note("noticed_s")
        if "noticed_s" in watch.events:
            now = {each.pid for each in server.ranks().values()}
            if not now & before and len(now) == server.count:
                watch.note("started_s")
            if phase == "running":
                watch.note("ready_s")
        with contextlib.suppress(httpx.HTTPError):
            ready, reason = server.readiness()
            if not ready:
                ill = True
                watch.note("not_ready_s")
                # The first reason names the rank; later ones may say that the engine loads.
                watch.reason = watch.reason if "rank" in watch.reason else reason
            elif ill and "ready_s" in watch.events:
                watch.note("serving_s")
        time.sleep(LOOK_S)
