"""What is wanted of phalanx on a GPU, beside what was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OTHERS = ("flash_attn_3", "flashinfer")
"""The kernels with which phalanx's decode attention is compared."""


def goals(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name: what is wanted, what was found (None if it was not measured), and whether that is reached."""
    qwq, qwen3 = (_at(result, "shapes", name) for name in ("qwq_32b", "qwen3_0_6b"))
    prefill = _at(qwq, "prefill", "8192", "share_of_matmul_rate")
    return {
        "qwq_32b_decode_1_of_copy_bandwidth": _at_least(0.80, _at(qwq, "decode", "1", "share_of_copy_bandwidth")),
        "qwq_32b_prefill_8192_of_matmul_rate": _at_least(0.60, prefill),
        "qwq_32b_decode_256_of_roofline": _at_least(0.60, _decode(qwq, "256", "share_of_roofline")),
        **{f"decode_attention_to_{other}": _at_least(0.90, _attention(result, other)) for other in OTHERS},
        "qwq_32b_host_gap": _at_most(0.03, _largest_gap(qwq)),
        "qwen3_0_6b_host_gap": _at_most(0.08, _largest_gap(qwen3)),
        "throughput_to_transformers": _at_least(3.0, _at(result, "peer", "phalanx_to_peer")),
        "equal_tokens_of_two_ranks": _at_least(True, _at(result, "two_ranks", "equal")),
    }


def _at(values: Any, *path: str) -> Any:
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _decode(shape: Any, rows: str, name: str) -> Any:
    """Return the figure of a batch or, if it did not fit, of what was measured instead."""
    found = _at(shape, "decode", rows, name)
    return found if found is not None else _at(shape, "decode", rows, "instead", name)


def _largest_gap(shape: Any) -> float | None:
    batches = _at(shape, "decode") or {}
    gaps = [_decode(shape, rows, "host_gap_share") for rows in batches]
    return max((gap for gap in gaps if gap is not None), default=None)


def _attention(result: Any, other: str) -> float | None:
    """The least speed of Triton's decode attention, in units of another's, over all cases."""
    cases = _at(result, "attention", "cases") or {}
    speeds = [_at(case, other, "speed_of_own_to_this") for name, case in cases.items() if name.startswith("decode")]
    return min((speed for speed in speeds if speed is not None), default=None)


def _at_least(wanted: float, found: Any) -> dict[str, Any]:
    return {"wanted": wanted, "found": found, "reached": None if found is None else found >= wanted}


def _at_most(wanted: float, found: Any) -> dict[str, Any]:
    return {"at_most": wanted, "found": found, "reached": None if found is None else found <= wanted}
