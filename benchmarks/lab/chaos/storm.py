"""Random kills, stops, disconnects, bursts, aborts and slow readers at once; a verdict for each request at the end."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx.engine.errors import EngineStopped

from .answers import Asked, HungUp, OnLine, ask, ask_all, judge
from .questions import Question, questions
from .server import Server

HANG_UP_SHARE, GIVE_UP_SHARE, SLOW_SHARE, CANCEL_SHARE = 0.1, 0.05, 0.1, 0.05
"""Shares of the requests whose client leaves amid the text, leaves soon whatever has come, or reads slowly; and of
those that are asked in the background, to be cancelled."""
GIVE_UP_S = (0.01, 2.0)
SLOW_S = 0.15
"""Seconds that a slow reader takes for a line."""
BURST_EVERY = 25
"""One request in so many brings a burst of as many as there are clients."""
MOST_GROWTH_MIB = 64.0
"""MiB by which a lasting process may have grown, once it is warm."""


@dataclass(frozen=True)
class Weather:
    """What to let loose."""

    seconds: float
    fault_every_s: float
    clients: int
    tokens: int
    step_timeout_s: float
    seed: int


@dataclass
class Verdicts:
    """What came of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    by_reader: Counter[str] = field(default_factory=Counter)
    """Requests by what their client did."""
    words: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)


class Storm:
    """Clients and faults, until the time is up."""

    def __init__(self, server: Server, weather: Weather, asked: list[Question], expected: list[Asked]) -> None:
        self.found = Verdicts()
        self._server, self._weather = server, weather
        self._asked, self._expected = asked, expected
        self._random = random.Random(weather.seed)
        self._lock = threading.Lock()
        self._until = time.monotonic() + weather.seconds

    def run(self) -> None:
        """Return once the time is up and every request has ended."""
        clients = [threading.Thread(target=self._ask_on) for _ in range(self._weather.clients)]
        for client in clients:
            client.start()
        while (left := self._until - time.monotonic()) > 0:
            time.sleep(min(left, self._draw(0.3, 1.7) * self._weather.fault_every_s))
            if time.monotonic() < self._until:
                self._fault()
        for client in clients:
            client.join()

    def _draw(self, low: float, high: float) -> float:
        with self._lock:
            return self._random.uniform(low, high)

    def _fault(self) -> None:
        ranks = self._server.ranks()
        if ranks:
            number = self._random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
            rank = self._random.choice(list(ranks))
            with contextlib.suppress(psutil.NoSuchProcess):
                ranks[rank].send_signal(number)
                self.found.faults[number.name] += 1

    def _ask_on(self) -> None:
        while time.monotonic() < self._until:
            self._ask_one()
            if self._draw(0, 1) < 1 / BURST_EVERY:
                more = [threading.Thread(target=self._ask_one) for _ in range(self._weather.clients)]
                for each in more:
                    each.start()
                for each in more:
                    each.join()

    def _ask_one(self) -> None:
        with self._lock:
            index = self._random.randrange(len(self._asked))
            how = self._random.random()
            seed = self._random.random()
        question = self._asked[index]
        reader = _reader(how, question)
        try:
            verdict, words = self._judged(reader, index, seed)
        except Exception as error:  # a defect of the client must not end it unseen
            verdict, words = "lost", f"{question.name}: {error!r}"
        with self._lock:
            self.found.counts[verdict] += 1
            self.found.by_reader[reader] += 1
            if words:
                self.found.words.append(f"{reader}: {words}")

    def _judged(self, reader: str, index: int, seed: float) -> tuple[str, str]:
        url, question = self._server.url, self._asked[index]
        if reader == "cancels":
            return _cancel(url, seed)
        if reader == "gives up":
            patience = GIVE_UP_S[0] + seed * (GIVE_UP_S[1] - GIVE_UP_S[0])
            asked = ask(url, question, timeout_s=patience)
            if "Timeout" in asked.error:
                return "left by its client", ""
        else:
            on_line = {"hangs up": _hang_up(1 + int(20 * seed)), "reads slowly": _slow}.get(reader, lambda lines: None)
            try:
                asked = ask(url, question, on_line)
            except HungUp:
                return "left by its client", ""
        return judge(asked, self._expected[index].answer)


def _reader(how: float, question: Question) -> str:
    """What the client of a request does."""
    if question.stream:
        if how < HANG_UP_SHARE:
            return "hangs up"
        if how < HANG_UP_SHARE + SLOW_SHARE:
            return "reads slowly"
    elif how < GIVE_UP_SHARE:
        return "gives up"
    return "cancels" if how > 1 - CANCEL_SHARE else "reads"


def _hang_up(lines: int) -> OnLine:
    def on_line(number: int) -> None:
        if number >= lines:
            raise HungUp

    return on_line


def _slow(number: int) -> None:
    time.sleep(SLOW_S)


def _cancel(url: str, seed: float) -> tuple[str, str]:
    """Ask in the background, and cancel that: it must end as cancelled, or be done already."""
    body = {"model": "m", "input": "Count to one hundred, slowly.", "background": True, "max_output_tokens": 200}
    with httpx.Client(base_url=url, timeout=120.0, trust_env=False) as client:
        begun = client.post("/v1/responses", json=body)
        if begun.status_code != 200:
            return "lost", f"background: {begun.status_code} {begun.text[:200]}"
        name = begun.json()["id"]
        time.sleep(seed)
        ended = client.post(f"/v1/responses/{name}/cancel")
        status = ended.json().get("status")
    if status in ("cancelled", "completed", "incomplete"):
        return "cancelled", ""
    return "lost", f"background: {ended.status_code} {ended.text[:200]}"


def let_loose(model: Path, ranks: int, weather: Weather) -> dict[str, Any]:
    """Run the whole of it. The result's `well` is whether nothing was lost, came twice or is left."""
    limits = ("max_model_len=2048", "max_num_batched_tokens=256", "restart_window_s=5", "stored_responses=16")
    server = Server(model, ranks, f"step_timeout_s={weather.step_timeout_s}", *limits)
    asked = questions(weather.tokens)
    left: list[str] = []
    memory: dict[str, Any] = {}
    try:
        expected = ask_all(server.url, asked)
        _warm(server, asked)
        before = server.holds()
        memory["before_mib"] = server.memory()
        storm = Storm(server, weather, asked, expected)
        storm.run()
        server.wait_until_ready()
        left = server.grown(before)
        memory["after_mib"] = server.memory()
        left += _grown(memory)
        # The group that is there now is as good as the first.
        last = [judge(one, other.answer) for one, other in zip(ask_all(server.url, asked), expected, strict=True)]
        storm.found.words += [words for _, words in last if words]
        restarts = server.state.restarts
    finally:
        left += server.stop()

    found = storm.found
    well = not found.words and not found.counts["lost"] and not found.counts["different"] and not left
    print(*found.words[:10], sep="\n", file=sys.stderr)
    if well and found.counts["same"]:
        server.remove()
    else:
        print(f"what the server said is in {server.folder}", file=sys.stderr)
    return {
        "requests": sum(found.counts.values()),
        "verdicts": dict(found.counts),
        "clients": dict(found.by_reader),
        "lost": found.counts["lost"] + found.counts["refused"],
        "different": found.counts["different"],
        "faults": dict(found.faults),
        "restarts": restarts,
        "left_behind": left,
        "memory": memory,
        "words": found.words[:20],
        "well": well and found.counts["same"] > 0,
    }


def _warm(server: Server, asked: list[Question]) -> None:
    """Have every part of the server used, a restart too, before what it holds is counted."""
    asking = threading.Thread(target=ask_all, args=(server.url, asked))
    asking.start()
    next(iter(server.ranks().values())).kill()
    asking.join()
    server.wait_until_ready()
    _cancel(server.url, 0.0)
    deadline = time.monotonic() + 30.0
    while server.open_requests():
        if time.monotonic() > deadline:
            raise EngineStopped(f"requests are left that nobody waits for: {server.open_requests()}")
        time.sleep(0.1)


def _grown(memory: dict[str, Any]) -> list[str]:
    before, after = memory["before_mib"], memory["after_mib"]
    return [
        f"{after[name] - before[name]:.1f} MiB more in {name}"
        for name in before
        if after.get(name, 0.0) - before[name] > MOST_GROWTH_MIB
    ]
