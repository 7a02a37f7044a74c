"""The kernels of decode steps, one by one and in CUDA graphs, and of a prompt, each beside what it must do at least."""

from __future__ import annotations

import cProfile
import pstats
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from phalanx.benchmarks.limits import Work
from phalanx.engine.engine import Engine
from phalanx.engine.execution.rank_worker import LaunchedStep, Worker
from phalanx.engine.protocol.transport import InProcess
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart, StepPlan
from phalanx.kernels import cuda
from phalanx.parallel.group import local_group

from ..children import failure
from ..device import Mark, synchronize
from ..probe import fill_cache
from ..serving import LEAST_CONTEXT, engine_config
from ..shapes import Shape
from .kernel_roles import Case, Event, least_of, tabulate
from .roofline import Ceilings

MOST_ROWS = 64
MOST_BATCHED_TOKENS = 2048
TIMED_STEPS, PROFILED_STEPS, WARM_STEPS = 30, 10, 3
LAUNCHES, FUNCTIONS_SHOWN = 10, 20
INTERPRETED = "interpret=true: what a profiler sees are the interpreter's own operations"


class Bench:
    """A worker whose step loop is this thread, and what is measured of its model."""

    def __init__(self, shape: Shape, worker: Worker, device: torch.device, ceilings: Ceilings) -> None:
        self._shape = shape
        self._worker = worker
        self._device = device
        self._ceilings = ceilings
        self._steps = min(TIMED_STEPS, shape.sizes.steps), min(PROFILED_STEPS, shape.sizes.steps)
        self._traced = False

    def eager(self) -> dict[str, Any]:
        """Decode steps whose kernels are started one by one. Comes before graphs()."""
        return self._measure(self._decodes())

    def prompt(self) -> dict[str, Any]:
        """A prompt in one step, up to its first token."""
        return self._measure([Case(1, 0, self._shape.sizes.prompts[0])])

    def graphs(self) -> dict[str, Any]:
        """Decode steps that replay CUDA graphs."""
        if self._worker.settings.graphs == "none":
            return {"skipped": f"device={self._device.type} has no CUDA graphs"}
        cases = self._decodes()
        for case in reversed(cases):
            self._worker.capture(case.rows)
        return self._measure(cases)

    def host(self) -> dict[str, Any]:
        """What the host does until a step is launched, by function: after graphs(), a decode is a replay."""
        if cuda.interpreting():
            return {"skipped": INTERPRETED}
        [first, *_] = self._decodes()
        prompt = Case(1, 0, self._shape.sizes.prompts[0])
        return {case.name: self._launches(case) for case in (first, prompt)}

    def _launches(self, case: Case) -> dict[str, Any]:
        plans = self._plans(case)
        times = []
        profile = cProfile.Profile()
        self._run(plans, WARM_STEPS)
        for profiled in (False, True):
            for plan in islice(plans, min(LAUNCHES, self._shape.sizes.steps)):
                synchronize(self._device)
                if profiled:
                    step = profile.runcall(self._worker.launch, plan)
                else:
                    started = time.perf_counter()
                    step = self._worker.launch(plan)
                    times.append(time.perf_counter() - started)
                step.result()
        return {"launch_us": round(1e6 * statistics.median(times), 1), "functions": functions_of(profile, len(times))}

    def _decodes(self) -> list[Case]:
        """Every batch at the context wanted, or at as much of it as the KV cache holds."""
        sizes = self._shape.sizes
        capacity = self._worker.capacity
        cases = []
        for rows in (rows for rows in sizes.batches if rows <= MOST_ROWS):
            room = capacity.num_blocks // rows * capacity.block_size - self._most_steps
            context = min(sizes.context, room)
            if context >= LEAST_CONTEXT:
                cases.append(Case(rows, context))
        return cases

    @property
    def _most_steps(self) -> int:
        """Steps in which a sequence decodes, warm-up included."""
        return WARM_STEPS + sum(self._steps)

    def _measure(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Every case's table, or how the case failed."""
        if cuda.interpreting():
            return {"skipped": INTERPRETED}
        fill_cache(self._worker)
        results: dict[str, Any] = {}
        for case in cases:
            try:
                results[case.name] = self._table(case)
            except RuntimeError as error:  # out of memory is one
                results[case.name] = failure(error)
        return results

    def _table(self, case: Case) -> dict[str, Any]:
        plans = self._plans(case)
        timed, profiled = self._steps
        self._run(plans, WARM_STEPS)
        begin = Mark(self._device)
        self._run(plans, timed)
        end = Mark(self._device)
        synchronize(self._device)
        events = self._trace(plans, profiled)
        least = least_of(Work(self._shape.spec), replace(case, context=case.context + self._most_steps // 2))
        return tabulate(events, profiled, end.seconds_since(begin) / timed, least, self._ceilings)

    def _plans(self, case: Case) -> Iterator[StepPlan]:
        return plans_of(case, self._most_steps, self._worker.capacity.block_size, self._shape.spec.vocab_size)

    def _run(self, plans: Iterator[StepPlan], steps: int) -> None:
        """As the engine does: the next step is launched before this one's tokens are asked for."""
        earlier: LaunchedStep | None = None
        for plan in islice(plans, steps):
            step = self._worker.launch(plan)
            if earlier is not None:
                earlier.result()
            earlier = step
        if earlier is not None:
            earlier.result()

    def _trace(self, plans: Iterator[StepPlan], steps: int) -> list[Event]:
        """The kernels of so many steps; on a CPU torch's operations, which are what it has instead."""
        on_gpu = self._device.type == "cuda"
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        if not self._traced:
            with torch.profiler.profile(activities=[activity]):  # the first one takes seconds to start
                synchronize(self._device)
            self._traced = True
        with torch.profiler.profile(activities=[activity]) as profiler:
            self._run(plans, steps)
            synchronize(self._device)
        events = [event for event in profiler.events() or [] if event.device_type == kind and event.cpu_parent is None]
        return [(event.name, event.time_range.start, event.time_range.end) for event in events]


@contextmanager
def open_bench(
    shape: Shape, folder: Path, device: torch.device, interpret: bool, ceilings: Ceilings
) -> Iterator[Bench]:
    """A worker with dummy weights, as large a KV cache as there is memory for, and no graph captured yet."""
    config = engine_config(shape, folder, device.type, interpret, shape.sizes.context + shape.sizes.slack)
    config = replace(
        config,
        max_num_seqs=max(rows for rows in shape.sizes.batches if rows <= MOST_ROWS),
        max_num_batched_tokens=min(config.max_num_batched_tokens, MOST_BATCHED_TOKENS),
        graphs="lazy" if device.type == "cuda" else "none",
    )
    engine = Engine(config, local_group(device), InProcess().transport)
    try:
        yield Bench(shape, engine.worker, device, ceilings)
    finally:
        engine.worker.close()


def functions_of(profile: cProfile.Profile, steps: int) -> list[dict[str, Any]]:
    """The functions with the most time of their own, in microseconds a step; profiling adds to each call."""
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]]
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    largest = sorted(stats.items(), key=lambda item: -item[1][2])[:FUNCTIONS_SHOWN]
    return [
        {
            "function": f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"[-90:],
            "calls": round(calls / steps, 1),
            "us": round(1e6 * own / steps, 1),
            "with_callees_us": round(1e6 * whole / steps, 1),
        }
        for (file, line, name), (_, calls, own, whole, _) in largest
    ]


def plans_of(case: Case, steps: int, block_size: int, vocab_size: int) -> Iterator[StepPlan]:
    """`steps` steps of the case. A decoded token is sent two steps after it was sampled, as with `overlap`."""
    draw = random.Random(case.tokens)
    slots = list(range(case.rows))
    blocks = -(-(case.prompt or case.context + steps) // block_size)
    entries = [(slot, index) for slot in slots for index in range(blocks)]
    ids = draw.sample(range(len(entries)), len(entries))

    for i in range(steps):
        told = slots if i >= 2 and not case.prompt else []
        yield StepPlan(
            step=i,
            starts=_starts(case, draw, vocab_size) if case.prompt or i == 0 else [],
            token_slots=told,
            token_ids=[7] * len(told),
            block_slots=[slot for slot, _ in entries] if i == 0 else [],
            block_indices=[index for _, index in entries] if i == 0 else [],
            block_ids=ids if i == 0 else [],
            slots=slots,
            positions=[0 if case.prompt else case.context - 1 + i] * case.rows,
            counts=[case.prompt or 1] * case.rows,
            num_decodes=0 if case.prompt else case.rows,
            sample_rows=slots,
        )


def _starts(case: Case, draw: random.Random, vocab_size: int) -> list[SlotStart]:
    """Sequences of random tokens, all in the blocks that they have."""
    length = case.prompt or case.context
    return [
        SlotStart(slot, length, [draw.randrange(vocab_size) for _ in range(length)], SlotSampling())
        for slot in range(case.rows)
    ]
