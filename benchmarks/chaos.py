"""Kills, stops and drowns a server of its own, and says of every request what came of it.

    python benchmarks/chaos.py model=models/smollm2-135m ranks=2 seconds=1800 fault_every_s=20 seed=1
    python benchmarks/chaos.py mode=kills groups=2,3 times=20       # SIGKILL of each rank in turn, at random moments
    python benchmarks/chaos.py mode=stops groups=2,3 times=6        # the same with SIGSTOP
    python benchmarks/chaos.py mode=saturation seconds=600          # prefills of 4,096 tokens, and no false alarm
    python benchmarks/chaos.py mode=beside model=models/qwen2-5-0-5b vllm=../peers/vllm     # and in vLLM

A launch.serve in float32 first answers sixteen requests of every kind undisturbed: greedy, seeded, penalties, several
completions, stop strings, log-probabilities, echo, schema, regular expression, tools, thinking, Responses, Messages,
streams and whole answers, a long prompt. Whatever happens later, every answer must be the undisturbed one's: text,
token ids, finish reasons, usage, and log-probabilities to 1e-4. mode=chaos has clients ask at random, some of which
hang up, give up, cancel or read slowly, and now and then a burst; meanwhile ranks are sent SIGKILL or SIGSTOP. At the
end nothing may be left: no request, block, descriptor, thread, process, shared memory, file or memory. The last line is
JSON; the exit code is 1 unless all is well.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.chaos.beside import disturb_both
from phalanx.benchmarks.lab.chaos.kills import Plan, disturb_group
from phalanx.benchmarks.lab.chaos.saturation import saturate
from phalanx.benchmarks.lab.chaos.storm import Weather, let_loose
from phalanx.benchmarks.lab.common import ROOT, run
from phalanx.engine.errors import ConfigError

MODES = ("chaos", "kills", "stops", "saturation", "beside")


@dataclass
class Options:
    """What to disturb, and for how long."""

    mode: str = "chaos"  # chaos, kills, stops, saturation or beside
    model: str = str(ROOT / "models" / "smollm2-135m")  # a folder; its tokenizer must be SmolLM2's
    ranks: int = 2
    groups: str = "2,3"  # of kills and stops: sizes of the groups, one after the other
    times: int = 20  # of kills and stops: faults of each group
    seconds: float = 60.0  # of chaos and saturation
    fault_every_s: float = 15.0  # of chaos: on average
    clients: int = 8  # that ask one request after the other
    max_tokens: int = 64  # of an answer, about
    step_timeout_s: float = 3.0
    vllm: str | None = None  # of beside: the environment where vLLM is installed
    seed: int = 0  # of what is asked and of what goes wrong
    out: str | None = None  # a file for the JSON line

    def check(self) -> None:
        """Raises ConfigError for what cannot be run."""
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r} is not one of {', '.join(MODES)}")
        if not all(size.isdigit() and int(size) > 1 for size in self.groups.split(",")):
            raise ConfigError(f"groups={self.groups!r} must be numbers of at least 2, with commas between")
        if self.mode == "beside" and (self.vllm is None or not Path(self.vllm, "bin", "python").is_file()):
            raise ConfigError(f"vllm={self.vllm!r} is no environment of Python; lab/peers/install.py makes one")
        if not (Path(self.model) / "tokenizer.json").is_file():
            raise ConfigError(f"model={self.model!r} is no folder of a model with a tokenizer.json")


def disturb(options: Options) -> dict[str, Any]:
    """Run what `options.mode` names. The result's `well` says whether all is as it should be."""
    options.check()
    model = Path(options.model).resolve()
    names = {"benchmark": "chaos", "mode": options.mode}
    if options.mode == "beside":
        return {**names, **disturb_both(model, Path(str(options.vllm)), options.step_timeout_s)}
    if options.mode == "saturation":
        figures = saturate(model, options.ranks, options.seconds, options.clients, options.step_timeout_s, options.seed)
        return {**names, **figures}
    if options.mode == "chaos":
        weather = Weather(
            seconds=options.seconds,
            fault_every_s=options.fault_every_s,
            clients=options.clients,
            tokens=options.max_tokens,
            step_timeout_s=options.step_timeout_s,
            seed=options.seed,
        )
        return {**names, **let_loose(model, options.ranks, weather)}

    number = signal.SIGKILL if options.mode == "kills" else signal.SIGSTOP
    plan = Plan(number, options.times, options.max_tokens, options.step_timeout_s, options.seed)
    groups = {size: disturb_group(model, int(size), plan) for size in options.groups.split(",")}
    well = all(not group["differences"] and not group["left_behind"] for group in groups.values())
    return {**names, "groups": groups, "well": well}


def disturb_and_judge(options: Options) -> dict[str, Any]:
    """Run it; the program ends with 1 unless all is well."""
    result = disturb(options)
    if not result["well"]:
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


if __name__ == "__main__":
    # Whoever ends this ends its server too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run(Options, disturb_and_judge)
