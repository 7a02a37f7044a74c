"""Where one step's time goes on a CPU: attention, MLP, head, sampling, the batch's tensors, and the rest.

    python benchmarks/step.py random=qwen2_5_0_5b rows=1,32 context=192 prompts=1024

Each case is a step as the engine computes it, one rank on all cores: `rows` sequences of `context` tokens that each
compute one (a decode step), or one prompt of so many tokens. The step is timed whole. Then attention and MLP are timed
inside forward passes that run them one by one, and each other part by itself on the same weights and the same shapes.
`products_ms` is all that multiplies with weights, norms included: attention, MLP and head, less attention itself
(`attend_ms`). Beside them stands what the machine allows for the step: its bytes at the rate memory is read, and
its operations at the rate that registers are multiplied. Both are measured before and after each case, for on a shared
host they change from minute to minute; the better one counts. The last line is JSON.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from phalanx.benchmarks.lab.common import model_folder, run, significant
from phalanx.benchmarks.lab.peers.engines import weight_bytes
from phalanx.benchmarks.lab.rates import Limits, measure_limits, measure_now
from phalanx.benchmarks.latency import whole_numbers
from phalanx.benchmarks.limits import (
    Work,
    decode_step_s,
    layer_weights,
    prefill_s,
    share,
)
from phalanx.engine.config import EngineConfig
from phalanx.engine.errors import ConfigError
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.execution.worker_factory import build_worker
from phalanx.engine.models.spec import ModelSpec, read_config, spec_from_config
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart, StepPlan
from phalanx.kernels.torch_threads import one_torch_thread
from phalanx.kernels.weight_formats import get_weight_format
from phalanx.parallel.group import local_group


@dataclass
class Options:
    """What to run."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    rows: str = "1,32"  # of the decode steps
    context: int = 192  # tokens of each of their sequences
    prompts: str = "1024"  # tokens of the prompts
    repeats: int = 15
    quantization: str = "none"
    limits_s: float = 0.5  # of each measurement of the machine's limits
    out: str | None = None  # a file for the JSON line


def step_plan(rows: int, first: int, count: int, block_size: int) -> StepPlan:
    """Each of `rows` sequences computes `count` tokens from position `first` on, and one is sampled after them."""
    known = first + count
    blocks = -(-known // block_size)
    return StepPlan(
        step=1,
        starts=[SlotStart(slot, known, [7 + slot] * known, SlotSampling()) for slot in range(rows)],
        token_slots=[],
        token_ids=[],
        block_slots=[slot for slot in range(rows) for _ in range(blocks)],
        block_indices=list(range(blocks)) * rows,
        block_ids=list(range(rows * blocks)),
        slots=list(range(rows)),
        positions=[first] * rows,
        counts=[count] * rows,
        num_decodes=rows if count == 1 else 0,
        sample_rows=list(range(rows)),
    )


def median_ms(work: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the middle one of the repeats, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


class SublayerTimes:
    """The milliseconds that one forward pass spends in each of its named parts, in all layers together."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self._last = time.perf_counter()

    def __call__(self, name: str) -> None:
        """Hear that a part is done: what passed since the one before was its time."""
        now = time.perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now


class Parts:
    """The parts of one step of a worker, each as a function that does it for all layers."""

    def __init__(self, worker: Worker, plan: StepPlan) -> None:
        self.worker = worker
        self.plan = plan
        model = worker.model
        dtype = worker.settings.dtype
        worker.slot_table.apply(plan)
        self.batch = worker.slot_table.batch(plan)
        self.step = model.step(self.batch, self.batch.sample_tokens)
        self.layers = range(len(model.layers))
        qkv = next(model.layers.children()).attention.qkv
        self.qkv = torch.randn(plan.num_tokens, qkv.rows).to(dtype)
        self.last = torch.randn(len(plan.sample_rows), model.spec.hidden_size).to(dtype)
        self.logits = model.logits(self.last)

    def sublayers_ms(self, repeats: int) -> dict[str, float]:
        """Medians, over forward passes, of attention and MLP: with their norms, and as a step has them.

        In the last layer only the tokens from which others are sampled go on after the keys and values.
        """
        passes = [SublayerTimes() for _ in range(repeats + 1)]
        for times in passes:
            self.worker.model(self.batch, self.worker.cache, self.batch.sample_tokens, times)
        return {
            f"{name}_ms": statistics.median(times.ms[name] for times in passes[1:]) for name in ("attention", "mlp")
        }

    def attend(self) -> None:
        """What attention does that is no product with a weight: rotation, storing, attention."""
        backend = self.worker.settings.backend
        step = self.step
        cache = self.worker.cache
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            q = backend.rotate_and_store(self.qkv.clone(), step.cos, step.sin, None, keys, values, step.slot_mapping)
            if step.logits_indices is not None and layer == self.layers[-1]:
                backend.attend(q[step.logits_indices.tokens], keys, values, step.logits_indices.plan)
            else:
                backend.attend(q, keys, values, step.attention_plan)

    def head(self) -> None:
        """Compute the logits."""
        self.worker.model.logits(self.last)

    def sampling(self) -> None:
        """The choice of tokens, here the likeliest."""
        self.worker.sampler.sample(self.logits, self.batch.sample_rows)

    def tensors(self) -> None:
        """Take in the plan, and make the batch's tensors."""
        self.worker.slot_table.apply(self.plan)
        self.worker.slot_table.batch(self.plan)


def linear_flops(spec: ModelSpec, tokens: int, sampled: int) -> float:
    """Operations of the layers' products with weights in one step, 2 a weight and token.

    In the last layer only the tokens from which others are sampled go on after the keys and values.
    """
    qkv = spec.hidden_size * spec.head_dim * (spec.num_query_heads + 2 * spec.num_kv_heads)
    layer = layer_weights(spec) // spec.num_layers
    return 2.0 * ((spec.num_layers - 1) * layer * tokens + qkv * tokens + (layer - qkv) * sampled)


def linear_rate(spec: ModelSpec, plan: StepPlan, linear_ms: float, best_gflops: float) -> dict[str, float | None]:
    """GFLOP/s of the linear layers that took so long, and their share of the machine's.

    Both are None where no time is left for them: theirs is a difference, which of a tiny model is less than its noise.
    """
    if linear_ms <= 0:
        return {"linear_ms": significant(linear_ms, 4), "linear_gflops": None, "linear_share": None}

    rate = linear_flops(spec, plan.num_tokens, len(plan.sample_rows)) / (1e6 * linear_ms)
    return {
        "linear_ms": significant(linear_ms, 4),
        "linear_gflops": significant(rate, 4),
        "linear_share": share(rate, best_gflops),
    }


def bounds(work: Work, plan: StepPlan, read_gb_s: float, best_gflops: float) -> dict[str, float]:
    """What the machine needs for the step at least, in milliseconds."""
    rows = len(plan.slots)
    first = plan.positions[0]
    count = plan.counts[0]
    rates = 1e9 * read_gb_s, 1e9 * best_gflops
    if count == 1:
        limit = partial(decode_step_s, work, first + 1, rows)
    else:
        limit = partial(prefill_s, work, count, rows)

    seconds = {"read": limit(rates[0], math.inf), "multiply": limit(math.inf, rates[1]), "least": limit(*rates)}
    return {f"{name}_ms": 1000 * value for name, value in seconds.items()}


def rates_around(limits: Limits, int8: bool, *measured: dict[str, float]) -> dict[str, float]:
    """GB/s and GFLOP/s of the machine around a case: the best of what was measured, or its limits where nothing was."""
    kinds = ("bf16_gflops", "int8_gflops") if int8 else ("bf16_gflops",)
    read = [now["read_gb_s"] for now in measured if "read_gb_s" in now]
    multiply = [now[kind] for now in measured for kind in kinds if kind in now]
    return {
        "read_gb_s": max(read, default=limits.read_gb_s),
        "best_gflops": max(multiply, default=limits.gflops(int8)),
    }


def measure_step(worker: Worker, work: Work, plan: StepPlan, limits: Limits, options: Options) -> dict[str, Any]:
    """One step, whole and in parts: milliseconds, and the share of what the machine allows."""
    repeats = options.repeats
    before = measure_now()
    with torch.inference_mode(), one_torch_thread():
        whole = median_ms(lambda: worker.execute(plan), repeats)
        parts = Parts(worker, plan)
        found = parts.sublayers_ms(repeats)
        for name in ("head", "sampling", "tensors"):
            found[f"{name}_ms"] = median_ms(getattr(parts, name), repeats)
        rest = whole - sum(found.values())
        attend = median_ms(parts.attend, repeats)

    rates = rates_around(limits, get_weight_format(options.quantization).rounds_x, before, measure_now())
    least = bounds(work, plan, **rates)
    linear = found["attention_ms"] - attend + found["mlp_ms"]
    products = linear + found["head_ms"]
    values = {"step_ms": whole, **found, "rest_ms": rest, "attend_ms": attend, "products_ms": products, **least}
    return {name: significant(value, 4) for name, value in values.items()} | {
        **rates,
        "share_of_limit": share(least["least_ms"], whole),
        "products_share_of_step": share(products, whole),
        **linear_rate(work.spec, plan, linear, rates["best_gflops"]),
    }


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    if options.context < 1 or options.repeats < 1:
        raise ConfigError(f"context={options.context} and repeats={options.repeats} must be at least 1")
    rows, prompts = whole_numbers("rows", options.rows), whole_numbers("prompts", options.prompts)

    folder = model_folder(options.model, options.random)
    spec: ModelSpec = spec_from_config(read_config(folder), folder.name)
    config = EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="bfloat16",
        quantization=options.quantization,
        max_num_seqs=max(rows),
        max_model_len=max(options.context, *prompts) + 1,
        max_num_batched_tokens=max(*rows, *prompts),
    )

    limits = measure_limits(options.limits_s)
    worker = build_worker(config, spec, folder, local_group(torch.device("cpu")))
    work = Work(spec, weight_bytes({"quantization": options.quantization}))
    size = worker.capacity.block_size
    plans = {f"decode_{count}": step_plan(count, options.context - 1, 1, size) for count in rows}
    plans |= {f"prompt_{count}": step_plan(1, 0, count, size) for count in prompts}
    steps = {}
    for name, plan in plans.items():
        steps[name] = measure_step(worker, work, plan, limits, options)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in steps[name].items()), flush=True)
    return {"benchmark": "step", "steps": steps, "limits": dataclasses.asdict(limits)}


if __name__ == "__main__":
    run(Options, measure)
