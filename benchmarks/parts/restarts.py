"""How soon a group serves again after a rank was killed, and what the time goes into, phase by phase.

    python benchmarks/parts/restarts.py model=models/smollm2-135m ranks=[2,3] kills=5

For each number of ranks, once with the weights kept in memory and once without, every rank is killed `kills` times
while an answer streams. The time runs from SIGKILL to the answer's next token. Its phases are those of rank 0, as the
ranks tell them in their heartbeats: until the ranks run again (the death is noticed, the others are ended, processes
are forked), joining, reading (configuration and tokenizer), loading, preparing (tuning, the KV cache), and the first
token (the client sends its requests again, and their prompts and outputs are computed). Figures are medians over the
kills of all ranks; `worst_s` is the longest time of all. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from phalanx import LLM, SamplingParams
from phalanx.benchmarks.lab.common import model_folder, run
from phalanx.benchmarks.lab.traces import temporary_folder
from phalanx.engine.errors import EngineStopped
from phalanx.engine.execution.heartbeat import BEATS_FILE, STARTING, BeatsReader
from phalanx.engine.protocol.messages import Delta

LOOK_S = 0.005
QUIET: dict[str, Any] = {"max_restarts": 10**6, "restart_window_s": 0.001}
"""Restarts in a row are held up more and more: each is to be the first after a quiet time."""
PROMPT = "Once upon a time, in a village by the sea,"
PHASES = ("noticed_and_forked", *STARTING[1:], "first_token")


@dataclass
class Options:
    """What to kill, and how often."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "smollm2_135m"  # a preset of configs/models
    ranks: list[int] = field(default_factory=lambda: [2, 3])
    kills: int = 5  # of each rank
    dtype: str = "auto"
    quantization: str = "none"
    out: str | None = None  # a file for the JSON line


class Timeline:
    """When rank 0 entered each phase of its start, as its heartbeat tells, of a group that is started again."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the group's."""
        self._folder = folder
        self._copy = folder.with_suffix(".beats")
        self.entered: dict[str, float] = {}
        self._since = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._done.set()
        self._thread.join()
        self._copy.unlink(missing_ok=True)

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            # A copy: the supervisor makes the file anew, and a mapping of it would end this process meanwhile.
            data = (self._folder / BEATS_FILE).read_bytes()
            if not data:
                continue
            self._copy.write_bytes(data)
            reader = BeatsReader(self._copy, 1)
            beat = reader.read()[0]
            reader.close()
            if beat.since > self._since and beat.phase not in self.entered:
                self.entered[beat.phase] = beat.since


def rank_process(rank: int) -> psutil.Process:
    """A rank's process, of this process's only group. Raises EngineStopped if there is none."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("launch.ranks.rank" in part for part in child.cmdline()) and child.environ()["RANK"] == str(rank):
                return child
    raise EngineStopped(f"there is no process of rank {rank}")


def kill_once(llm: LLM, folder: Path, rank: int) -> dict[str, float]:
    """Kill a rank while an answer streams. Returns the seconds of each phase, and of all of them as `total`."""
    killed = timeline = None
    tokens = 0
    ended = 0.0
    for event in llm.stream(PROMPT, sampling=SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)):
        if not isinstance(event, Delta):
            continue
        tokens += 1
        if killed is not None and not ended:
            ended = time.monotonic()
        if killed is None and tokens > 8:
            process = rank_process(rank)
            # What is under way arrives first: the next token is one of the next group.
            process.suspend()
            time.sleep(0.05)
            timeline = Timeline(folder)
            killed = time.monotonic()
            process.kill()
    if killed is None or timeline is None or not ended:
        raise EngineStopped("the answer ended before a rank was killed")
    timeline.close()

    entered = timeline.entered
    moments = [killed, *(entered.get(phase, killed) for phase in STARTING[1:]), entered.get("waiting", ended), ended]
    spans = [max(0.0, after - before) for before, after in itertools.pairwise(moments)]
    return {**dict(zip(PHASES, spans, strict=True)), "total": ended - killed}


def measure(options: Options, ranks: int, weights: str) -> dict[str, Any]:
    """Kill each rank of a group as often as told."""
    model = model_folder(options.model, options.random)
    settings = {"ranks": ranks, "weights": weights, "dtype": options.dtype, "quantization": options.quantization}
    with temporary_folder() as folder, LLM(model, max_model_len=512, **settings, **QUIET) as llm:
        [group] = folder.glob("phalanx-*")
        found = [kill_once(llm, group, rank) for _ in range(options.kills) for rank in range(ranks)]
    phases = {name: round(statistics.median(each[name] for each in found), 3) for name in found[0]}
    return {
        "kills": len(found),
        **{f"{name}_s": value for name, value in phases.items()},
        "worst_s": round(max(each["total"] for each in found), 3),
    }


def measure_all(options: Options) -> dict[str, Any]:
    """Every number of ranks, with the weights kept and without."""
    return {
        "benchmark": "restarts",
        "restarts": {
            f"{ranks} ranks, weights={weights}": measure(options, ranks, weights)
            for ranks in options.ranks
            for weights in ("keep", "read")
        },
    }


if __name__ == "__main__":
    run(Options, measure_all)
