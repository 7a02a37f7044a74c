"""What the programs of this folder share. They run in virtual environments of their own: the standard library only.

    PYTHON run_X.py MODEL [KEY=VALUE ...] [REQUESTS,PROMPT,NEW[,RATE] ...]

On the command line a case is of random ids from 100 to 20000; without one, each line of stdin is a case: {"prompts",
"new_tokens", "due_s"}. The engine is loaded once. {"ready_s", "version"}, then outcomes, are lines of JSON on stdout.
All decode greedily and ignore end-of-sequence.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

STARTED = time.monotonic()


@dataclass
class Case:
    """Prompts of token ids, and the seconds after the start at which each is sent, in order."""

    prompts: list[list[int]]
    new_tokens: int
    due_s: list[float]


@dataclass
class Seen:
    """One request's output, and when its first and last tokens came: seconds after the case's start."""

    tokens: list[int] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0


class Engine(Protocol):
    """What a program measures."""

    version: str

    def run(self, case: Case) -> list[Seen]:
        """Send every prompt when it is due, and wait for all."""
        ...


class Stepper(Protocol):
    """An engine that computes step by step, when it is told to."""

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """Take in a request; its number is new in this process."""
        ...

    def step(self) -> dict[int, list[int]]:
        """Compute one step; the new tokens of each request that has any."""
        ...


class Stepping:
    """An Engine made of a Stepper."""

    def __init__(self, stepper: Stepper, version: str) -> None:
        self.version = version
        self._stepper = stepper
        self._numbers = itertools.count()

    def run(self, case: Case) -> list[Seen]:
        """As Engine's."""
        started = time.monotonic()
        everything = [Seen() for _ in case.prompts]
        waiting = deque(zip(case.due_s, case.prompts, everything, strict=True))
        running: dict[int, Seen] = {}

        while waiting or running:
            now = time.monotonic() - started
            if not running and waiting[0][0] > now:
                time.sleep(waiting[0][0] - now)
                continue

            while waiting and waiting[0][0] <= now:
                _, prompt, seen = waiting.popleft()
                number = next(self._numbers)
                running[number] = seen
                self._stepper.add(number, prompt, case.new_tokens)

            for number, tokens in self._stepper.step().items():
                note(running[number], tokens, time.monotonic() - started)
                if len(running[number].tokens) >= case.new_tokens:
                    del running[number]
        return everything


def note(seen: Seen, tokens: Sequence[int], at_s: float) -> None:
    """New tokens of a request have come."""
    if tokens:
        seen.first_s = seen.first_s if seen.tokens else at_s
        seen.last_s = at_s
        seen.tokens += tokens


def read_case(text: str, vocab_size: int = 20001, seed: int = 0) -> Case:
    """The case that REQUESTS,PROMPT,NEW[,RATE] describes; with a rate the requests are a Poisson process.

    Raises ValueError for other text.
    """
    requests, prompt, new, *rates = text.split(",")
    if len(rates) > 1 or min(int(requests), int(prompt), int(new)) < 1 or (rates and not float(rates[0]) > 0):
        raise ValueError(f"{text!r} must be REQUESTS,PROMPT,NEW[,RATE], all above 0")
    due_s = arrivals(int(requests), float(rates[0]) if rates else 0.0, seed)
    return Case(random_prompts(int(requests), int(prompt), vocab_size, seed), int(new), due_s)


def random_prompts(requests: int, tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of seeded random token ids from 100 to 20000, or within a vocabulary that is smaller."""
    draw = random.Random(seed)
    high = min(20000, vocab_size - 1)
    return [[draw.randint(min(100, high), high) for _ in range(tokens)] for _ in range(requests)]


def arrivals(requests: int, rate: float, seed: int = 0) -> list[float]:
    """When each request is due, in seconds: all at once, or at a rate of so many a second."""
    if not rate:
        return [0.0] * requests
    draw = random.Random(seed)
    return list(itertools.accumulate([draw.expovariate(rate) for _ in range(requests - 1)], initial=0.0))


def outcome(case: Case, everything: list[Seen]) -> dict[str, Any]:
    """The line of JSON of a case. TTFT and latency count from when a request was due."""
    for seen in everything:
        if len(seen.tokens) != case.new_tokens:
            raise RuntimeError(f"a request got {len(seen.tokens)} of {case.new_tokens} tokens")
    seconds = max(seen.last_s for seen in everything)
    tokens = sum(len(seen.tokens) for seen in everything)
    return {
        "requests": len(everything),
        "prompt_tokens": len(case.prompts[0]),
        "new_tokens": case.new_tokens,
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(tokens / seconds, 4),
        "ttft_s": [round(seen.first_s - due, 4) for seen, due in zip(everything, case.due_s, strict=True)],
        "latency_s": [round(seen.last_s - due, 4) for seen, due in zip(everything, case.due_s, strict=True)],
        "tokens": [seen.tokens for seen in everything],
    }


def main(make: Callable[[str, dict[str, str]], Engine]) -> None:
    """The program: an engine of the model and the options on the command line, and its cases."""
    model, *arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print what they like
    options = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    cases = [argument for argument in arguments if "=" not in argument]
    engine = make(model, options)
    answers.write(json.dumps({"ready_s": round(time.monotonic() - STARTED, 2), "version": engine.version}) + "\n")
    for case in map(read_case, cases) if cases else _stdin():
        result = outcome(case, engine.run(case))
        if cases:  # for people
            del result["tokens"]
            result |= {name: round(sum(result[name]) / len(result[name]), 4) for name in ("ttft_s", "latency_s")}
        answers.write(json.dumps(result) + "\n")


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def encode(case: Case) -> str:
    """The line of stdin that is this case."""
    return json.dumps(dataclasses.asdict(case)) + "\n"


def _stdin() -> Iterator[Case]:
    for line in sys.stdin:
        yield Case(**json.loads(line))
