"""Another commit of phalanx beside this one, in turns: is anything slower than it was?

    git worktree add ../before/phalanx COMMIT && (cd ../before/phalanx && python setup.py build_ext --inplace)
    python benchmarks/parts/before_after.py before=../before/phalanx model=models/qwen2-5-0-5b
    python benchmarks/parts/before_after.py before=../before/phalanx cases=many_requests rounds=31 startups=0

Both commits run the same program (the one at the end of this file, by what all commits have: LLM and SamplingParams),
each in processes of its own, on the same weights. In a round each measures each case once, and the one that begins
changes from round to round, for a shared machine's speed changes within minutes. A ratio is before / after, the median
of those within the rounds: above 1, this commit is faster. Wanted: nothing below 0.98. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMITS = ("before", "after")
CASES = ("one_request", "many_requests", "prompt", "shared_prompt", "scheduler")
SHORT = 64  # tokens of a prompt where generating is measured


@dataclass
class Options:
    """What to run."""

    before: str = ""  # a checkout of the other commit, in a folder named phalanx, with its extensions built
    model: str = "models/qwen2-5-0-5b"  # a folder
    dtype: str = "bfloat16"
    ranks: int = 1
    requests: int = 32  # of the case many_requests
    prompt_tokens: int = 1024  # of the cases prompt and shared_prompt
    new_tokens: int = 64  # of the cases one_request and many_requests
    repeats: int = 3  # of a case within a round: its median counts
    rounds: int = 7
    cases: str = ",".join(CASES)  # which ones; more rounds of a few tell smaller differences apart
    startups: int = 5  # rounds of starting, from a program's start to its first token
    startup_ranks: str = "1,2"
    startup_model: str | None = None  # a folder; without one `model`
    out: str | None = None  # a file for the JSON line


class Child:
    """One commit's program, which waits for the name of a case on its input."""

    def __init__(self, checkout: Path, settings: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(checkout),
        )
        self.package = Path(self._read())

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def measure(self, case: str) -> float:
        """Seconds of one case."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> Any:
        """Return what the program says next. Raises ConfigError if it has ended."""
        from phalanx.engine.errors import ConfigError

        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError(f"the program ended with exit code {self._process.wait()}; its error stands above")
        return json.loads(line)


def environment(checkout: Path) -> dict[str, str]:
    """The environment in which `phalanx` is the package of a checkout: this program's own, or the other one's."""
    if checkout == ROOT:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": str(checkout.parent)}


def start_once(checkout: Path, settings: dict[str, Any]) -> float:
    """Seconds from a program's start to the first token of an answer. Raises ConfigError if it fails."""
    from phalanx.engine.errors import ConfigError

    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, __file__, "--first-token", json.dumps(settings)],
        stdout=subprocess.PIPE,
        env=environment(checkout),
        check=False,
    )
    if process.returncode:
        raise ConfigError(f"the program ended with exit code {process.returncode}; its error stands above")
    return float(json.loads(process.stdout)) - started


def in_turns(rounds: int, measure: Any) -> dict[str, list[float]]:
    """The seconds of both commits, round by round; a first round of each does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMITS}
    for number in range(rounds + 1):
        for name in COMMITS if number % 2 else reversed(COMMITS):
            taken = measure(name)
            if number:
                seconds[name].append(round(taken, 5))
    return seconds


def compared(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of both, and the median and the quartiles of the ratios within the rounds."""
    ratios = sorted(before / after for before, after in zip(*seconds.values(), strict=True))
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "before_s": statistics.median(seconds["before"]),
        "after_s": statistics.median(seconds["after"]),
        "before/after": round(statistics.median(ratios), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "rounds": len(ratios),
    }


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    from phalanx.benchmarks.latency import whole_numbers
    from phalanx.engine.errors import ConfigError
    from phalanx.engine.models.spec import read_config

    checkouts = {"before": Path(options.before).absolute(), "after": ROOT}
    if not options.before or checkouts["before"].name != "phalanx" or not (checkouts["before"] / "engine").is_dir():
        raise ConfigError(f"before={options.before} must be a checkout of phalanx in a folder named phalanx")
    if min(options.rounds, options.repeats, options.requests, options.new_tokens, options.prompt_tokens) < 1:
        raise ConfigError("rounds, repeats, requests, new_tokens and prompt_tokens must be at least 1")
    chosen = options.cases.split(",") if options.cases else []
    if not set(chosen) <= set(CASES):
        raise ConfigError(f"cases={options.cases!r} must be some of {', '.join(CASES)}, with commas between")
    settings = {
        "model": str(Path(options.model).resolve()),
        "dtype": options.dtype,
        "ranks": options.ranks,
        "requests": options.requests,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "vocab_size": int(read_config(Path(options.model))["vocab_size"]),
    }

    cases: dict[str, Any] = {}
    with ExitStack() as stack:
        children = {name: stack.enter_context(Child(checkout, settings)) for name, checkout in checkouts.items()}
        for name, child in children.items():
            if child.package != checkouts[name].resolve():
                raise ConfigError(f"{name}: phalanx was imported from {child.package}, not from {checkouts[name]}")
        for case in chosen:
            cases[case] = compared(in_turns(options.rounds, lambda name, case=case: children[name].measure(case)))
            print(f"{case}: {cases[case]}", flush=True)

    startup_model = Path(options.startup_model or options.model).resolve()
    vocab_size = int(read_config(startup_model)["vocab_size"])
    starting = {**settings, "model": str(startup_model), "vocab_size": vocab_size}
    for ranks in whole_numbers("startup_ranks", options.startup_ranks) if options.startups else []:
        each = {**starting, "ranks": ranks}
        case = f"startup_ranks{ranks}"
        cases[case] = compared(in_turns(options.startups, lambda name, each=each: start_once(checkouts[name], each)))
        print(f"{case}: {cases[case]}", flush=True)
    return {"benchmark": "before_after", "cases": cases, "commits": {n: commit(c) for n, c in checkouts.items()}}


def commit(checkout: Path) -> str:
    """The commit that a checkout is at, as git says it; "unknown" where git says nothing."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# ---- the program of either commit: it uses what every commit has ----


def open_engine(settings: dict[str, Any], **fields: Any) -> Any:
    """An engine of the commit whose `phalanx` this process imports."""
    from phalanx import LLM

    longest = max(settings["prompt_tokens"], SHORT) + settings["new_tokens"] + 1
    common = {"dtype": settings["dtype"], "ranks": settings["ranks"], "tokenizer": "none", "max_num_seqs": 32}
    return LLM(settings["model"], max_model_len=longest, max_num_batched_tokens=1024, **common, **fields)


def prompts(settings: dict[str, Any], requests: int, tokens: int, seed: int) -> list[list[int]]:
    """Prompts of token ids that differ from the first one on, the same at either commit."""
    size = settings["vocab_size"]
    return [[(seed * 7919 + number * 613 + i * 31) % size for i in range(tokens)] for number in range(requests)]


def seconds_of(llm: Any, asked: list[list[int]], new_tokens: int) -> float:
    """Seconds until all prompts are answered, greedily."""
    from phalanx import SamplingParams

    started = time.perf_counter()
    llm.generate(asked, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - started


def scheduler_step() -> float:
    """Seconds of a scheduler's step with 256 running: schedule, encode, commit."""
    try:
        from phalanx.benchmarks.parts.scheduler import measure
    except ImportError:  # before benchmarks had parts
        from phalanx.benchmarks.scheduler import measure  # type: ignore[import-not-found,no-redef]
    return measure(256, 200)["step_ms"] / 1000


def child(settings: dict[str, Any]) -> None:
    """Say which package this is; then for each case named on the input, its seconds. Ends when the input does."""
    import phalanx

    plain, cached = (open_engine(settings, prefix_cache=cache) for cache in (False, True))
    tokens = settings["prompt_tokens"]
    shared = prompts(settings, 1, tokens, 0)[0][: tokens * 9 // 10]
    seconds_of(cached, [shared], 1)
    turn = 0

    def one(case: str) -> float:
        nonlocal turn
        turn += 1
        if case == "one_request":
            return seconds_of(plain, prompts(settings, 1, SHORT, turn), settings["new_tokens"])
        if case == "many_requests":
            return seconds_of(plain, prompts(settings, settings["requests"], SHORT, turn), settings["new_tokens"])
        if case == "prompt":
            return seconds_of(plain, prompts(settings, 1, tokens, turn), 1)
        if case == "shared_prompt":
            return seconds_of(cached, [shared + prompts(settings, 1, tokens - len(shared), turn)[0]], 1)
        return scheduler_step()

    print(json.dumps(str(Path(phalanx.__path__[0]).resolve())), flush=True)
    with plain, cached:
        for line in sys.stdin:
            case = line.strip()
            repeats = 1 if case in ("many_requests", "scheduler") else settings["repeats"]
            print(json.dumps(statistics.median(one(case) for _ in range(repeats))), flush=True)


def first_token(settings: dict[str, Any]) -> None:
    """Print the moment, on the monotonic clock, at which a fresh engine has answered with one token."""
    with open_engine(settings) as llm:
        seconds_of(llm, prompts(settings, 1, 32, 1), 1)
        print(json.dumps(time.monotonic()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--first-token"]:
        first_token(json.loads(sys.argv[2]))
    else:
        from phalanx.benchmarks.lab.common import run

        run(Options, measure)
