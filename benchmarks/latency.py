"""How long one request waits: to its first token (TTFT) and from token to token (TPOT), alone and beside some others.

    python benchmarks/latency.py random=qwen2_5_0_5b prompt_tokens=64 new_tokens=64 concurrencies=1,4,16 ranks=1,2

As many requests are sent at once as the concurrency says. The figures are medians over the repeats, beside the limits
of this machine, measured in the same run; the last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phalanx import LLM
from phalanx.benchmarks import throughput
from phalanx.benchmarks.lab.common import model_folder, run
from phalanx.benchmarks.lab.peers.engines import weight_bytes
from phalanx.benchmarks.lab.rates import Limits, measure_limits
from phalanx.benchmarks.limits import (
    Work,
    case_limit_tokens_per_s,
    decode_step_s,
    prefill_s,
    share,
)
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import ModelSpec, read_config, spec_from_config


@dataclass
class Options:
    """What to run."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    prompt_tokens: int = 64
    new_tokens: int = 64
    concurrencies: str = "1,4,16"
    ranks: str = "1,2"
    dtype: str = "bfloat16"
    threads: int = 0
    repeats: int = 5
    limits_s: float = 0.5  # of each measurement of the machine's limits
    out: str | None = None  # a file for the JSON line


def whole_numbers(name: str, text: str) -> list[int]:
    """The numbers of an option, at least 1 each, with commas between. Raises ConfigError."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ConfigError(f"{name}={text!r} must be numbers of at least 1, with commas between")
    return numbers


def measure_case(llm: LLM, folder: Path, load: throughput.Options) -> dict[str, Any]:
    """Medians over the repeats of a case: every request's TTFT and TPOT count."""
    speeds, firsts, gaps = [], [], []
    for number in range(load.repeats + 1):
        load.seed = number  # other prompts each time; the first time pays for set-up
        seconds, requests = throughput.Load(llm, load, throughput.make_submits(load, folder)).run()
        if number:
            speeds.append(sum(seen.tokens for seen in requests) / seconds)
            firsts += [seen.arrivals[0][0] - seen.sent for seen in requests]
            gaps += [seen.finished.timings.tpot_ms for seen in requests if seen.finished is not None]
    return {
        "output_tokens_per_s": round(statistics.median(speeds), 2),
        "ttft_s": round(statistics.median(firsts), 4),
        "tpot_ms": round(statistics.median(gaps), 3),
    }


def shares(case: dict[str, Any], work: Work, load: throughput.Options, limits: Limits) -> dict[str, Any]:
    """What the machine allows of a case, and the share of it that was reached; 1 is the limit."""
    rates = (1e9 * limits.read_gb_s, 1e9 * limits.bf16_gflops)
    requests = load.requests
    prompt = load.prompt_tokens
    new = load.new_tokens
    speed = case_limit_tokens_per_s(work, requests, prompt, new, *rates)
    ttft = prefill_s(work, prompt, requests, *rates)
    tpot_ms = 1000 * decode_step_s(work, prompt + new / 2, requests, *rates)
    found = {
        "limit_tokens_per_s": round(speed, 1),
        "share_of_limit": share(case["output_tokens_per_s"], speed),
        "ttft_share_of_limit": share(ttft, case["ttft_s"]),
    }
    return found | ({"tpot_share_of_limit": share(tpot_ms, case["tpot_ms"])} if new > 1 else {})


def measure_ranks(options: Options, folder: Path, spec: ModelSpec, ranks: int, limits: Limits) -> dict[str, Any]:
    """Every concurrency on one number of ranks."""
    work = Work(spec, weight_bytes({"dtype": options.dtype}))
    counts = whole_numbers("concurrencies", options.concurrencies)
    shared = {name: getattr(options, name) for name in ("prompt_tokens", "new_tokens", "repeats", "dtype", "threads")}
    load = throughput.Options(
        ranks=ranks, max_num_seqs=max(64, *counts), max_model_len=options.prompt_tokens + options.new_tokens, **shared
    )
    found: dict[str, Any] = {}
    started = time.monotonic()
    with LLM.from_config(load.engine_config(folder)) as llm:
        found["ready_s"] = round(time.monotonic() - started, 2)
        for count in counts:
            load.requests = count
            case = measure_case(llm, folder, load)
            found[str(count)] = case | shares(case, work, load, limits)
            print(f"ranks={ranks}, {count} at once: {_line(found[str(count)])}", flush=True)
    return found


def _line(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items())


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    for name, least in {"prompt_tokens": 1, "new_tokens": 1, "repeats": 1, "limits_s": 0.01}.items():
        if getattr(options, name) < least:
            raise ConfigError(f"{name}={getattr(options, name)} must be at least {least}")
    counts: Sequence[int] = whole_numbers("ranks", options.ranks)
    folder = model_folder(options.model, options.random)
    spec = spec_from_config(read_config(folder), folder.name)
    limits = measure_limits(options.limits_s)
    return {
        "benchmark": "latency",
        "ranks": {str(count): measure_ranks(options, folder, spec, count, limits) for count in counts},
        "limits": asdict(limits),
    }


if __name__ == "__main__":
    run(Options, measure)
