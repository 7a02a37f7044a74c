"""How long a program takes from its start to the first token of an answer, phase by phase.

    python benchmarks/startup.py random=qwen2_5_0_5b ranks=1

Each repeat is a Python process of its own: it imports phalanx, makes an LLM and generates one token. The first repeat
may read the checkpoint from disk, the others find it in the page cache. The figures are medians over the repeats; the
last line is JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

PHASES = ("import_s", "load_s", "ready_s", "first_token_s")


@dataclass
class Options:
    """What to start."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    ranks: int = 1
    dtype: str = "bfloat16"
    prompt_tokens: int = 32
    repeats: int = 3
    out: str | None = None  # a file for the JSON line


def first_token(config: dict[str, Any], prompt: list[int]) -> dict[str, float | None]:
    """The program that is measured; it imports what a user's program imports. Moments on the monotonic clock."""
    from phalanx import LLM, SamplingParams

    imported = time.monotonic()
    loaded: float | None = None  # a group of several ranks reports no progress to its client

    def on_progress(done: int, total: int) -> None:
        nonlocal loaded
        loaded = time.monotonic()

    with LLM(**config, on_progress=on_progress) as llm:
        ready = time.monotonic()
        llm.generate(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
        return dict(zip(PHASES, (imported, loaded, ready, time.monotonic()), strict=True))


def start_once(config: dict[str, Any], prompt: list[int]) -> dict[str, float | None]:
    """Seconds from the start of a process to the end of each phase. Raises ConfigError if it fails."""
    from phalanx.engine.errors import ConfigError

    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, __file__, "--first-token", json.dumps([config, prompt])], stdout=subprocess.PIPE, check=False
    )
    if process.returncode:
        raise ConfigError(f"the program ended with exit code {process.returncode}; its error stands above")
    moments = json.loads(process.stdout)
    return {phase: None if at is None else round(at - started, 3) for phase, at in moments.items()}


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    from phalanx.benchmarks.lab.common import model_folder
    from phalanx.benchmarks.lab.peers.programs.program import random_prompts
    from phalanx.engine.errors import ConfigError
    from phalanx.engine.models.spec import read_config

    if options.repeats < 1:
        raise ConfigError(f"repeats={options.repeats} must be at least 1")
    folder = model_folder(options.model, options.random)
    [prompt] = random_prompts(1, options.prompt_tokens, int(read_config(folder)["vocab_size"]))
    config = {"model": str(folder), "ranks": options.ranks, "dtype": options.dtype}
    runs = []
    for _ in range(options.repeats):
        runs.append(start_once(config, prompt))
        print(", ".join(f"{phase.removesuffix('_s')}: {at} s" for phase, at in runs[-1].items()), flush=True)
    medians = {}
    for phase in PHASES:
        moments = [at for run in runs if (at := run[phase]) is not None]
        medians[phase] = statistics.median_low(moments) if moments else None
    return {"benchmark": "startup", **medians, "runs": runs}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--first-token"]:
        print(json.dumps(first_token(*json.loads(sys.argv[2]))))
    else:
        from phalanx.benchmarks.lab.common import run

        run(Options, measure)
