"""What the machine could do at best: it reads memory and multiplies matrices at some rate, and no engine is faster.

    python benchmarks/limits.py [seconds=0.5] [gib=1] [random=qwen2_5_0_5b]

Measures both, of one thread and of all, and what a context switch costs; and says which speed of the model follows.
Each rate is the best of its repeats; if their median is far below, something else uses the machine, which it says.
The last line is JSON. The functions let every other benchmark state its share of the limit of this machine.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from phalanx.benchmarks.lab.common import model_folder, run, significant
from phalanx.benchmarks.lab.rates import Limits, measure_limits
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import ModelSpec, read_config, spec_from_config

KV_BYTES = 2  # of an element, in bf16
SWITCHES = 20000


@dataclass
class Options:
    """How long to measure, and the model whose limits to print."""

    model: str | None = None  # a folder; without one the shape of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    seconds: float = 0.5  # of each measurement
    gib: float = 1.0  # of memory to read; much more than the caches hold
    out: str | None = None  # a file for the JSON line


@dataclass(frozen=True)
class Work:
    """What a model's arithmetic takes. `weight_bytes` is of one weight: 2 in bf16, 1.0625 in q8_0."""

    spec: ModelSpec
    weight_bytes: float = 2.0
    kv_bytes: float = KV_BYTES


def layer_weights(spec: ModelSpec) -> int:
    """Matrix elements of all layers."""
    attention = spec.hidden_size * spec.head_dim * (2 * spec.num_query_heads + 2 * spec.num_kv_heads)
    return spec.num_layers * (attention + 3 * spec.hidden_size * spec.intermediate_size)


def vector_weights(spec: ModelSpec) -> int:
    """Elements of the norms and biases."""
    queries, keys = (heads * spec.head_dim for heads in (spec.num_query_heads, spec.num_kv_heads))
    layer = 2 * spec.hidden_size
    layer += spec.qkv_bias * (queries + 2 * keys) + spec.output_bias * spec.hidden_size
    layer += spec.mlp_bias * (2 * spec.intermediate_size + spec.hidden_size) + spec.qk_norm * 2 * spec.head_dim
    return spec.num_layers * layer + spec.hidden_size


def head_weights(spec: ModelSpec) -> int:
    """Elements of the output head; a tied one is read whole too, whereas a lookup of an embedding reads one row."""
    return spec.vocab_size * spec.hidden_size


def step_weight_bytes(work: Work) -> float:
    """Bytes of weights that one step reads, of all ranks together: N ranks hold, and read, one N-th each."""
    matrices = layer_weights(work.spec) + head_weights(work.spec)
    return matrices * work.weight_bytes + vector_weights(work.spec) * 2.0


def kv_token_bytes(work: Work) -> float:
    """Bytes of one token's keys and values in all layers."""
    return 2 * work.spec.num_layers * work.spec.num_kv_heads * work.spec.head_dim * work.kv_bytes


def token_flops(spec: ModelSpec, context: float, head: bool = True) -> float:
    """Return the operations of a token that attends to `context` others: 2 a weight, 4 a query element and token."""
    attention = 4.0 * spec.num_layers * spec.num_query_heads * spec.head_dim * context
    return 2.0 * (layer_weights(spec) + (head_weights(spec) if head else 0)) + attention


def decode_step_s(work: Work, context: float, batch: int, bandwidth: float, flops: float) -> float:
    """Seconds of a step of `batch` sequences at best: reading or computing, whichever takes longer.

    `bandwidth` is in bytes a second, `flops` in operations a second.
    """
    read = step_weight_bytes(work) + batch * context * kv_token_bytes(work)
    return max(read / bandwidth, batch * token_flops(work.spec, context) / flops)


def decode_limit_tokens_per_s(
    spec: ModelSpec, dtype_bytes: float, context: float, batch: int, bandwidth: float, flops: float
) -> float:
    """Output tokens a second of `batch` sequences at best."""
    return batch / decode_step_s(Work(spec, dtype_bytes), context, batch, bandwidth, flops)


def prefill_s(work: Work, prompt: int, requests: int, bandwidth: float, flops: float) -> float:
    """Seconds to the first token of `requests` prompts at best: causal attention, and the head for the last token only.

    The weights are read once, as if the prompts were one step.
    """
    layers = prompt * token_flops(work.spec, (prompt + 1) / 2, head=False)
    compute = requests * (layers + 2.0 * head_weights(work.spec)) / flops
    return max(compute, step_weight_bytes(work) / bandwidth)


def prefill_limit_tokens_per_s(
    spec: ModelSpec, dtype_bytes: float, prompt: int, bandwidth: float, flops: float
) -> float:
    """Prompt tokens a second of one prompt at best."""
    return prompt / prefill_s(Work(spec, dtype_bytes), prompt, 1, bandwidth, flops)


def case_limit_tokens_per_s(work: Work, requests: int, prompt: int, new: int, bandwidth: float, flops: float) -> float:
    """Output tokens a second at best of requests that are sent all at once: their prefill, then their decode steps."""
    seconds = prefill_s(work, prompt, requests, bandwidth, flops)
    # The last token that is sampled is never computed; the first comes with the prefill.
    seconds += sum(decode_step_s(work, prompt + i, requests, bandwidth, flops) for i in range(1, new))
    return requests * new / seconds


def share(value: float, limit: float) -> float:
    """Return the share of a limit that was reached, as printed: with three significant digits, so that none is 0."""
    return significant(value / limit, 3)


def context_switch_us(switches: int = SWITCHES) -> float:
    """Microseconds from one process to another on the same core and through a pipe."""
    (here, there), (back, forth) = os.pipe(), os.pipe()
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        child = os.fork()
        if not child:
            for _ in range(switches // 2):
                os.write(forth, os.read(here, 1))
            os._exit(0)

        started = time.perf_counter()
        for _ in range(switches // 2):
            os.write(there, b"x")
            os.read(back, 1)
        seconds = time.perf_counter() - started
        os.waitpid(child, 0)
    finally:
        os.sched_setaffinity(0, before)
        for pipe in (here, there, back, forth):
            os.close(pipe)
    return round(1e6 * seconds / switches, 2)


def model_limits(spec: ModelSpec, limits: Limits) -> dict[str, float]:
    """Speeds of a bf16 model that follow, tokens a second."""
    rates = (1e9 * limits.read_gb_s, 1e9 * limits.bf16_gflops)
    return {
        "decode_1_request": round(decode_limit_tokens_per_s(spec, 2, 64, 1, *rates), 1),
        "decode_32_requests": round(decode_limit_tokens_per_s(spec, 2, 192, 32, *rates), 1),
        "prefill_1024": round(prefill_limit_tokens_per_s(spec, 2, 1024, *rates), 1),
    }


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    if not (options.seconds > 0 and options.gib > 0):
        raise ConfigError(f"seconds={options.seconds} and gib={options.gib} must be above 0")
    folder = model_folder(options.model, options.random)
    spec = spec_from_config(read_config(folder), folder.name)
    limits = measure_limits(options.seconds, options.gib)
    switch = context_switch_us()
    speeds = model_limits(spec, limits)
    print("\n".join(limits.lines()))
    for name, value in {"context_switch_us": switch, **speeds}.items():
        print(f"{name}: {value}")
    return {
        "benchmark": "limits",
        **asdict(limits),
        "context_switch_us": switch,
        "step_weight_gb": round(step_weight_bytes(Work(spec)) / 1e9, 4),
        "tokens_per_s_at_best": speeds,
    }


if __name__ == "__main__":
    run(Options, measure)
