"""Tables of chaos.py: what came of kills, stops and saturation. What is shown is taken out of the result."""

from __future__ import annotations

from typing import Any

from .markdown import Blocks, Result, heading, pairs, table


def chaos(result: Result) -> Blocks:
    """The tables of chaos.py, by what its mode has measured."""
    if "groups" in result:
        return _groups(result)
    return _beside(result) if result.get("mode") == "beside" else _rest(result)


def _groups(result: Result) -> Blocks:
    """Each group's figures, what the time goes into, and each fault."""
    blocks: Blocks = []
    for size, group in result.pop("groups").items():
        since = {heading(name): values for name, values in group.pop("seconds_since_the_fault").items()}
        parts = group.pop("seconds_go_into")
        each = {f"{number}": row for number, row in enumerate(group.pop("each"), 1)}
        blocks += [f"#### ranks={size}", *pairs(group), *table("seconds since the fault", since)]
        blocks += [*table("seconds go into", parts), *table("fault", each, left_out=("reason",))]
    return [*blocks, *_rest(result)]


def _beside(result: Result) -> Blocks:
    """A table for each fault: what came of it in each server."""
    blocks: Blocks = []
    for fault, servers in result.pop("faults").items():
        names = dict.fromkeys(name for figures in servers.values() for name in figures)
        rows = {heading(name): {server: figures.get(name) for server, figures in servers.items()} for name in names}
        blocks += [f"#### {fault}", *table("figure", rows)]
    return [*blocks, *_rest(result)]


def _rest(result: Result) -> Blocks:
    figures: dict[str, Any] = dict(result)
    result.clear()
    return pairs(figures)
