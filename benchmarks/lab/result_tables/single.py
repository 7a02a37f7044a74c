"""Tables of the benchmarks that measure phalanx by itself on a CPU. What is shown is taken out of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import Blocks, Result, heading, pairs, table


def steps(result: Result) -> Blocks:
    """Tables of step.py: where a step's time goes, beside the machine's rates."""
    by_step = result.pop("steps")
    names = dict.fromkeys(name for figures in by_step.values() for name in figures)
    rows = {heading(name): {step: figures.get(name) for step, figures in by_step.items()} for name in names}
    return [*table("figure", rows), *_rates(result)]


def linear(result: Result) -> Blocks:
    """Tables of linear.py: a linear layer by weight format, place of the weights, rows and instruction set."""
    tables: dict[str, dict[str, Any]] = {}
    for case in result.pop("cases"):
        rows = tables.setdefault(f"{case['format']}, weights: {case['place']}", {})
        for shape, figures in case["shapes"].items():
            rows[f"{case['rows']} rows, {case['instructions']}, {shape}"] = figures

    blocks: Blocks = []
    for title, rows in tables.items():
        blocks += [f"#### {title}", *table("rows, instruction set, matrix", rows)]
    return [*blocks, *_rates(result)]


def latency(result: Result) -> Blocks:
    """Tables of latency.py: requests at once, by number of ranks."""
    blocks: Blocks = []
    for ranks, found in result.pop("ranks").items():
        counts = {count: case for count, case in found.items() if isinstance(case, Mapping)}
        rest = {name: value for name, value in found.items() if name not in counts}
        blocks += [f"#### ranks={ranks}", *table("requests at once", counts), *pairs(rest)]
    return [*blocks, *_rates(result)]


def serve(result: Result) -> Blocks:
    """Tables of serve.py: each server under each load, and the first server's ratios to the others."""
    figures: dict[str, dict[str, Any]] = {}
    for run in result.pop("results"):
        load = f"{run['level']:g} requests a second" if run["mode"] == "open" else f"{run['level']} under way"
        for name, value in _without(run, "server", "mode", "level").items():
            figures.setdefault(heading(name), {})[f"{run['server']}, {load}"] = value

    ratios = {f"{each['of']} / {each['to']}, {each['level']}": each for each in result.pop("ratios")}
    rows = {name: _without(each, "of", "to", "level") for name, each in ratios.items()}
    return [*table("figure", figures), *table("ratio, median of the rounds", rows), *_rest(result)]


def collectives(result: Result) -> Blocks:
    """Tables of collectives.py: an all-reduce by size, and what communication takes of a step."""
    sizes = {f"{each['bytes']:,}": _without(each, "bytes") for each in result.pop("all_reduce")}
    return [*table("bytes", sizes), *_rest(result)]


def scheduler(result: Result) -> Blocks:
    """Tables of scheduler.py: a step's scheduling, by number of running requests."""
    return [*table("running requests", result.pop("running")), *_rest(result)]


def before_after(result: Result) -> Blocks:
    """Tables of before_after.py: each case at both commits, and the ratios within the rounds."""
    return [*table("case", result.pop("cases")), *_rest(result)]


def startup(result: Result) -> Blocks:
    """Tables of startup.py: seconds from the start of the process, medians and each run."""
    runs = {f"run {number}": run for number, run in enumerate(result.pop("runs"), 1)}
    medians = {name: result.pop(name) for name in list(result) if name.endswith("_s")}
    return table("seconds since the process began", {"median": medians, **runs})


def quantization(result: Result) -> Blocks:
    """Tables of quantization.py: how near each format's logits are to those of bf16."""
    formats = {name: result.pop(name) for name in list(result) if isinstance(result[name], Mapping)}
    return [*table("format", formats), *_rest(result)]


def restarts(result: Result) -> Blocks:
    """Tables of restarts.py: medians of each phase, by number of ranks and what happens to the weights."""
    return [*table("seconds", result.pop("restarts")), *_rest(result)]


def plain(result: Result) -> Blocks:
    """One table of all figures, for benchmarks that have few."""
    return _rest(result)


def _rates(result: Result) -> Blocks:
    return pairs(result.pop("limits", None) or {}, "rate of the machine")


def _rest(result: Result) -> Blocks:
    figures = dict(result)
    result.clear()
    return pairs(figures)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
