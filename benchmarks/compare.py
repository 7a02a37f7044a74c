"""phalanx beside other engines: same weights, same prompts, same run, in turns and never two at once.

    python benchmarks/compare.py model=models/qwen2-5-0-5b peers=vllm,openvino,llamacpp ranks=1,2 repeats=5 out=FILE

Each engine is a process of its own, loaded once. All others are suspended while one runs. Round after round, each case
is given to one engine after the other, and each round begins one engine later: what a machine has just done tells on
how fast it is next. The figures are medians over the rounds, and a ratio is the median of the ratios within the rounds;
where the machine is too noisy to tell, it says so instead (peers/verdict.py). The limits are this machine's, measured
before and after the rounds, and the rates of memory and of tiles before and after each run too, for on a shared host
they change from minute to minute. share_of_limit counts the bytes that an engine's weights take, share_of_bf16_limit
two a weight. The last line is JSON. benchmarks/lab/peers/install.py installs the peers.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.common import ROOT, model_folder, percentiles, run
from phalanx.benchmarks.lab.peers.engines import Planned, Sizes, plan_peers, plan_phalanx
from phalanx.benchmarks.lab.peers.plot import chart, document
from phalanx.benchmarks.lab.peers.process import EngineProcess
from phalanx.benchmarks.lab.peers.programs.program import Case, read_case
from phalanx.benchmarks.lab.peers.verdict import Outcomes, judge, lines
from phalanx.benchmarks.lab.rates import measure_now
from phalanx.benchmarks.latency import whole_numbers
from phalanx.engine.errors import ConfigError, EngineStopped
from phalanx.engine.models.spec import read_config, spec_from_config

CONCURRENCIES = (1, 2, 4, 8, 16, 32)
CONCURRENCY_CASE = "{},128,128"
RATES = (0.5, 1.0, 2.0, 4.0)
RATE_CASE = "16,128,64,{}"
WARM_UP_TOKENS = 3
WARN_BELOW = 5  # rounds
RATE_UNITS = ("_gb_s", "_gflops", "_one_thread")
IDLE_S = 2.0

Lines = dict[str, list[tuple[float, float]]]


@dataclass
class Options:
    """What to compare."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    peers: str | None = "vllm,openvino,openvino_int8,llamacpp,llamacpp_q8,transformers"
    cases: str | None = "1,64,64;32,128,128;1,1024,1"  # REQUESTS,PROMPT,NEW[,REQUESTS A SECOND]
    ranks: str = "1,2"  # of phalanx and of the peers that know ranks
    variants: str = ""  # of phalanx, fields of EngineConfig: ";quantization=int8" is as it is, and quantized
    repeats: int = 5
    curves: bool = False  # also throughput by concurrency and latency by request rate, one round each
    plot: str | None = None  # an SVG file for the curves
    peers_folder: str | None = None  # as install.py filled it; without one the folder `peers` beside the repository
    limits_s: float = 0.5  # of each measurement of the machine's limits; 0 leaves them out
    out: str | None = None  # a file for the JSON line

    def read_cases(self, vocab_size: int) -> dict[str, Case]:
        """Raises ConfigError."""
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats} must be at least 1")
        if self.plot and not self.curves:
            raise ConfigError(f"plot={self.plot} draws the curves: set curves=true")
        try:
            return {text: read_case(text, vocab_size) for text in (self.cases or "").split(";") if text}
        except ValueError as error:
            raise ConfigError(f"cases: {error}") from error


class Contest:
    """The engines that are still in, all suspended but the one that runs."""

    def __init__(
        self, cases: Mapping[str, Case], logs: Path, measure: Callable[[], dict[str, float]] = measure_now
    ) -> None:
        self.report: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.planned: dict[str, Planned] = {}
        self._cases = cases
        self._logs = logs
        self._measure = measure
        self._processes: dict[str, EngineProcess] = {}

    def enter(self, planned: Planned) -> None:
        """Start an engine, and run every case with few tokens: the first pays for set-up that no later one does."""
        name = planned.name
        try:
            process = EngineProcess(name, list(planned.command), self._logs / f"{name.replace(' ', '-')}.log")
        except EngineStopped as error:
            self._fail(name, error)
            return

        self.planned[name] = planned
        self._processes[name] = process
        for case in self._cases.values():
            short = Case(case.prompts, min(WARM_UP_TOKENS, case.new_tokens), [0.0] * len(case.prompts))
            if self.run(name, short) is None:
                return

        # An engine that computes while it has nothing to do disturbs the others: the report says so.
        process.go_on()
        busy = process.busy_cores(IDLE_S)
        process.stop()

        self.report[name] = {
            "version": process.version,
            "ready_s": process.ready_s,
            "idle_cores": busy,
            "memory_gb": round(process.memory_bytes() / 1e9, 2),
        }
        print(f"{name}: {process.version}, ready in {process.ready_s} s, keeps {busy} cores busy when idle", flush=True)

    def run(self, name: str, case: Case) -> dict[str, Any] | None:
        """The outcome of a case; None if the engine failed, which puts it out of the contest."""
        process = self._processes[name]
        process.go_on()
        try:
            return process.run(case)
        except EngineStopped as error:
            self._fail(name, error)
            return None
        finally:
            process.stop()

    def round(self, cases: Mapping[str, Case], outcomes: Outcomes, title: str, first: int = 0) -> None:
        """Every case by every engine that can, one after another from place `first` on; adds to the outcomes.

        The machine's rates are measured between the runs, while all engines are suspended.
        """
        for text, case in cases.items():
            before = self._measure()
            names = list(self._processes)
            start = first % max(1, len(names))
            for name in names[start:] + names[:start]:
                if any(case.due_s) and not self.planned[name].arrivals:
                    continue
                outcome = self.run(name, case)
                after = self._measure()
                if outcome is not None:
                    outcome |= {"limits_before": before, "limits_after": after}
                    outcomes.setdefault(text, {}).setdefault(name, []).append(outcome)
                    ttft = statistics.median(outcome["ttft_s"])
                    speed = outcome["output_tokens_per_s"]
                    print(f"{title}, {text}: {name}: {speed} output tokens/s, TTFT {ttft:.3f} s", flush=True)
                before = after

    def close(self) -> None:
        """End all engines."""
        while self._processes:
            self._processes.popitem()[1].close()

    def _fail(self, name: str, error: EngineStopped) -> None:
        print(f"{name} is out: {error}", file=sys.stderr, flush=True)
        self.failures[name] = str(error)
        if name in self._processes:
            self._processes.pop(name).close()


def measure_limits(folder: Path, seconds: float) -> dict[str, float]:
    """The rates of limits.py, measured by a process of its own. Empty if seconds is 0. Raises ConfigError."""
    if not seconds:
        return {}
    command = [sys.executable, str(ROOT / "benchmarks" / "limits.py"), f"model={folder}", f"seconds={seconds}"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        raise ConfigError(f"limits.py ended with exit code {process.returncode}; its error stands above")
    *said, last = process.stdout.splitlines()
    for text in said:
        if text.startswith("the machine is busy"):
            print(text, flush=True)
    line = json.loads(last)
    return {name: value for name, value in line.items() if name.endswith(RATE_UNITS) and value}


def sizes_of(cases: Sequence[Case]) -> Sizes:
    """What an engine has to hold to run any of some cases."""
    longest = [len(case.prompts[0]) + case.new_tokens for case in cases]
    return Sizes(max(longest), max(length * len(case.prompts) for length, case in zip(longest, cases, strict=True)))


def curve_cases(vocab_size: int) -> tuple[dict[str, Case], dict[str, Case]]:
    """The cases of the curves: by concurrency, and by request rate."""
    texts = (
        [CONCURRENCY_CASE.format(count) for count in CONCURRENCIES],
        [RATE_CASE.format(rate) for rate in RATES],
    )
    by_concurrency, by_rate = ({text: read_case(text, vocab_size) for text in kind} for kind in texts)
    return by_concurrency, by_rate


def curve(outcomes: Outcomes, index: int, value: Callable[[Mapping[str, Any]], float]) -> Lines:
    """Each engine's points: a number of the case's text, and a value of its outcome."""
    lines: Lines = {}
    for text, engines in outcomes.items():
        for name, runs in engines.items():
            lines.setdefault(name, []).append((float(text.split(",")[index]), value(runs[0])))
    return lines


def draw_curves(contest: Contest, vocab_size: int, plot: str | None) -> dict[str, Any]:
    """Run the curves' cases, once, and draw them."""
    by_concurrency, by_rate = curve_cases(vocab_size)
    concurrency: Outcomes = {}
    rate: Outcomes = {}
    contest.round(by_concurrency, concurrency, "curve")
    contest.round(by_rate, rate, "curve")

    curves = {
        "output_tokens_per_s_by_concurrency": curve(concurrency, 0, lambda run: run["output_tokens_per_s"]),
        "latency_s_by_requests_per_s": curve(rate, 3, lambda run: (percentiles(run["latency_s"], 3) or {})["p50"]),
        "ttft_s_by_requests_per_s": curve(rate, 3, lambda run: (percentiles(run["ttft_s"], 3) or {})["p50"]),
    }

    if plot:
        labels = (
            ("Throughput, 128+128 tokens", "requests at once", "output tokens/s"),
            ("Latency of 128+64 tokens, median", "requests a second", "seconds"),
            ("Time to the first token, median", "requests a second", "seconds"),
        )
        charts = [chart(*label, lines) for label, lines in zip(labels, curves.values(), strict=True)]
        Path(plot).write_text(document(charts))
    return curves


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    folder = model_folder(options.model, options.random).resolve()
    spec = spec_from_config(read_config(folder), folder.name)
    cases = options.read_cases(spec.vocab_size)
    ranks = whole_numbers("ranks", options.ranks)

    # Who takes part: phalanx in its variants, and the peers that are installed.
    installed = Path(options.peers_folder or ROOT.parent / "peers").resolve()
    sizes = sizes_of([*cases.values(), *(case for kind in curve_cases(spec.vocab_size) for case in kind.values())])
    planned = plan_phalanx(folder, options.variants.split(";"), ranks, sizes)
    peers, missing = plan_peers(
        folder, [name for name in (options.peers or "").split(",") if name], ranks, sizes, installed
    )
    for message in missing:
        print(message, file=sys.stderr)

    if options.repeats < WARN_BELOW:
        print(f"repeats={options.repeats}: a median of fewer than {WARN_BELOW} rounds says little", flush=True)

    # The machine's limits are measured before and after the rounds.
    before = measure_limits(folder, options.limits_s)
    outcomes: Outcomes = {}
    curves = None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no suspended engine is left behind

    with ExitStack() as stack:
        logs = Path(tempfile.mkdtemp(prefix="phalanx-compare-"))
        contest = Contest(cases, logs)
        stack.callback(contest.close)
        for engine in planned:
            contest.enter(engine)
        if contest.failures:
            raise EngineStopped("without phalanx there is nothing to compare")
        for engine in peers:
            contest.enter(engine)

        for number in range(options.repeats):
            contest.round(cases, outcomes, f"round {number + 1}", first=number)
        after = measure_limits(folder, options.limits_s)
        if options.curves:
            curves = draw_curves(contest, spec.vocab_size, options.plot)

    # The better of the two measurements is the limit.
    limits = {name: max(value, after.get(name, value)) for name, value in before.items()}
    verdict = judge(cases, outcomes, contest.planned, spec, limits)
    print("\n".join(lines(verdict)), flush=True)

    return {
        "benchmark": "compare",
        "cases": verdict,
        "curves": curves,
        "engines": contest.report,
        "failed": contest.failures,
        "missing": missing,
        "limits": limits,
        "limits_before": before,
        "limits_after": after,
    }


if __name__ == "__main__":
    run(Options, measure)
