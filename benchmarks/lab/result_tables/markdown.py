"""Figures of a benchmark's JSON as Markdown: numbers as the file has them, never rounded, and never left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = dict[str, Any]
Blocks = list[str]
"""Paragraphs, headings and tables, which stand in the file with an empty line between them."""

NOTHING = "–"

HEADINGS = {
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "all tokens/s",
    "tokens_per_s": "tokens/s",
    "runs_output_tokens_per_s": "output tokens/s of each run",
    "ttft_s": "TTFT, s",
    "ttft_ms": "TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "last_tpot_ms": "TPOT of the last request, ms",
    "itl_ms": "time between tokens, ms",
    "seconds": "seconds",
    "limit_tokens_per_s": "limit, tokens/s",
    "share_of_limit": "share of the limit",
    "bf16_limit_tokens_per_s": "limit with bf16 weights, tokens/s",
    "share_of_bf16_limit": "share of that limit",
    "first_tokens_as_phalanx": "first tokens as phalanx's",
    "ready_s": "ready after, s",
    "memory_gb": "memory, GB",
    "idle_cores": "cores used when idle",
    "step_ms": "step, ms",
    "roofline_ms": "roofline, ms",
    "share_of_roofline": "share of the roofline",
    "share_of_copy_bandwidth": "share of the copy rate",
    "share_of_read_bandwidth": "share of the read rate",
    "share_of_matmul_rate": "share of the matmul rate",
    "gb_s": "GB/s",
    "tflops": "TFLOP/s",
    "gflops": "GFLOP/s",
    "host_gap_us": "GPU idle between steps, us",
    "host_gap_share": "share of the step",
    "speed_of_own_to_this": "speed of phalanx's kernel to this one's",
    "largest_error": "largest error",
    "us": "us",
    "ms": "ms",
}
"""Column headings of names that need one; other names stand with their underscores as spaces."""


def heading(name: str) -> str:
    """A column's heading."""
    return HEADINGS.get(name, name.replace("_", " "))


def show(value: Any) -> str:
    """A value as a cell: numbers in full, with separators of thousands."""
    if value is None or value in ("", [], {}):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(show(each) for each in value)
    return " ".join(str(value).split()).replace("|", "\\|")


def table(first: str, rows: Mapping[str, Mapping[str, Any]], left_out: Sequence[str] = ()) -> Blocks:
    """One row for each of `rows`, under the title `first`; a column for each name that a row has.

    `left_out` names columns that are shown elsewhere.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row if name not in left_out))
    if not names:
        return []

    lines = [
        "| " + " | ".join([first, *map(heading, names)]) + " |",
        "|" + "---|" * (len(names) + 1),
        *("| " + " | ".join([show(key), *(show(row.get(name)) for name in names)]) + " |" for key, row in rows.items()),
    ]
    return ["\n".join(lines)]


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one, whose names are joined by points. Lists stay as they are."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{path}{name}."))
        else:
            found[f"{path}{name}"] = value
    return found


def pairs(values: Mapping[str, Any], first: str = "figure") -> Blocks:
    """Nested figures, one a row."""
    return table(first, {f"`{name}`": {"value": value} for name, value in flat(values).items()})


def named(label: str, values: Mapping[str, Any]) -> str:
    """A line `label: name=value, ...`, without the names that have no value."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    return f"{label}: " + ", ".join(f"{name}={show(value)}" for name, value in given.items()) + "."


def surroundings(result: Result) -> Blocks:
    """Machine, versions and settings, which are taken out of `result`."""
    lines = []
    for label in ("machine", "versions", "settings"):
        values = result.pop(label, None)
        if isinstance(values, Mapping):
            lines.append("* " + named(label.capitalize(), values))
        elif values is not None:
            lines.append(f"* {label.capitalize()}: {show(values)}.")
    return ["\n".join(lines)] if lines else []
