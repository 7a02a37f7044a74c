"""Decode steps of a full batch, timed inside the engine's own step loop, without computing the prompts first."""

from __future__ import annotations

import itertools
import queue
import statistics
import threading
import time
from types import TracebackType
from typing import Any

import torch
from phalanx import LLM, SamplingParams
from phalanx.engine.client.client import to_error
from phalanx.engine.engine import Engine
from phalanx.engine.errors import EngineStopped
from phalanx.engine.execution.rank_worker import LaunchedStep, Worker
from phalanx.engine.protocol.messages import Event, Failed, Finished, Submit
from phalanx.engine.scheduling.step_plan import StepPlan

from .device import Mark, synchronize
from .kernel_times.roofline import idle_share

TIMEOUT_S = 120.0
UNLIMITED = 2**30


class DecodeProbe:
    """Stands between an engine's step loop and its worker while it is entered.

    Only steps of `rows` decode rows reach the device, and are timed. All others, the prompts' above all, are declared
    done: their tokens are 0, and what they would have written to the KV cache are random numbers from before. So a
    batch of a long context is there at once, and its steps go through scheduler, plan, graphs and overlap as any other.
    """

    def __init__(self, engine: Engine, rows: int, steps: int) -> None:
        assert engine.coordinator is not None
        self._worker: Any = engine.worker  # two of its methods are covered
        self._scheduler = engine.coordinator._scheduler
        self._device = engine.group.device
        self._rows = rows
        self._steps = steps
        self._launch = engine.worker.launch
        self._batch = engine.worker.slot_table.batch
        self._budget = self._scheduler.max_num_batched_tokens
        self.arrivals: list[float] = []  # when the host had each step's tokens
        self.begins: list[Mark] = []  # when the device had each step's inputs
        self.ends: list[Mark] = []
        self.contexts: list[float] = []  # of each step, the tokens that its rows read on average
        self.done = threading.Event()

    def __enter__(self) -> DecodeProbe:
        # What is not computed needs no budget: the fewer steps until all rows run, the closer their lengths.
        self._scheduler.max_num_batched_tokens = UNLIMITED
        self._worker.launch = self._probed
        self._worker.slot_table.batch = self._noted_batch
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._worker.launch, self._worker.slot_table.batch
        self._scheduler.max_num_batched_tokens = self._budget

    def _probed(self, plan: StepPlan) -> LaunchedStep:
        if not plan.only_decodes or len(plan.slots) != self._rows:
            return self._pretended(plan)
        step = self._launch(plan)
        self.ends.append(Mark(self._device))
        self.contexts.append(statistics.fmean(plan.positions) + 1)
        result = step.result

        def arrived() -> Any:
            value = result()
            self.arrivals.append(time.perf_counter())
            if len(self.arrivals) >= self._steps:
                self.done.set()
            return value

        step.result = arrived  # type: ignore[method-assign]
        return step

    def _noted_batch(self, plan: StepPlan, pad_to: int = 0) -> Any:
        batch = self._batch(plan, pad_to)
        self.begins.append(Mark(self._device))
        return batch

    def _pretended(self, plan: StepPlan) -> LaunchedStep:
        self._worker.slot_table.apply(plan)
        tokens = torch.zeros(len(plan.sample_rows), dtype=torch.int64)
        if self._worker.settings.overlap and plan.sample_rows:
            slots = torch.tensor([plan.slots[row] for row in plan.sample_rows])
            with torch.inference_mode():
                self._worker.slot_table.remember(slots.to(self._device), tokens.to(self._device))
        return LaunchedStep(tokens, [None] * len(tokens), {})


class Batch:
    """Requests that run until they are told to end."""

    def __init__(self, llm: LLM, engine: Engine, rows: int, context: int, new_tokens: int) -> None:
        assert engine.coordinator is not None
        self._llm = llm
        self._coordinator = engine.coordinator
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.failure: Failed | None = None
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        # One token fewer: the first that is sampled is the last of the context.
        self._left = {f"decode-{rows}-{i}" for i in range(rows)}
        self._submits = [Submit(id=name, token_ids=[7] * max(1, context - 1), sampling=sampling) for name in self._left]

    def start(self, changed: threading.Event) -> None:
        """Send them; they begin together. `changed` is set if one of them ends by itself."""

        def on_event(event: Event) -> None:
            if isinstance(event, Failed):
                self.failure = event
            if isinstance(event, Finished | Failed):
                changed.set()
                self._events.put(event)

        # The step loop waits until all have been taken in: the first would be far ahead of the last.
        inbox = self._coordinator._inbox
        waits = threading.Event()
        everybody = threading.Event()

        def wait() -> None:
            waits.set()
            everybody.wait(2 * TIMEOUT_S)

        self._coordinator.call_soon(wait)
        waits.wait(TIMEOUT_S)
        try:
            for submit in self._submits:
                self._llm.submit(submit, on_event, quick=True)
            until = time.monotonic() + TIMEOUT_S
            while inbox.qsize() < len(self._submits) and not changed.is_set():
                if time.monotonic() > until:
                    raise EngineStopped(f"{len(self._submits)} requests were not taken in within {TIMEOUT_S} s")
                time.sleep(0.001)
        finally:
            everybody.set()

    def end(self) -> None:
        """Abort them and wait until they have ended."""
        for name in self._left:
            self._llm.abort(name)
        until = time.monotonic() + TIMEOUT_S
        while self._left:
            event = self._events.get(timeout=max(0.1, until - time.monotonic()))
            self._left.discard(event.id)


def time_decode(llm: LLM, engine: Engine, rows: int, context: int, steps: int, warm_steps: int) -> dict[str, Any]:
    """Seconds of a step of `rows` sequences of about `context` tokens, and what of them the device was idle.

    Raises EngineStopped if the requests do not come to run together.
    """
    total = steps + warm_steps
    batch = Batch(llm, engine, rows, context, 3 * total)
    with DecodeProbe(engine, rows, total) as probe:
        batch.start(probe.done)
        probe.done.wait(TIMEOUT_S)
        arrived = len(probe.arrivals)
        batch.end()

    if batch.failure is not None:
        raise to_error(batch.failure)
    if arrived < total:
        raise EngineStopped(
            f"{arrived} of {total} steps of {rows} rows came before their requests or {TIMEOUT_S} s ended"
        )

    # The first steps warm up: times count from the last of them.
    synchronize(engine.group.device)
    marks = list(zip(probe.begins, probe.ends, strict=False))[warm_steps - 1 : total]
    gaps = [after[0].seconds_since(before[1]) for before, after in itertools.pairwise(marks)]
    arrivals = probe.arrivals[warm_steps - 1 : total]

    return {
        "seconds": (arrivals[-1] - arrivals[0]) / steps,
        "context": statistics.fmean(probe.contexts[warm_steps:total]),
        "host_gap_us": round(1e6 * statistics.fmean(max(0.0, gap) for gap in gaps), 1),
        "host_gap_share": idle_share(gaps, marks[-1][1].seconds_since(marks[0][1])),
    }


def fill_cache(worker: Worker) -> None:
    """Random numbers for all keys and values: what a device does, and how fast, may depend on what it computes with."""
    for pool in (*worker.cache.keys, *worker.cache.values):
        pool.normal_()
