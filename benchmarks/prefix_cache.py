"""What the prefix cache costs where nothing is shared, and what it saves where a prompt's beginning is.

    python benchmarks/prefix_cache.py random=qwen2_5_0_5b prompt_tokens=1024 shared=0.9

Two engines, one with the cache and one without, take turns on the same prompts. Wanted: at most 1 % slower without any
hits, and a TTFT at least 8 times lower on prompts of 1,024 tokens of which 90 % are shared. The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx import LLM, SamplingParams
from phalanx.benchmarks.lab.common import model_folder, run
from phalanx.benchmarks.lab.peers.programs.program import random_prompts
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import read_config

NAMES = ("cache", "no_cache")


@dataclass
class Options:
    """What to run. The cost is of `requests` prompts of `cost_prompt_tokens`, at once; the saving of one prompt."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    prompt_tokens: int = 1024
    shared: float = 0.9  # of the prompt
    requests: int = 16
    cost_prompt_tokens: int = 128
    cost_new_tokens: int = 32
    repeats: int = 7
    ranks: int = 1
    dtype: str = "bfloat16"
    threads: int = 0
    out: str | None = None  # a file for the JSON line

    def check(self) -> None:
        """Raises ConfigError."""
        for name in ("prompt_tokens", "requests", "cost_prompt_tokens", "cost_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 < self.shared < 1:
            raise ConfigError(f"shared={self.shared} must be between 0 and 1")


Prompts = list[list[int]]


def open_engine(options: Options, folder: Path, name: str) -> LLM:
    """One of the two engines, which are alike but for the cache."""
    longest = max(options.prompt_tokens + 1, options.cost_prompt_tokens + options.cost_new_tokens)
    fields: dict[str, Any] = {
        "ranks": options.ranks,
        "dtype": options.dtype,
        "threads": options.threads,
        "tokenizer": "none",
        "max_model_len": longest,
        "max_num_batched_tokens": 1024,
    }
    return LLM(str(folder), prefix_cache=name == "cache", **fields)


def seconds_of(llm: LLM, prompts: Prompts, new_tokens: int) -> float:
    """Seconds until all prompts are answered."""
    started = time.monotonic()
    llm.generate(list(prompts), SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
    return time.monotonic() - started


@dataclass
class Rounds:
    """What both engines gave, in turns that either begins as often."""

    seconds: dict[str, list[float]]
    hits: int = 0  # tokens found in the cache

    @classmethod
    def run(
        cls,
        engine: Callable[[str], AbstractContextManager[LLM]],
        repeats: int,
        prompts: Callable[[int], Prompts],
        new_tokens: int,
        before: Callable[[int], Prompts],
    ) -> Rounds:
        """What `before` gives is answered first, unmeasured."""
        rounds = cls({name: [] for name in NAMES})
        for number in range(repeats + 1):
            for name in NAMES if number % 2 else reversed(NAMES):
                with engine(name) as llm:
                    hits = llm.status().prefix_hits
                    seconds_of(llm, before(number), 1)
                    taken = seconds_of(llm, prompts(number), new_tokens)
                    rounds.hits += llm.status().prefix_hits - hits
                if number:  # the first round pays for set-up
                    rounds.seconds[name].append(taken)
        return rounds


def hit_prompts(options: Options, vocab_size: int, number: int) -> tuple[Prompts, Prompts]:
    """Return a round's two prompts: the one whose beginning the cache has to know, and the one that shares it."""
    [whole, other] = random_prompts(2, options.prompt_tokens, vocab_size, seed=1000 + number)
    shared = int(options.prompt_tokens * options.shared)
    return [whole], [whole[:shared] + other[shared:]]


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of the rounds: what disturbs the machine for long disturbs both of a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    options.check()
    folder = model_folder(options.model, options.random)
    vocab_size = int(read_config(folder)["vocab_size"])

    # Engines of their own for each measurement: where an engine's weights happen to lie in memory decides over several
    # percent, for as long as it lives.
    costs = Rounds.run(
        lambda name: open_engine(options, folder, name),
        options.repeats,
        lambda number: random_prompts(options.requests, options.cost_prompt_tokens, vocab_size, seed=number),
        options.cost_new_tokens,
        lambda _: [[1]],
    )

    with ExitStack() as stack:
        engines = {name: stack.enter_context(open_engine(options, folder, name)) for name in NAMES}
        savings = Rounds.run(
            lambda name: nullcontext(engines[name]),
            options.repeats,
            lambda number: hit_prompts(options, vocab_size, number)[1],
            1,
            lambda number: hit_prompts(options, vocab_size, number)[0],
        )

    cost, saving = costs.seconds, savings.seconds
    slower = median_ratio(cost["cache"], cost["no_cache"])
    faster = median_ratio(saving["no_cache"], saving["cache"])
    print(f"without hits: {slower:.4f} times the seconds (wanted: at most 1.01)")
    print(f"{options.shared:.0%} shared: TTFT {faster:.2f} times lower (wanted: at least 8)", flush=True)

    return {
        "benchmark": "prefix_cache",
        "seconds_ratio_without_hits": round(slower, 4),
        "ttft_times_lower": round(faster, 2),
        "ttft_s": {name: round(statistics.median(values), 4) for name, values in saving.items()},
        "seconds_without_hits": {name: round(statistics.median(values), 4) for name, values in cost.items()},
        "runs_seconds_without_hits": _rounded(cost),
        "runs_ttft_s": _rounded(saving),
        "hit_tokens_without_sharing": costs.hits,
        "hit_tokens_of_each_prompt": round(savings.hits / (options.repeats + 1), 1),
    }


def _rounded(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 4) for value in values] for name, values in seconds.items()}


if __name__ == "__main__":
    run(Options, measure)
