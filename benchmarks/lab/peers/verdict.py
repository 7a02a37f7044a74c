"""What is made of the outcomes of a comparison: figures, shares of the machine's limits, and ratios of paired rounds.

A ratio is of two runs of the same round, which stand next to each other in time, and the ratio that is reported is the
median of the rounds'. A round does not count if what the machine allows for the case, by the rates measured around the
two runs, changed between them: reading for a decode, multiplying for a prompt. Where too few rounds count, or their
quartiles lie on both sides of 1, the verdict says so instead of a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from phalanx.benchmarks.lab.peers.engines import Planned
from phalanx.benchmarks.lab.peers.programs.program import Case
from phalanx.benchmarks.limits import Work, case_limit_tokens_per_s, share
from phalanx.engine.models.spec import ModelSpec

WHOLE_NUMBERS_BELOW = 1.3  # bytes of a weight: such are multiplied as integers
UNSTEADY_ABOVE = 0.25
"""Two runs do not count if what the machine allows falls by more than this share between measurements around them."""

Outcome = Mapping[str, Any]
Outcomes = dict[str, dict[str, list[dict[str, Any]]]]  # by case and engine, of each round


def summarize(runs: Sequence[Outcome]) -> dict[str, Any]:
    """An engine's figures of a case: medians over the rounds, and every round's throughput."""
    speeds = [run["output_tokens_per_s"] for run in runs]
    gaps = [_tpots_ms(run) for run in runs] if runs[0]["new_tokens"] > 1 else []
    return {
        "output_tokens_per_s": round(statistics.median(speeds), 2),
        "runs_output_tokens_per_s": speeds,
        "ttft_s": round(statistics.median(map(_ttft_s, runs)), 4),
        "tpot_ms": round(statistics.median(map(statistics.median, gaps)), 2) if gaps else None,
        # Of the request that began last, beside which no prompt is computed any more.
        "last_tpot_ms": round(statistics.median(every[-1] for every in gaps), 2) if gaps else None,
        "seconds": round(statistics.median(run["seconds"] for run in runs), 3),
        "runs_limits": [around(run) for run in runs],
    }


def _ttft_s(run: Outcome) -> float:
    return float(statistics.median(run["ttft_s"]))


def _tpots_ms(run: Outcome) -> list[float]:
    """Milliseconds a token of each request, in the order of their first tokens."""
    ends = sorted(zip(run["ttft_s"], run["latency_s"], strict=True))
    return [1000 * (last - first) / (run["new_tokens"] - 1) for first, last in ends]


def agreement(runs: Sequence[Outcome], reference: Sequence[Outcome]) -> float:
    """Share of the requests whose first token is the reference's: near 1 if the weights are the same."""
    pairs = zip(runs[0]["tokens"], reference[0]["tokens"], strict=True)
    same = [tokens[0] == others[0] for tokens, others in pairs]
    return round(sum(same) / len(same), 3)


def around(run: Outcome) -> dict[str, float]:
    """The machine's rates when it ran: the better of before and after."""
    before, after = run.get("limits_before", {}), run.get("limits_after", {})
    return {name: max(value, after.get(name, value)) for name, value in before.items()}


def moved(runs: Sequence[Outcome]) -> float:
    """By which share the rates fell at most between the measurements around some runs, or others took the cores."""
    measured: dict[str, list[float]] = {"cpu_share": [1.0]}
    for run in runs:
        for limits in (run.get("limits_before", {}), run.get("limits_after", {})):
            for name, value in limits.items():
                measured.setdefault(name, []).append(value)
    return round(max((1 - min(values) / max(values) for values in measured.values()), default=0.0), 3)


def limits_of(
    weight_bytes: float, spec: ModelSpec, case: Case, limits: Mapping[str, float], runs: Sequence[Outcome]
) -> list[float]:
    """Output tokens a second at best, of each run of a case with weights of so many bytes; empty if nothing says.

    What was measured around a run counts for it, `limits` for what was not. Weights of 8 bits and less may be
    multiplied as integers.
    """
    if not limits or any(case.due_s):
        return []
    return [_limit(weight_bytes, spec, case, {**limits, **around(run)}) for run in runs]


def _limit(weight_bytes: float, spec: ModelSpec, case: Case, rates: Mapping[str, float]) -> float:
    kinds = ["bf16_gflops"] + ["int8_gflops"] * (weight_bytes < WHOLE_NUMBERS_BELOW)
    flops = max(rates.get(kind, 0.0) for kind in kinds)
    shape = (len(case.prompts), len(case.prompts[0]), case.new_tokens)
    return case_limit_tokens_per_s(Work(spec, weight_bytes), *shape, 1e9 * rates["read_gb_s"], 1e9 * flops)


def limit_moved(
    weight_bytes: float, spec: ModelSpec, case: Case, limits: Mapping[str, float], runs: Sequence[Outcome]
) -> float:
    """By which share the limit of a case fell at most between the measurements around some runs, or others took the
    cores. What was not measured around them is as in `limits`; as moved() if nothing says what the limit is."""
    if not limits or any(case.due_s):
        return moved(runs)
    measured = [run[when] for run in runs for when in ("limits_before", "limits_after") if when in run]
    found = [{"limit": _limit(weight_bytes, spec, case, {**limits, **rates})} for rates in measured]
    shares = [{"cpu_share": rates["cpu_share"]} for rates in measured if "cpu_share" in rates]
    return moved([{"limits_before": rates} for rates in found + shares])


def ratios(
    mine: Sequence[Outcome], other: Sequence[Outcome], changed: Callable[[Sequence[Outcome]], float] = moved
) -> dict[str, Any]:
    """Ratios of one engine's rounds to another's, above 1 where the first is better; see ratio().

    `changed` says by which share the machine changed around two runs.
    """
    pairs = list(zip(mine, other, strict=False))  # one that failed has fewer
    steady = [pair for pair in pairs if changed(pair) <= UNSTEADY_ABOVE]
    speeds = [a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in steady]
    firsts = [_ttft_s(b) / max(_ttft_s(a), 1e-4) for a, b in steady]
    return {
        "output_tokens_per_s": ratio(speeds, len(pairs)),
        "ttft": ratio(firsts, len(pairs)),
        "rounds_output_tokens_per_s": [round(value, 3) for value in speeds],
        "rounds_ttft": [round(value, 3) for value in firsts],
        "rounds_left_out": len(pairs) - len(steady),
    }


def ratio(values: Sequence[float], rounds: int) -> float | str:
    """The median of the ratios of the rounds that count, of so many; or why they do not tell."""
    if 2 * len(values) < rounds or not values:
        return (
            f"too noisy: the machine's limit fell by more than {UNSTEADY_ABOVE:.0%} within "
            f"{rounds - len(values)} of {rounds} rounds"
        )
    low, median, high = quartiles(values)
    if low < 1 < high:
        return f"too noisy: {low:.2f} to {high:.2f} in the middle half of {len(values)} rounds"
    return round(median, 2)


def quartiles(values: Sequence[float]) -> list[float]:
    """The three quartiles, interpolated between the values."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def judge(
    cases: Mapping[str, Case],
    outcomes: Outcomes,
    planned: Mapping[str, Planned],
    spec: ModelSpec,
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """By case: each engine's figures and share of its limit, and phalanx's ratios to every peer (above 1: better)."""
    result = {}
    for text, engines in outcomes.items():
        figures = {name: summarize(runs) for name, runs in engines.items()}
        ours = [name for name in engines if planned[name].ours]

        for name, runs in engines.items():
            speeds = figures[name]["runs_output_tokens_per_s"]
            for of, weight_bytes in (("limit", planned[name].weight_bytes), ("bf16_limit", 2.0)):
                if best := limits_of(weight_bytes, spec, cases[text], limits, runs):
                    figures[name][f"{of}_tokens_per_s"] = round(statistics.median(best), 1)
                    shares = [share(*pair) for pair in zip(speeds, best, strict=True)]
                    figures[name][f"share_of_{of}"] = round(statistics.median(shares), 3)
            if ours:
                figures[name]["first_tokens_as_phalanx"] = agreement(runs, engines[ours[0]])

        to_peers = {
            mine: {
                name: ratios(
                    engines[mine], runs, partial(limit_moved, planned[name].weight_bytes, spec, cases[text], limits)
                )
                for name, runs in engines.items()
                if not planned[name].ours
            }
            for mine in ours
        }

        every = [run for runs in engines.values() for run in runs]
        result[text] = {"engines": figures, "phalanx_to": to_peers, "limits_moved": moved(every)}
    return result


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """Lines for people: every ratio, or why there is none, and how steady the machine was."""
    found = []
    for text, case in verdict.items():
        found.append(f"{text}: the machine's rates fell by up to {case['limits_moved']:.0%} from round to round")
        for mine, peers in case["phalanx_to"].items():
            for name, to in peers.items():
                found.append(f"{text}: {mine} to {name}: {to['output_tokens_per_s']} (TTFT: {to['ttft']})")
    return found
