"""Tables of gpu.py, section by section. What is shown is taken out of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .markdown import Blocks, Result, named, pairs, show, table

LONGEST = 8
"""Kernels and functions of a profile that are shown; the file has all."""

Cases = Mapping[str, Any]


def gpu(result: Result) -> Blocks:
    """Everything in a result of gpu.py, the goals first."""
    blocks: Blocks = []
    if card := result.get("ceilings", {}).pop("machine", None):
        blocks.append("* " + named("Card", card))
    for name, write in SECTIONS.items():
        if name in result:
            blocks += write(result.pop(name))
    for name in list(result):  # sections of which one table is enough
        if isinstance(result[name], Mapping):
            blocks += [f"#### {name.replace('_', ' ')}", *pairs(result.pop(name))]
    return blocks


def _goals(goals: Cases) -> Blocks:
    """The goals that this run measured."""
    rows = {name.replace("_", " "): goal for name, goal in goals.items() if goal.get("found") is not None}
    if not rows:
        return []
    return ["#### Goals of which this run measured something", *table("goal", rows)]


def _ceilings(ceilings: Cases) -> Blocks:
    return ["#### What the card was measured to do, just before", *pairs(ceilings)]


def _shapes(shapes: Cases) -> Blocks:
    blocks: Blocks = []
    for shape, sections in shapes.items():
        for name, section in sections.items():
            write = OF_A_SHAPE.get(name, _one_table)
            blocks += [f"#### {shape}: {name.replace('_', ' ')}", *write(section)]
    return blocks


def _engine(engine: Cases) -> Blocks:
    figures = {name: value for name, value in engine.items() if name != "report"}
    lines = [f"* {show(line)}" for line in engine.get("report", [])]
    return [*pairs(figures), *(["\n".join(lines)] if lines else [])]


def _batches(batches: Cases) -> Blocks:
    """A row for each batch. The row of one that did not fit has what was measured instead, and why."""
    rows = {}
    notes = []
    for batch, figures in batches.items():
        if not isinstance(figures, Mapping):
            continue
        if "skipped" in figures:
            notes.append(f"* {batch}: {show(figures['skipped'])}.")
        rows[f"{batch}, of shorter context" if "instead" in figures else batch] = figures.get("instead", figures)
    return [*table("requests or tokens", rows, ["skipped"]), *(["\n".join(notes)] if notes else [])]


def _profile(batches: Cases) -> Blocks:
    blocks: Blocks = []
    for batch, profile in batches.items():
        if isinstance(profile, Mapping):
            idle = {name: value for name, value in profile.items() if name != "kernels"}
            blocks.append(f"Requests: {batch}. " + named("Profile", idle))
            blocks += _longest("kernel", profile.get("kernels", []), "name")
    return blocks


def _attention(attention: Cases) -> Blocks:
    if "cases" not in attention:
        return ["#### attention", *pairs(attention)]
    blocks = [f"#### Attention alone, {attention['shape']}, {attention['dtype']}"]
    for case, backends in attention["cases"].items():
        blocks += [f"`{case}`", *table("kernel", backends)]
    return blocks


def _kernels(shapes: Cases) -> Blocks:
    """Each kernel of a step beside its bytes, of eager steps, prompts and graphs; and what the host does meanwhile."""
    blocks: Blocks = []
    for shape, modes in shapes.items():
        for mode, cases in modes.items():
            for case, found in cases.items() if isinstance(cases, Mapping) else ():
                if isinstance(found, Mapping):
                    blocks += [f"#### {shape}: kernels, {mode}, {case}", *_kernel_case(found)]
    return blocks


def _kernel_case(found: Cases) -> Blocks:
    nested = ("roles", "functions")
    blocks = table("", {"step": {name: value for name, value in found.items() if name not in nested}})
    roles = {name: {**role, "kernels": _calls(role)} for name, role in found.get("roles", {}).items()}
    return [*blocks, *table("for", roles), *_longest("function", found.get("functions", []), "function")]


def _calls(role: Cases) -> str:
    return ", ".join(f"{kernel['name']} ({show(kernel['calls'])} calls)" for kernel in role.get("kernels", []))


def _longest(first: str, entries: Sequence[Cases], key: str) -> Blocks:
    rows = {f"`{entry[key]}`": {name: value for name, value in entry.items() if name != key} for entry in entries}
    shown = dict(list(rows.items())[:LONGEST])
    title = first if len(shown) == len(rows) else f"{first}, the first {len(shown)} of {len(rows)}"
    return table(title, shown)


def _one_table(section: Any) -> Blocks:
    return pairs(section if isinstance(section, Mapping) else {"value": section})


SECTIONS: dict[str, Callable[[Any], Blocks]] = {
    "goals": _goals,
    "ceilings": _ceilings,
    "shapes": _shapes,
    "attention": _attention,
    "kernels": _kernels,
}

OF_A_SHAPE: dict[str, Callable[[Any], Blocks]] = {
    "engine": _engine,
    "decode": _batches,
    "prefill": _batches,
    "profile": _profile,
}
