"""What the kernels of a step are for, from their names and their order, and what each of these parts must move."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.benchmarks.limits import Work, head_weights, kv_token_bytes, share
from phalanx.engine.models.spec import ModelSpec

from .roofline import Ceilings, attention_flops, busy_time

Event = tuple[str, float, float]
"""A kernel's name, and when it began and ended, in microseconds."""

NORM, QKV, ROTATE, ATTENTION, OUTPUT = "norms", "qkv", "rotate and store", "attention", "attention output"
GATE_UP, ACTIVATION, DOWN, LOGITS, SAMPLING = "gate and up", "activation", "down", "logits", "sampling"
AROUND = "inputs, embedding and the rest"

ANCHORS = {
    "_rms_norm": NORM,
    "_add_rms_norm": NORM,
    "_receive_add_norm": NORM,
    "_rotate_and_store": ROTATE,
    "_silu_mul": ACTIVATION,
}
"""Kernels of phalanx by name: each has one place in a layer, so they tell what stands between them."""
BETWEEN = {(NORM, ROTATE): QKV, (NORM, ACTIVATION): GATE_UP, (ACTIVATION, NORM): DOWN}
"""Whatever its name: a product, and what sums up the parts of one that is split."""
ATTENDS = re.compile(r"flash|decode_kernel|merge_kernel|prefill_kernel|attn|attention|fmha", re.IGNORECASE)
MULTIPLIES = re.compile(r"nvjet|gemm|gemv|splitk|cutlass|cublas|xmma", re.IGNORECASE)
SAMPLES = re.compile(r"_chunk_maxima|_row_maxima|_block_maxima|argmax|softmax|topk|reduce_kernel", re.IGNORECASE)
INSIDE = re.compile(r"\w*(?:[Ff]unctor|_kernel_impl|_kernel_cuda|FlashAttn)\w*")
NAME_LENGTH = 60
KERNELS_OF_A_ROLE = 8


@dataclass(frozen=True)
class Case:
    """A step: `rows` sequences of `context` tokens that decode one each, or one prompt of `prompt` tokens."""

    rows: int
    context: int
    prompt: int = 0

    @property
    def name(self) -> str:
        """As in the results."""
        return f"prompt_{self.prompt}" if self.prompt else f"decode_{self.rows}x{self.context}"

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.prompt or self.rows


@dataclass(frozen=True)
class Least:
    """What a part of a step must do at least: each input is read once, each output written once."""

    bytes: float
    flops: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """Moving or computing, whichever takes longer."""
        bandwidth, rate = ceilings.rates
        return max(self.bytes / bandwidth, self.flops / rate)


def least_of(work: Work, case: Case) -> dict[str, Least]:
    """Least work of every role for which it is known, for the whole step."""
    spec = work.spec
    layers = work.spec.num_layers
    hidden, width = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_query_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    tokens = layers * case.tokens
    # Of the last layer only the tokens whose successor is sampled go through the MLP.
    mlp_tokens = tokens - case.tokens + case.rows
    element = 2  # bytes of an activation

    def product(count: int, inputs: int, outputs: int, weights: float, output_bytes: int = element) -> Least:
        moved = count * (inputs * element + outputs * output_bytes)
        return Least(weights * work.weight_bytes + moved, 2.0 * count * inputs * outputs)

    qkv = queries + 2 * keys
    return {
        QKV: product(tokens, hidden, qkv, layers * hidden * qkv),
        ROTATE: Least(2 * tokens * qkv * element),
        ATTENTION: _attention(work, case),
        OUTPUT: product(tokens, queries, hidden, layers * hidden * queries),
        # Two a layer and a last one. All but the first read a part, which they add to the float32 stream.
        NORM: Least(hidden * ((tokens + mlp_tokens + case.rows) * 12 - case.tokens * 6)),
        GATE_UP: product(mlp_tokens, hidden, 2 * width, layers * 2 * hidden * width),
        ACTIVATION: Least(mlp_tokens * 3 * width * element),
        DOWN: product(mlp_tokens, width, hidden, layers * hidden * width),
        LOGITS: product(case.rows, hidden, spec.vocab_size, head_weights(spec), 4),
        SAMPLING: Least(case.rows * spec.vocab_size * 4),
    }


def _attention(work: Work, case: Case) -> Least:
    spec = work.spec
    queries = spec.num_query_heads * spec.head_dim
    keys = case.prompt or case.rows * case.context
    moved = keys * kv_token_bytes(work) + 2 * case.tokens * queries * 2 * spec.num_layers
    return Least(moved, spec.num_layers * _attention_flops(spec, case))


def _attention_flops(spec: ModelSpec, case: Case) -> float:
    if case.prompt:
        return attention_flops(case.prompt, case.prompt, spec.num_query_heads, spec.head_dim)
    return case.rows * attention_flops(1, case.context, spec.num_query_heads, spec.head_dim)


def roles(names: Sequence[str]) -> list[str]:
    """What each of these kernels, in the order in which they began, is for."""
    anchors = [ANCHORS.get(name) for name in names]
    following: list[str | None] = []
    after: str | None = None
    for anchor in reversed(anchors):
        following.append(after)
        after = anchor or after
    found = []
    before = None
    for name, anchor, after in zip(names, anchors, reversed(following), strict=True):
        found.append(anchor or _role(before, after, name))
        before = anchor or before
    return found


def _role(before: str | None, after: str | None, name: str) -> str:
    """The role of a kernel between two anchors."""
    if (before, after) in BETWEEN:
        return BETWEEN[before, after]  # type: ignore[index]
    if before == ROTATE:
        return ATTENTION if ATTENDS.search(name) else OUTPUT if MULTIPLIES.search(name) else AROUND
    if before == NORM:
        return LOGITS if MULTIPLIES.search(name) else SAMPLING if SAMPLES.search(name) else AROUND
    return AROUND


def shorten(name: str) -> str:
    """A kernel's name without its template's arguments, but with the one that says what it does."""
    inside = INSIDE.search(name, name.find("<")) if "<" in name else None
    head = re.split(r"[<(]", name.removeprefix("void "))[0].strip() or name
    head = head.rpartition("::")[2] or head
    return (f"{head}:{inside.group()}" if inside else head)[:NAME_LENGTH]


def tabulate(
    events: Sequence[Event], steps: int, step_s: float, least: dict[str, Least], ceilings: Ceilings
) -> dict[str, Any]:
    """By role: microseconds a step, share of `step_s`, bytes and operations at least, and at which rates.

    `step_s` is what a step takes without a profiler, `events` are of `steps` whole steps. Raises RuntimeError if there
    are none. The idle share of what was traced holds what tracing costs, the other one does not.
    """
    if not events:
        raise RuntimeError("the profiler saw no kernels")

    ordered = sorted(events, key=lambda event: event[1])
    span = max(end for _, _, end in ordered) - ordered[0][1]
    busy = busy_time([(start, end) for _, start, end in ordered])
    step_us = 1e6 * step_s

    grouped: dict[str, dict[str, list[float]]] = {}
    for (name, start, end), role in zip(ordered, roles([name for name, _, _ in ordered]), strict=True):
        grouped.setdefault(role, {}).setdefault(shorten(name), []).append(end - start)
    entries = {role: _entry(kernels, steps, step_us, least.get(role), ceilings) for role, kernels in grouped.items()}

    return {
        "steps": steps,
        "step_us": round(step_us, 2),
        "busy_us": round(busy / steps, 2),
        "idle_share": round(1 - busy / steps / step_us, 4),
        "traced_step_us": round(span / steps, 2),
        "traced_idle_share": round(1 - busy / span, 4),
        "kernels_a_step": round(len(events) / steps, 1),
        "least_us": round(1e6 * sum(part.seconds(ceilings) for part in least.values()), 2),
        "roles": dict(sorted(entries.items(), key=lambda item: -item[1]["us"])),
    }


def _entry(
    kernels: dict[str, list[float]], steps: int, step_us: float, least: Least | None, ceilings: Ceilings
) -> dict[str, Any]:
    us = sum(map(sum, kernels.values())) / steps
    entry: dict[str, Any] = {"us": round(us, 2), "share": share(us, step_us)}
    if least is not None and us > 0:
        entry["mb"] = round(least.bytes / 1e6, 3)
        entry["gb_s"] = round(least.bytes / us / 1e3, 1)
        entry["share_of_copy_rate"] = share(least.bytes / us / 1e3, ceilings.copy_gb_s)
        if least.flops:
            entry["tflops"] = round(least.flops / us / 1e6, 2)
            entry["share_of_matmul_rate"] = share(least.flops / us / 1e6, ceilings.matmul_tflops)
        entry["least_us"] = round(1e6 * least.seconds(ceilings), 2)
    largest = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    entry["kernels"] = [
        {"name": name, "calls": round(len(times) / steps, 2), "us": round(sum(times) / steps, 2)}
        for name, times in largest[:KERNELS_OF_A_ROLE]
    ]
    entry["names"] = len(kernels)
    return entry


def describe(name: str, table: dict[str, Any]) -> Iterator[str]:
    """A table's lines, to be printed."""
    if "functions" in table:
        yield f"{name}: launched in {table['launch_us']} us"
        yield from (f"  {f['us']:9.1f} us {f['calls']:7.1f} x {f['function']}" for f in table["functions"][:12])
        return
    if "roles" not in table:
        yield f"{name}: {table.get('error') or table.get('skipped')}"
        return
    yield (
        f"{name}: step {table['step_us']} us, busy {table['busy_us']}, idle {table['idle_share']} (traced "
        f"{table['traced_idle_share']}), {table['kernels_a_step']} kernels, at least {table['least_us']} us"
    )
    for role, entry in table["roles"].items():
        largest = entry["kernels"][0]
        yield (
            f"  {role:30s} {entry['us']:10.2f} us {entry['share']:6.3f} {entry.get('mb', ''):>10} MB "
            f"{entry.get('share_of_copy_rate', ''):>6} of copy {entry.get('share_of_matmul_rate', ''):>6} of matmul  "
            f"{largest['calls']} x {largest['name']}" + (f" and {entry['names'] - 1} more" * (entry["names"] > 1))
        )
