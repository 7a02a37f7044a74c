"""What a step costs the coordinator before and after the ranks compute it: schedule, encode the plan, commit. No torch.

    python -m phalanx.benchmarks.parts.scheduler [--running 256 4096] [--steps 400]

All sequences decode; each step ends a few of them and admits as many new ones, whose prompts have to be computed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

from phalanx.engine.scheduling.request import Request
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling, StepResult, encode

PROMPT = 128
OUTPUT = 256
BLOCK_SIZE = 16
WARMUP = 50


def measure(running: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step with `running` sequences in steady state."""
    max_model_len = PROMPT + OUTPUT
    scheduler = Scheduler(
        num_blocks=running * (max_model_len // BLOCK_SIZE + 1),
        block_size=BLOCK_SIZE,
        max_num_seqs=running,
        max_num_batched_tokens=running + 2048,
        max_model_len=max_model_len,
        max_queue=2 * running,
        prefix_cache=True,
    )
    arrivals = 0

    def arrive(max_tokens: int) -> None:
        nonlocal arrivals
        prompt = [(arrivals * 7919 + i) % 150_000 for i in range(PROMPT)]
        scheduler.add(Request(str(arrivals), prompt, [SlotSampling(seed=arrivals)], max_tokens))
        arrivals += 1

    for i in range(running):
        arrive(1 + (i * OUTPUT) // running)  # ends are spread evenly from the start
    times: dict[str, list[float]] = {"schedule": [], "encode": [], "commit": [], "step": []}
    measured_from = None
    while len(times["step"]) < steps:
        while scheduler.waiting < max(1, running // 64):
            arrive(OUTPUT)
        start = time.perf_counter()
        plan = scheduler.schedule()
        scheduled = time.perf_counter()
        assert plan is not None
        encode(plan)
        encoded = time.perf_counter()
        count = len(plan.sample_rows)
        result = StepResult([plan.step % 1000] * count, [None] * count, {})
        before = time.perf_counter()
        scheduler.commit(plan, result)
        committed = time.perf_counter()
        if measured_from is None and plan.num_decodes >= 0.9 * running:
            measured_from = plan.step + WARMUP
        if measured_from is not None and plan.step >= measured_from:
            spans = (scheduled - start, encoded - scheduled, committed - before)
            for name, span in zip(("schedule", "encode", "commit"), spans, strict=True):
                times[name].append(span)
            times["step"].append(sum(spans))
    return summary(times)


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians of each part. The whole step also has its 99th percentile, and the rate that follows from its mean."""
    result = {f"{name}_ms": 1000 * statistics.median(spans) for name, spans in times.items()}
    result["step_p99_ms"] = 1000 * statistics.quantiles(times["step"], n=100)[98]
    result["steps_per_s"] = 1 / statistics.fmean(times["step"])
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    """Measure each number of running sequences, and print one JSON line with all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()

    results = {}
    for running in arguments.running:
        results[str(running)] = measure(running, arguments.steps)
        print(f"{running} running: {results[str(running)]}")

    print(
        json.dumps(
            {
                "benchmark": "scheduler",
                "running": results,
                "prompt": PROMPT,
                "output": OUTPUT,
                "block_size": BLOCK_SIZE,
                "steps": arguments.steps,
                "python": sys.version.split()[0],
                "machine": platform.processor() or platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
