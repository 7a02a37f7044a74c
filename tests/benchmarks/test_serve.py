"""benchmarks/serve.py: what it measures of a server, and of itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.lab.http_load.answers import read_answer
from phalanx.benchmarks.lab.http_load.client import Exchange, Target
from phalanx.benchmarks.serve import Level, Options, draw, make_bodies, measure, tables, trivial_server
from phalanx.engine.errors import ConfigError

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "serve.py"


def event(**choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def exchange(*pieces: tuple[float, bytes], status: int = 200) -> Exchange:
    return Exchange(due=1.0, sent=1.25, status=status, pieces=list(pieces), ended=9.0)


def test_an_answers_times_count_from_when_it_was_due_and_its_tokens_from_usage() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n'
    role = event(delta={"role": "assistant", "content": ""})
    first, second = event(delta={"content": "a"}), event(delta={"content": "b"})
    answer = read_answer(
        exchange(
            (2.0, b": keep-alive\n\n" + role), (3.0, first[:9]), (4.0, first[9:]), (6.0, second + usage),
            (6.0, b"data: [DONE]\n\n"),
        )
    )  # fmt: skip
    assert (answer.error, answer.ttft_s, answer.e2e_s, answer.late_s) == (None, 3.0, 8.0, 0.25)
    assert answer.gaps_s == (2.0,)
    assert (answer.prompt_tokens, answer.output_tokens, answer.tpot_ms) == (7, 5, 500.0)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (exchange((2.0, event(text="a"))), "without \\[DONE\\]"),
        (exchange((2.0, b"data: [DONE]\n\n")), "without text"),
        (exchange((2.0, b'{"error": 1}'), status=429), "status 429"),
        (exchange((2.0, event(text="a")), (3.0, b'data: {"error": {"message": "no"}}\n\ndata: [DONE]\n\n')), "no"),
    ],
)
def test_an_answer_that_is_not_whole_is_a_failure(given: Exchange, error: str) -> None:
    import re

    assert re.search(error, str(read_answer(given).error))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_prompts_share_only_the_beginning_that_is_asked_for(endpoint: str) -> None:
    options = Options(requests=3, prompt_tokens=12, shared_tokens=5, endpoint=endpoint)
    bodies = [json.loads(body) for body in make_bodies(options, "m", 1)]
    texts = [body["prompt"] if endpoint == "completions" else body["messages"][0]["content"] for body in bodies]
    assert len({tuple(text.split()[:5]) for text in texts}) == 1
    assert len(set(texts)) == 3
    assert all(len(text.split()) == 12 for text in texts)
    others = make_bodies(options, "m", 2)
    assert others[0] != make_bodies(options, "m", 1)[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"servers": "http://x/v1"}, {"servers": "a=ftp://x"}, {"concurrencies": "0"}, {"concurrencies": None},
        {"rates": "-1"}, {"rates": "fast"}, {"requests": 0}, {"endpoint": "edits"}, {"shared_tokens": 999},
        {"pause_s": -1}, {"pause_s": float("nan")},
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        measure(Options(**wrong))


def test_the_client_reads_whole_answers_over_kept_connections_and_notes_what_fails() -> None:
    async def main() -> None:
        with trivial_server(5) as url:
            target = Target(url, "key", 10)
            for _ in range(3):
                answer = read_answer(await target.post("/completions", b"{}" * 50_000))
                assert (answer.error, answer.output_tokens, len(answer.gaps_s)) == (None, 5, 4)
        gone = await target.post("/completions", b"{}")
        assert gone.error
        target.close()

    asyncio.run(main())


def test_a_run_measures_the_server_in_both_loops_and_draws(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    with trivial_server(6) as url:
        options = Options(
            servers=f"one={url},other={url}", model="trivial", concurrencies="2", rates="200", requests=8, new_tokens=6,
            repeats=2, pause_s=0.05, plot=str(plot), ttft_target_ms=60_000.0, tpot_target_ms=60_000.0,
        )  # fmt: skip
        result = measure(options)
    assert [(each["server"], each["mode"]) for each in result["results"]] == [
        ("one", "closed"), ("one", "open"), ("other", "closed"), ("other", "open"),
    ]  # fmt: skip
    for each in result["results"]:
        assert (each["requests"], each["failed"], each["output_tokens"]) == (8, 0, 48)
        assert each["goodput_share"] == 1
        assert each["client_cpu_share"] > 0
    assert result["client"]["cpu_us_per_token"] > 0
    assert [ratio["level"] for ratio in result["ratios"]] == ["concurrency 2", "rate 200"]
    assert plot.read_text().count("polyline") == 12


def test_ratios_are_within_the_rounds_and_figures_of_the_median_round() -> None:
    level = Level(concurrency=1)

    def figures(rate: float) -> dict[str, Any]:
        return {"output_tokens_per_s": rate, "ttft_ms": {"p95": 10.0}, "goodput_requests_per_s": 1.0}

    runs = {("a", level): [figures(10), figures(40), figures(20)], ("b", level): [figures(5), figures(10), figures(10)]}
    made = tables(["a", "b"], [level], runs)
    assert [each["output_tokens_per_s"] for each in made["results"]] == [20, 10]
    assert made["ratios"][0]["output_tokens_per_s"] == 2.0
    assert "a" in draw(made["results"])


def test_a_server_that_is_not_there_is_named() -> None:
    command = [sys.executable, str(BENCHMARK), "servers=gone=http://127.0.0.1:9/v1", "concurrencies=1", "requests=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "gone lists no model" in ended.stderr
    assert "Traceback" not in ended.stderr
