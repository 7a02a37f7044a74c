"""The benchmarks: their arithmetic, and that each ends with the JSON line it promises."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from phalanx.benchmarks.lab.common import check_writable, percentiles, read_options, settings, significant
from phalanx.benchmarks.lab.peers.programs.program import random_prompts
from phalanx.benchmarks.lab.rates import Limits
from phalanx.benchmarks.limits import layer_weights, share
from phalanx.benchmarks.step import linear_flops, linear_rate, rates_around, step_plan
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import spec_from_config
from phalanx.launch.cli.presets import load_preset
from phalanx.launch.model_files.random_model import make_random_model

ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@dataclass
class Options:
    requests: int = 32
    model: str | None = None
    out: str | None = None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    shape = {**load_preset("qwen2_5_0_5b")["shape"], **TINY, **HEADS, **ids}
    return make_random_model(tmp_path_factory.mktemp("models") / "tiny", shape)


def run_benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def last_line(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_percentiles_are_values_of_the_nearest_rank() -> None:
    assert percentiles([float(i) for i in range(100, 0, -1)], 1) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0, 1.0, 2.0], 1) == {"p50": 2.0, "p95": 3.0, "p99": 3.0}
    assert percentiles([0.12345], 2) == {"p50": 0.12, "p95": 0.12, "p99": 0.12}
    assert percentiles([], 2) is None


def test_random_prompts_are_the_same_each_time_and_within_the_vocabulary() -> None:
    prompts = random_prompts(5, 50, vocab_size=300, seed=1)
    assert prompts == random_prompts(5, 50, vocab_size=300, seed=1) != random_prompts(5, 50, vocab_size=300, seed=2)
    assert {len(prompt) for prompt in prompts} == {50}
    assert all(100 <= token < 300 for prompt in prompts for token in prompt)
    assert random_prompts(1, 3, vocab_size=1) == [[0, 0, 0]]


def test_options_are_read_from_the_command_line() -> None:
    assert read_options(Options, ["requests=4", "model=some/folder"]) == Options(4, "some/folder")


@pytest.mark.parametrize(
    ("argument", "message"),
    [("request=4", "did you mean 'requests'"), ("requests=many", "many"), ("requests", "requests=VALUE")],
)
def test_a_wrong_option_is_refused_by_name(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_options(Options, [argument])


def test_settings_keep_no_folders_of_the_machine() -> None:
    assert settings(Options(1, "/some/where/tiny", "/a/file")) == {"requests": 1, "model": "tiny"}

    @dataclass
    class WithPeer(Options):
        peer: str = "/opt/peers/vllm"

    assert settings(WithPeer(1, "some/where/tiny")) == {"requests": 1, "model": "tiny", "peer": "vllm"}


def test_throughput_ends_with_one_json_line_of_every_figure(tiny: Path, tmp_path: Path) -> None:
    load = ("requests=5", "prompt_tokens=9", "new_tokens=6", "repeats=2", "concurrency=2", "rate=1000")
    out = tmp_path / "result.json"
    process = run_benchmark("throughput", f"model={tiny}", *load, f"out={out}")
    result = last_line(process)
    assert json.loads(out.read_text()) == result
    assert (result["requests"], result["output_tokens"]) == (5, 30)
    assert len(result["runs_output_tokens_per_s"]) == 2
    for name in ("ttft_s", "tpot_ms", "itl_ms"):
        assert set(result[name]) == {"p50", "p95", "p99"}
    assert len(result["peak_memory_bytes"]) == 1
    assert result["settings"]["model"] == "tiny"
    assert result["machine"]["cores"] >= 1
    assert set(result["versions"]) == {"phalanx", "python", "torch", "transformers"}


def test_throughput_takes_the_requests_of_a_file(tiny: Path, tmp_path: Path) -> None:
    lines = [{"id": "a", "token_ids": [5, 6, 7]}, {"id": "b", "prompt": "hello", "sampling": {"max_tokens": 2}}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_line(run_benchmark("throughput", f"model={tiny}", f"input={file}", "repeats=1"))["requests"] == 2


def test_bad_input_is_one_line_that_says_what_is_allowed(tiny: Path) -> None:
    process = run_benchmark("throughput", f"model={tiny}", "peer=somebody")
    assert process.returncode == 1
    assert process.stderr.splitlines() == ["error: peer='somebody' must be transformers"]


def test_startup_ends_with_one_json_line_of_its_phases_in_order(tiny: Path) -> None:
    result = last_line(run_benchmark("startup", f"model={tiny}", "repeats=1"))
    assert result["import_s"] <= result["load_s"] <= result["ready_s"] <= result["first_token_s"]


@pytest.mark.slow
def test_throughput_gives_the_ratio_to_transformers(tiny: Path) -> None:
    load = ("requests=3", "prompt_tokens=9", "new_tokens=6", "repeats=1")
    result = last_line(run_benchmark("throughput", f"model={tiny}", *load, "peer=transformers"))
    assert result["ratio_to_transformers"] > 0


@pytest.mark.slow
def test_before_after_measures_each_case_at_both_commits(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "phalanx"
    other.symlink_to(ROOT)
    sizes = ("requests=2", "prompt_tokens=20", "new_tokens=2", "repeats=1", "rounds=1", "startups=0")
    result = last_line(run_benchmark("parts/before_after", f"before={other}", f"model={tiny}", "dtype=float32", *sizes))
    assert set(result["cases"]) == {"one_request", "many_requests", "prompt", "shared_prompt", "scheduler"}
    for case in result["cases"].values():
        assert case["rounds"] == 1
        assert case["before/after"] == round(case["before_s"] / case["after_s"], 3)


def test_before_after_refuses_what_is_no_checkout(tiny: Path, tmp_path: Path) -> None:
    process = run_benchmark("parts/before_after", f"before={tmp_path}", f"model={tiny}")
    assert process.returncode == 1
    assert f"before={tmp_path} must be a checkout of phalanx" in process.stderr


def test_before_after_names_the_cases_that_it_knows(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "phalanx"
    other.symlink_to(ROOT)
    process = run_benchmark("parts/before_after", f"before={other}", f"model={tiny}", "cases=one_request,none")
    assert process.returncode == 1
    assert "cases='one_request,none' must be some of one_request, many_requests" in process.stderr


@pytest.mark.slow
def test_startup_measures_a_group_of_ranks(tiny: Path) -> None:
    result = last_line(run_benchmark("startup", f"model={tiny}", "repeats=1", "ranks=2"))
    assert result["import_s"] <= result["ready_s"] <= result["first_token_s"]


def test_step_times_each_part_of_a_step_and_states_its_limit(tiny: Path) -> None:
    done = run_benchmark("step", f"model={tiny}", "rows=1,3", "context=20", "prompts=24", "repeats=2", "limits_s=0.02")
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["steps"]) == {"decode_1", "decode_3", "prompt_24"}
    for step in result["steps"].values():
        assert all(step[f"{part}_ms"] > 0 for part in ("step", "mlp", "head", "attention", "sampling", "tensors"))
        assert step["least_ms"] == pytest.approx(max(step["read_ms"], step["multiply_ms"]), rel=1e-3)
        assert 0 < step["share_of_limit"] <= 2
        assert step["share_of_limit"] == pytest.approx(step["least_ms"] / step["step_ms"], rel=0.01)
        parts = step["linear_ms"], step["head_ms"]
        assert step["products_ms"] == pytest.approx(sum(parts), abs=0.001 * sum(map(abs, parts)))
        if step["linear_ms"] > 0:
            assert step["linear_gflops"] / step["best_gflops"] == pytest.approx(step["linear_share"], rel=0.01)


def test_linear_layers_that_took_no_time_have_no_rate() -> None:
    spec = spec_from_config(load_preset("qwen2_5_0_5b")["shape"], "qwen2_5_0_5b")
    plan = step_plan(rows=1, first=20, count=1, block_size=16)
    flops = linear_flops(spec, 1, 1)
    found = linear_rate(spec, plan, linear_ms=flops / 1e9, best_gflops=4000.0)
    assert found == {"linear_ms": significant(flops / 1e9, 4), "linear_gflops": 1000.0, "linear_share": 0.25}
    for none in (0.0, -0.002):  # a difference of two medians
        assert linear_rate(spec, plan, none, 4000.0) == {"linear_ms": none, "linear_gflops": None, "linear_share": None}


def test_no_share_and_no_time_becomes_zero_by_its_rounding() -> None:
    assert [share(value, 30_000) for value in (1, 10_000, 60_000)] == [3.33e-5, 0.333, 2.0]
    assert [significant(value, 4) for value in (0.00012345678, 1.23456, 12345.678)] == [0.0001235, 1.235, 12350.0]


def test_a_step_is_beside_the_best_rates_around_it_or_where_none_are_measured_the_machines_limits() -> None:
    limits = Limits(**{field.name: 100.0 for field in dataclasses.fields(Limits)})  # type: ignore[arg-type]
    before, after = {"read_gb_s": 20.0, "bf16_gflops": 900.0, "int8_gflops": 1900.0}, {"read_gb_s": 25.0}
    assert rates_around(limits, False, before, after) == {"read_gb_s": 25.0, "best_gflops": 900.0}
    assert rates_around(limits, True, before, after) == {"read_gb_s": 25.0, "best_gflops": 1900.0}
    assert rates_around(limits, False, {}, {}) == {"read_gb_s": 100.0, "best_gflops": 100.0}


def test_a_steps_linear_layers_are_counted_once_a_token_and_the_last_mlp_for_the_sampled_alone() -> None:
    spec = spec_from_config(load_preset("qwen2_5_0_5b")["shape"], "qwen2_5_0_5b")
    assert linear_flops(spec, 3, 3) == 3 * 2 * layer_weights(spec)
    layer, qkv = 896 * (14 * 64 * 2 + 2 * 2 * 64) + 3 * 896 * 4864, 896 * (14 + 4) * 64
    assert linear_flops(spec, 1024, 1024) - linear_flops(spec, 1024, 1) == 2 * 1023 * (layer - qkv)


ENDED = """
import os, signal
from dataclasses import dataclass
from phalanx.benchmarks.lab.common import run

@dataclass
class Options:
    out: str | None = None

def benchmark(options):
    try:
        os.kill(os.getpid(), signal.NUMBER)
        signal.pause()
    finally:
        print("ended what was started", flush=True)

run(Options, benchmark)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_benchmark_that_is_told_to_end_ends_what_it_started(number: signal.Signals) -> None:
    command = [sys.executable, "-c", ENDED.replace("signal.NUMBER", str(number.value))]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (process.stdout, process.stderr) == ("ended what was started\n", "")
    assert process.returncode == 128 + number


@pytest.mark.parametrize("out", ["/no/such/folder/x.json", "/dev", "/dev/null/x", "a\0b"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(out: str) -> None:
    with pytest.raises(ConfigError, match=r"^out=.* cannot be written: "):
        check_writable("out", out)


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    for path in (old, tmp_path / "new.json"):
        check_writable("out", path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]
