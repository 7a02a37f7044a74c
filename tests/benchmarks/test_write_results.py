"""benchmarks/RESULTS.md is what the files of benchmarks/results make, and README's figures stand in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.lab.result_tables.markdown import show
from phalanx.benchmarks.lab.write_results import KINDS, PAGE, RESULTS, main, write_page

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(RESULTS.glob("*.json"))
NOT_ONE_BY_ONE = ("runs_limits", "runs_read_gb_s", "kernels", "functions")
"""Lists of which the page has the range, or the longest only."""
NOT_RESULTS = ("measured_in_s", "goals")
"""What a section took, and goals, of which the page has those that were measured."""
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a result."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name not in NOT_RESULTS and (name not in NOT_ONE_BY_ONE or isinstance(each, dict)):
                yield from _numbers(each)
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _page(folder: Path, **results: Any) -> str:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(result if isinstance(result, str) else json.dumps(result))
    return write_page(folder)


def test_the_committed_page_is_what_the_files_make() -> None:
    assert PAGE.read_text() == write_page(RESULTS), "run python benchmarks/lab/write_results.py"
    assert main(["--check"]) == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_of_a_file_stands_on_the_page_in_full(path: Path, tmp_path: Path) -> None:
    result = json.loads(path.read_text())
    shown = set(NUMBER.findall(_page(tmp_path, one=result)))
    assert [number for number in _numbers(result) if show(number) not in shown] == []


def test_a_file_that_no_table_is_known_for_is_named(tmp_path: Path) -> None:
    page = _page(
        tmp_path, strange={"benchmark": "juggling", "balls": 7}, broken="{", odd=[1], known={"benchmark": "limits"}
    )
    named = page.split("## Files that no table is known for")[1]
    assert "`strange.json` is of benchmark=juggling" in named
    assert "`broken.json` is no JSON" in named
    assert "`odd.json` is of benchmark=None" in named
    assert "known.json" not in named


def test_figures_that_a_benchmark_did_not_have_before_are_shown_too(tmp_path: Path) -> None:
    page = _page(tmp_path, newer={"benchmark": "startup", "ready_s": 1.5, "runs": [], "news": {"deep": 4.25}})
    assert "Further figures of the file:\n\n| figure | value |\n|---|---|\n| `news.deep` | 4.25 |" in page


def test_a_comparison_says_ratios_of_rounds_or_why_there_is_none(tmp_path: Path) -> None:
    to = {"output_tokens_per_s": 1.87, "ttft": "too noisy: 0.90 to 1.10", "rounds_output_tokens_per_s": [1.5, 1.87, 2]}
    engines = {"phalanx": {"output_tokens_per_s": 40.9, "runs_read_gb_s": [55.0, 32.0]}, "vllm": {}}
    case = {"engines": engines, "phalanx_to": {"phalanx": {"vllm": to}}, "limits_moved": 0.25}
    curves = {"output_tokens_per_s_by_concurrency": {"phalanx": [[1, 40.5], [2, 70.5]]}}
    failed = {"vllm": "out of memory"}
    result = {"benchmark": "compare", "cases": {"1,64,64": case}, "engines": {}, "curves": curves, "failed": failed}
    page = _page(tmp_path, one=result)
    assert "#### 1 request, 64 prompt tokens, 64 new tokens" in page
    assert "| phalanx to vllm | 1.87 | too noisy: 0.90 to 1.10 | 1.5, 1.87, 2 |" in page
    assert "read_gb_s 32.0 to 55.0" in page
    assert "between two measurements: 0.25." in page
    assert "| engine | 1 | 2 |\n|---|---|---|\n| phalanx | 40.5 | 70.5 |" in page
    assert "Failed: vllm out of memory." in page


def test_linear_layers_and_latencies_have_tables(tmp_path: Path) -> None:
    case = {"format": "int8", "rows": 32, "instructions": "avx2", "place": "memory", "shapes": {"qkv": {"ms": 0.5}}}
    linear = {"benchmark": "linear", "cases": [case], "limits": {"read_gb_s": 30.5}}
    latency = {"benchmark": "latency", "ranks": {"2": {"ready_s": 3.25, "8": {"tpot_ms": 20.5}}}, "limits": None}
    page = _page(tmp_path, linear=linear, latency=latency)
    assert "#### int8, weights: memory" in page
    assert "| 32 rows, avx2, qkv | 0.5 |" in page
    assert "| `read_gb_s` | 30.5 |" in page
    assert "#### ranks=2" in page
    assert "| 8 | 20.5 |" in page
    assert "| `ready_s` | 3.25 |" in page


def test_servers_under_load_have_tables(tmp_path: Path) -> None:
    latency = {"p50": 12.5, "p95": 30.25}
    figures = {
        "output_tokens_per_s": 812.4,
        "goodput_requests_per_s": 3.5,
        "failed": 0,
        "client_cpu_share": 0.031,
        "ttft_ms": latency,
        "tpot_ms": latency,
    }
    results = [
        {"server": "one", "mode": "closed", "level": 8, **figures},
        {"server": "two", "mode": "open", "level": 2.5, **figures},
    ]
    ratios = [{"of": "one", "to": "two", "level": "concurrency 8", "output_tokens_per_s": 1.31, "ttft_p95": 0.72}]
    page = _page(tmp_path, serve={"benchmark": "serve", "results": results, "ratios": ratios, "models": {"one": "m"}})
    assert "| figure | one, 8 under way | two, 2.5 requests a second |" in page
    assert "| output tokens/s | 812.4 | 812.4 |" in page
    assert "| TTFT, ms | p50 12.5, p95 30.25 | p50 12.5, p95 30.25 |" in page
    assert "| one / two, concurrency 8 | 1.31 | 0.72 |" in page


def test_every_benchmark_has_a_table() -> None:
    programs = {path.stem for folder in ("", "parts") for path in (ROOT / "benchmarks" / folder).glob("*.py")}
    assert programs == set(KINDS)


def test_the_figures_that_readme_leads_with_stand_in_the_file_it_names() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if "](benchmarks/results/" in line]
    assert len(lines) == 3
    for line in lines:
        (name,) = re.findall(r"benchmarks/results/(\S+\.json)", line)
        found = list(_numbers(json.loads((RESULTS / name).read_text())))
        figures = re.findall(r"\*\*([\d.,]+)\*\*", line)
        assert figures, line
        for figure in figures:
            digits = len(figure.partition(".")[2])
            assert any(f"{number:,.{digits}f}" == figure for number in found), (figure, name)
