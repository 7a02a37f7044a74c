"""An engine of one model: its decode steps, time to the first token and throughput, and the kernels of a step."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from phalanx import LLM, EngineConfig, SamplingParams
from phalanx.benchmarks import throughput
from phalanx.benchmarks.lab.peers.programs.program import random_prompts
from phalanx.benchmarks.limits import Work, share
from phalanx.benchmarks.throughput import Load, summarize
from phalanx.engine.client.llm import choose_device
from phalanx.engine.engine import Engine
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.messages import Submit
from phalanx.engine.protocol.transport import InProcess
from phalanx.parallel.group import local_group

from .device import synchronize
from .kernel_times.roofline import Ceilings, busy_time, decode_figures, mixed_s, prefill_figures
from .probe import TIMEOUT_S, UNLIMITED, Batch, DecodeProbe, fill_cache, time_decode
from .shapes import MixedRequest, Shape, mixed_requests

KV_MEMORY = 0.95
LEAST_CONTEXT = 16
"""With less, a batch that does not fit is not measured at all."""
PROFILED_STEPS = 12
KERNELS_SHOWN = 25
NANO_VLLM_TEMPERATURE = 0.6


class Served:
    """A running engine of a shape, with the client that measures it."""

    def __init__(self, shape: Shape, llm: LLM, engine: Engine, ceilings: Ceilings, started: float) -> None:
        self.shape = shape
        self.llm = llm
        self.engine = engine
        self.ceilings = ceilings
        self.work = Work(shape.spec)
        self.device = engine.group.device
        self.max_model_len = engine.worker.capacity.max_model_len
        status = llm.status()
        self.report = {
            "ready_s": round(time.monotonic() - started, 2),
            "max_model_len": self.max_model_len,
            "kv_cache_tokens": status.total_blocks * status.block_size,
            "peak_memory_bytes": status.peak_memory,
            "report": status.report,
        }

    def rows_of(self, context: int) -> int:
        """Sequences of so many tokens, and the slack, that the KV cache holds."""
        return self._spare_blocks // -(-(context + self.shape.sizes.slack) // self._block_size)

    def context_of(self, rows: int) -> int:
        """Tokens that so many sequences may have beside the slack."""
        return self._spare_blocks // rows * self._block_size - self.shape.sizes.slack

    @property
    def _spare_blocks(self) -> int:
        # The scheduler admits nobody who would leave no block.
        return self.engine.worker.capacity.num_blocks - 1

    @property
    def _block_size(self) -> int:
        return self.engine.worker.capacity.block_size


def engine_config(shape: Shape, folder: Path, device: str, interpret: bool, max_model_len: int) -> EngineConfig:
    """The configuration that a server for many users would have; `interpret` is the GPU's path on a CPU."""
    sizes = shape.sizes
    # Small blocks, as the contexts are: the scheduler admits nobody who would leave no block.
    interpreted = {"attention": "triton", "graphs": "eager", "block_size": 16} if interpret else {}
    return EngineConfig(
        model=str(folder),
        device=device,
        dtype="bfloat16",
        load_format="dummy",
        tokenizer="none",
        max_num_seqs=max(sizes.batches),
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_model_len=max_model_len,
        kv_memory=KV_MEMORY if device == "cuda" else 2.0**26,
        prefix_cache=False,
        overlap=True,
        **interpreted,
    )


def lengths_to_try(shape: Shape) -> list[int]:
    """max_model_len for all that is to be measured; then without the longest prompts, where memory is short."""
    sizes = shape.sizes
    least = max(sizes.context + sizes.slack, 2 * sizes.lengths[1])
    return sorted({max(least, prompt + 1) for prompt in sizes.prompts}, reverse=True)


@contextmanager
def serve(shape: Shape, folder: Path, device: str, interpret: bool, ceilings: Ceilings) -> Iterator[Served]:
    """An engine in this process, with as long a max_model_len as the device has memory for. Raises ConfigError."""
    refusals: list[str] = []
    for length in lengths_to_try(shape):
        gc.collect()  # what is left of one that was refused: the next has no room beside its weights
        started = time.monotonic()
        link = InProcess()
        config = engine_config(shape, folder, device, interpret, length)
        try:
            engine = Engine(config, local_group(choose_device(config)), link.transport)
            break
        except ConfigError as error:
            refusals.append(f"max_model_len={length}: {error}")
    else:
        raise ConfigError("; ".join(refusals))
    with LLM.from_engine(engine, link) as llm:
        served = Served(shape, llm, engine, ceilings, started)
        served.report["refused"] = refusals
        yield served


def measure_decode(served: Served) -> dict[str, Any]:
    """Every batch at the context wanted. One that does not fit is skipped, and measured at a shorter one instead."""
    sizes = served.shape.sizes
    fill_cache(served.engine.worker)
    results: dict[str, Any] = {}
    for rows in sizes.batches:
        fits = served.rows_of(sizes.context)
        if rows <= fits:
            results[str(rows)] = _decode(served, rows, sizes.context)
            continue
        reason = (
            f"the KV cache of {served.report['kv_cache_tokens']} tokens holds {fits} sequences of {sizes.context} and "
            f"{sizes.slack} more tokens, not {rows}"
        )
        shorter = min(sizes.context, served.context_of(rows))
        instead = _decode(served, rows, shorter) if shorter >= LEAST_CONTEXT else None
        results[str(rows)] = {"skipped": reason, "instead": instead}
    return results


def _decode(served: Served, rows: int, context: int) -> dict[str, Any]:
    sizes = served.shape.sizes
    timed = time_decode(served.llm, served.engine, rows, context, sizes.steps, sizes.warm_steps)
    figures = decode_figures(served.work, rows, timed["context"], timed.pop("seconds"), served.ceilings)
    return {**figures, **timed, "context": round(timed["context"], 1)}


def measure_prefill(served: Served) -> dict[str, Any]:
    """Time to the first token of prompts of every length, one at a time: the median of the repeats."""
    results: dict[str, Any] = {}
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for length in served.shape.sizes.prompts:
        if length >= served.max_model_len:
            results[str(length)] = {"skipped": f"max_model_len={served.max_model_len} is all there is memory for"}
            continue
        times = []
        prompts = random_prompts(served.shape.sizes.repeats + 1, length, served.shape.spec.vocab_size, seed=length)
        for prompt in prompts:
            started = time.perf_counter()
            served.llm.generate(prompt, sampling)
            times.append(time.perf_counter() - started)
        seconds = statistics.median(times[1:])  # the first pays for set-up
        results[str(length)] = prefill_figures(served.work, length, seconds, served.ceilings)
        results[str(length)]["runs_ms"] = [round(1e3 * value, 3) for value in times]
    return results


def measure_throughput(served: Served) -> dict[str, Any]:
    """The mixed load, sent all at once, sampled as in nano-vllm's benchmark."""
    requests = mixed_requests(served.shape.sizes, served.shape.spec.vocab_size)
    warm = [MixedRequest(request.prompt, 4) for request in requests[:8]]  # the first steps pay for set-up
    Load(served.llm, throughput.Options(), _submits("warm", warm)).run()
    before = served.llm.status()
    seconds, seen = Load(served.llm, throughput.Options(), _submits("mixed", requests)).run()
    after = served.llm.status()
    lengths = [(len(request.prompt), request.new_tokens) for request in requests]
    best = mixed_s(served.work, lengths, *served.ceilings.rates)
    return {
        **summarize(seconds, seen),
        "steps": after.steps - before.steps,
        "preemptions": after.preemptions - before.preemptions,
        "roofline_s": round(best, 3),
        "share_of_roofline": share(best, seconds),
    }


def _submits(name: str, requests: list[MixedRequest]) -> list[Submit]:
    return [
        Submit(
            id=f"{name}-{i}",
            token_ids=request.prompt,
            sampling=SamplingParams(max_tokens=request.new_tokens, temperature=NANO_VLLM_TEMPERATURE, ignore_eos=True),
        )
        for i, request in enumerate(requests)
    ]


def measure_profile(served: Served) -> dict[str, Any]:
    """Which kernels decode steps consist of, as torch's profiler sees them, of one row and of the largest batch.

    Rows for which the cache is too small have the context that fits. The idle share is of all gaps, within steps too,
    and includes what profiling itself costs the host.
    """
    if served.device.type != "cuda":
        return {"skipped": "torch's profiler sees the kernels of a GPU only: device=cpu has none"}
    sizes = served.shape.sizes
    fill_cache(served.engine.worker)
    most = max(rows for rows in sizes.batches if rows == 1 or served.context_of(rows) >= LEAST_CONTEXT)
    return {str(rows): _profiled(served, rows) for rows in sorted({1, most})}


def _profiled(served: Served, rows: int) -> dict[str, Any]:
    sizes = served.shape.sizes
    room = served.context_of(rows) + served.shape.sizes.slack
    context = min(sizes.context, room - sizes.slack)
    # Long enough to last while the profiler starts.
    batch = Batch(served.llm, served.engine, rows, context, min(room, served.max_model_len) - context)

    ended = threading.Event()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities):  # the first one takes seconds to start
        synchronize(served.device)

    with DecodeProbe(served.engine, rows, UNLIMITED) as probe:
        batch.start(ended)
        _wait_until(lambda: len(probe.ends) >= sizes.warm_steps or ended.is_set())
        with torch.profiler.profile(activities=activities) as profiler:
            first = len(probe.ends)
            _wait_until(lambda: len(probe.ends) >= first + PROFILED_STEPS or ended.is_set())
            steps = len(probe.ends) - first
        batch.end()

    kernels = [event for event in profiler.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return kernel_table([(kernel.name, kernel.time_range.start, kernel.time_range.end) for kernel in kernels], steps)


def _wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)


def kernel_table(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """Return the idle share and the kernels that took most time, from (kernel, start, end) in microseconds."""
    if not events:
        raise RuntimeError("the profiler saw no kernels")

    span = max(end for _, _, end in events) - min(start for _, start, _ in events)
    by_name: dict[str, list[float]] = {}
    for name, start, end in events:
        by_name.setdefault(name, []).append(end - start)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:KERNELS_SHOWN]

    return {
        "steps": steps,
        "idle_share": round(1 - busy_time([(start, end) for _, start, end in events]) / span, 4),
        "kernels": [
            {
                "name": name[:120],
                "us_per_step": round(sum(times) / max(1, steps), 2),
                "calls_per_step": round(len(times) / max(1, steps), 1),
            }
            for name, times in largest
        ],
    }
