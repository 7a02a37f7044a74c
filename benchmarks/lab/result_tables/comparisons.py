"""Tables of compare.py: each engine's figures of each case, and the ratios within the rounds with their verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .markdown import Blocks, Result, show, table

PER_RUN = ("runs_limits", "runs_read_gb_s")
"""Rates of the machine around each run, of which the table has the range."""


def comparison(result: Result) -> Blocks:
    """Everything in a result of compare.py; what is shown is taken out of `result`."""
    blocks: Blocks = []
    for text, case in result.pop("cases").items():
        blocks += [f"#### {case_title(text)}", *_figures(case), *_ratios(case)]

    blocks += ["#### The engines and the machine", *table("engine", result.pop("engines"))]
    blocks += table("rate of the machine", _rates(result))

    for name, values in (result.pop("curves", None) or {}).items():
        blocks += [f"#### {name.replace('_', ' ')}", *table("engine", _curve(values))]
    for name in ("failed", "missing"):
        if found := result.pop(name, None):
            blocks.append(f"{name.capitalize()}: {show(found)}.")
    return blocks


def case_title(text: str) -> str:
    """A case of compare.py, REQUESTS,PROMPT,NEW[,REQUESTS A SECOND], in words."""
    requests, prompt, new, *rate = text.split(",")
    title = f"{requests} request{'s' * (requests != '1')}, {prompt} prompt tokens, {new} new token{'s' * (new != '1')}"
    return f"{title}, {rate[0]} requests a second" if rate else title


def _figures(case: Mapping[str, Any]) -> Blocks:
    rows = {}
    for name, figures in case["engines"].items():
        around = _ranges(figures)
        rows[name] = {**figures, **({"rates of the machine around the runs": around} if around else {})}
    return table("engine", rows, left_out=PER_RUN)


def _ranges(figures: Mapping[str, Any]) -> str:
    """The least and the largest of each rate around an engine's runs."""
    values: dict[str, list[float]] = {}
    for run in figures.get("runs_limits", []):
        for name, value in run.items():
            values.setdefault(name, []).append(value)
    if read := figures.get("runs_read_gb_s"):
        values["read_gb_s"] = read
    return ", ".join(f"{name} {show(min(found))} to {show(max(found))}" for name, found in values.items())


def _ratios(case: Mapping[str, Any]) -> Blocks:
    """Above 1 where phalanx is better; a text instead of a ratio says why the rounds do not tell."""
    rows = {
        f"{mine} to {other}": {
            "output tokens/s": ratios.get("output_tokens_per_s"),
            "TTFT": ratios.get("ttft"),
            "rounds, output tokens/s": ratios.get("rounds_output_tokens_per_s"),
            "rounds, TTFT": ratios.get("rounds_ttft"),
            "rounds left out": ratios.get("rounds_left_out"),
        }
        for mine, others in case["phalanx_to"].items()
        for other, ratios in others.items()
    }
    empty = [name for name in next(iter(rows.values()), {}) if all(row[name] is None for row in rows.values())]
    blocks = table("ratio, above 1 where phalanx is better", rows, left_out=empty)

    if (moved := case.get("limits_moved")) is not None:
        blocks.append(f"Share by which the machine's rates fell at most between two measurements: {show(moved)}.")
    return blocks


def _rates(result: Result) -> dict[str, dict[str, Any]]:
    columns = {"before": "limits_before", "after": "limits_after", "the better": "limits"}
    measured = {column: result.pop(name, None) or {} for column, name in columns.items()}
    names = dict.fromkeys(name for rates in measured.values() for name in rates)
    return {f"`{name}`": {column: rates.get(name) for column, rates in measured.items()} for name in names}


def _curve(lines: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """A row for each engine, a column for each place of the curve."""
    return {name: {show(x): value for x, value in points} for name, points in lines.items()}
