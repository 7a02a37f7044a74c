"""What a GPU could do at best, and the share of it that was reached: arithmetic on measured times and ceilings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.benchmarks.limits import (
    Work,
    decode_step_s,
    head_weights,
    kv_token_bytes,
    prefill_s,
    share,
    step_weight_bytes,
    token_flops,
)


@dataclass(frozen=True)
class Ceilings:
    """Rates of this device, as measured just before."""

    copy_gb_s: float  # bytes read and bytes written, of a copy within its memory
    read_gb_s: float
    matmul_tflops: float  # of bf16

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes a second of the roofline, those of the copy, and operations a second."""
        return 1e9 * self.copy_gb_s, 1e12 * self.matmul_tflops


def decode_figures(work: Work, rows: int, context: float, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return the figures of a decode step of `rows` sequences that read `context` tokens each on average."""
    read = step_weight_bytes(work) + rows * context * kv_token_bytes(work)
    flops = rows * token_flops(work.spec, context)
    best = decode_step_s(work, context, rows, *ceilings.rates)
    return {
        "step_ms": round(1e3 * seconds, 4),
        "tokens_per_s": round(rows / seconds, 1),
        "gb_s": round(read / seconds / 1e9, 1),
        "tflops": round(flops / seconds / 1e12, 2),
        "roofline_ms": round(1e3 * best, 4),
        "share_of_roofline": share(best, seconds),
        "share_of_copy_bandwidth": share(read / seconds, 1e9 * ceilings.copy_gb_s),
        "share_of_read_bandwidth": share(read / seconds, 1e9 * ceilings.read_gb_s),
    }


def prefill_figures(work: Work, prompt: int, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Return the figures of one prompt, up to its first token."""
    flops = prompt * token_flops(work.spec, (prompt + 1) / 2, head=False) + 2.0 * head_weights(work.spec)
    best = prefill_s(work, prompt, 1, *ceilings.rates)
    return {
        "ttft_ms": round(1e3 * seconds, 3),
        "tokens_per_s": round(prompt / seconds, 1),
        "tflops": round(flops / seconds / 1e12, 2),
        "roofline_ms": round(1e3 * best, 3),
        "share_of_roofline": share(best, seconds),
        "share_of_matmul_rate": share(flops / seconds, 1e12 * ceilings.matmul_tflops),
    }


def mixed_s(work: Work, lengths: Sequence[tuple[int, int]], bandwidth: float, flops: float) -> float:
    """Seconds at best of requests of (prompt tokens, new tokens) that are sent all at once.

    All prompts are computed first; then each step is a decode step of all requests that are not finished, as if the KV
    cache held them all. The last token of each is sampled, never computed.
    """
    compute = sum(prefill_s(work, prompt, 1, float("inf"), flops) for prompt, _ in lengths)
    seconds = max(compute, step_weight_bytes(work) / bandwidth)
    for i in range(1, max(new for _, new in lengths)):
        contexts = [prompt + i for prompt, new in lengths if new > i]
        seconds += decode_step_s(work, sum(contexts) / len(contexts), len(contexts), bandwidth, flops)
    return seconds


def attention_bytes(keys: int, rows: int, kv_heads: int, head_dim: int, element: int) -> int:
    """Return the bytes of the keys and values that `rows` decodes read in one layer."""
    return 2 * rows * keys * kv_heads * head_dim * element


def attention_flops(queries: int, keys: int, heads: int, head_dim: int) -> float:
    """Return the operations of `queries` at the end of `keys`, causal, in one layer: 4 a query element and key seen."""
    seen = queries * (keys - queries) + queries * (queries + 1) / 2
    return 4.0 * heads * head_dim * seen


def idle_share(gaps: Sequence[float], period: float) -> float:
    """Share of a time in which a device did nothing: `gaps` between its steps, the overlap of two being no gap."""
    return round(sum(max(0.0, gap) for gap in gaps) / period, 4) if period > 0 else 0.0


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) cover together."""
    busy = 0.0
    reached = float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy
