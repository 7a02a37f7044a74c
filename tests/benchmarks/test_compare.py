"""The comparison: limits of the machine, engines in turns, their figures and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from phalanx.benchmarks import limits
from phalanx.benchmarks.compare import Contest, Options, curve, sizes_of
from phalanx.benchmarks.lab.peers.engines import Q8_0_BYTES, Planned, Sizes, plan_peers, plan_phalanx, weight_bytes
from phalanx.benchmarks.lab.peers.plot import chart, document, nice_top
from phalanx.benchmarks.lab.peers.process import EngineProcess
from phalanx.benchmarks.lab.peers.programs.program import Case, Seen, Stepping, arrivals, note, outcome, read_case
from phalanx.benchmarks.lab.peers.verdict import (
    UNSTEADY_ABOVE,
    agreement,
    around,
    judge,
    limit_moved,
    lines,
    moved,
    quartiles,
    ratio,
    ratios,
)
from phalanx.benchmarks.limits import Work
from phalanx.engine.errors import ConfigError, EngineStopped
from phalanx.engine.models.spec import ModelSpec, spec_from_config
from phalanx.kernels import cpu
from phalanx.kernels.weight_formats import NAMES
from phalanx.launch.cli.presets import load_preset
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.tests.kernels.packing import pack
from phalanx.tests.models import TINY_SHAPE

ROOT = Path(__file__).resolve().parents[2]
BANDWIDTH, FLOPS = 1e10, 1e11
SIZES = Sizes(max_model_len=99, context=999)

FAKE_PROGRAM = """
import sys, threading
sys.path.insert(0, {folder!r})
from program import Seen, main

class Fake:
    version = "fake 1"
    def run(self, case):
        print("engines print what they like")
        if case.new_tokens == 13:
            sys.exit("out of luck")
        return [Seen([prompt[0]] * case.new_tokens, 0.5, 1.0) for prompt in case.prompts]

def make(model, options):
    def spin():
        while True: pass
    threading.Thread(target=spin, daemon=True).start()
    return Fake()

main(make)
"""


def preset_spec(name: str) -> ModelSpec:
    return spec_from_config(load_preset(name)["shape"], name)


@pytest.fixture
def fake(tmp_path: Path) -> list[str]:
    path = tmp_path / "fake.py"
    path.write_text(FAKE_PROGRAM.format(folder=str(ROOT / "benchmarks" / "lab" / "peers" / "programs")))
    return [sys.executable, str(path), "model"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("models") / "tiny", TINY_SHAPE)


def run_benchmark(name: str, *arguments: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("qwen2_5_0_5b", 494_032_768), ("qwen3_0_6b", 596_049_920), ("qwq_32b", 32_763_876_352)],
)
def test_weights_are_the_published_numbers_of_parameters(preset: str, parameters: int) -> None:
    spec = preset_spec(preset)
    looked_up = 0 if spec.tied_embeddings else limits.head_weights(spec)
    assert (
        limits.layer_weights(spec) + limits.vector_weights(spec) + limits.head_weights(spec) + looked_up == parameters
    )


def test_a_step_reads_a_tied_head_but_no_embeddings() -> None:
    tied = preset_spec("qwen2_5_0_5b")
    assert limits.step_weight_bytes(Work(tied)) == 2 * 494_032_768
    untied = spec_from_config({**load_preset("qwen2_5_0_5b")["shape"], "tie_word_embeddings": False}, "untied")
    assert limits.step_weight_bytes(Work(untied)) == limits.step_weight_bytes(Work(tied))
    assert limits.kv_token_bytes(Work(tied)) == 2 * 24 * 2 * 64 * 2


def test_decode_is_limited_by_reading_alone_and_by_computing_in_large_batches() -> None:
    spec = preset_spec("qwen2_5_0_5b")
    alone = limits.decode_limit_tokens_per_s(spec, 2, 0, 1, BANDWIDTH, FLOPS)
    assert alone == pytest.approx(BANDWIDTH / (2 * 494_032_768))
    assert limits.decode_limit_tokens_per_s(spec, 2, 0, 2, BANDWIDTH, FLOPS) == pytest.approx(2 * alone)
    many = limits.decode_limit_tokens_per_s(spec, 2, 0, 4096, BANDWIDTH, FLOPS)
    assert many == pytest.approx(FLOPS / limits.token_flops(spec, 0))
    assert limits.decode_limit_tokens_per_s(spec, 2, 1000, 1, BANDWIDTH, FLOPS) < alone
    assert limits.decode_limit_tokens_per_s(spec, 1, 0, 1, BANDWIDTH, FLOPS) == pytest.approx(2 * alone, rel=1e-3)


def test_prefill_computes_the_head_once_and_reads_the_weights_at_least_once() -> None:
    spec = preset_spec("qwen2_5_0_5b")
    one = limits.prefill_s(Work(spec), 1, 1, BANDWIDTH, 1e30)
    assert one == pytest.approx(2 * 494_032_768 / BANDWIDTH)
    flops = 1024 * limits.token_flops(spec, 512.5, head=False) + 2 * limits.head_weights(spec)
    assert limits.prefill_limit_tokens_per_s(spec, 2, 1024, BANDWIDTH, FLOPS) == pytest.approx(1024 * FLOPS / flops)


def test_a_case_of_one_token_is_a_prefill_and_a_longer_one_adds_its_steps() -> None:
    work = Work(preset_spec("qwen2_5_0_5b"))
    rates = (BANDWIDTH, FLOPS)
    prefill = limits.prefill_s(work, 64, 4, *rates)
    assert limits.case_limit_tokens_per_s(work, 4, 64, 1, *rates) == pytest.approx(4 / prefill)
    seconds = prefill + limits.decode_step_s(work, 65, 4, *rates) + limits.decode_step_s(work, 66, 4, *rates)
    assert limits.case_limit_tokens_per_s(work, 4, 64, 3, *rates) == pytest.approx(12 / seconds)


def test_a_case_is_read_from_text() -> None:
    case = read_case("3,5,2", vocab_size=300)
    assert (len(case.prompts), case.new_tokens, case.due_s) == (3, 2, [0.0, 0.0, 0.0])
    assert all(100 <= token < 300 for prompt in case.prompts for token in prompt)
    assert case == read_case("3,5,2", vocab_size=300) != read_case("3,5,2", vocab_size=300, seed=1)
    due = read_case("50,5,2,4.0").due_s
    assert due == sorted(due) == arrivals(50, 4.0)
    assert due[0] == 0 < due[1]


@pytest.mark.parametrize("text", ["1,2", "1,2,3,4,5", "0,1,1", "1,1,1,0", "a,b,c"])
def test_a_case_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cases"):
        Options(cases=text).read_cases(300)


def test_engines_are_as_large_as_the_largest_case_needs() -> None:
    assert sizes_of([read_case("3,5,2"), read_case("1,9,4")]) == Sizes(max_model_len=13, context=21)


class Echo:
    """Yields each request's number so many times, one a step; at most two requests at once."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.most = 0

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        self.left[number] = new_tokens

    def step(self) -> dict[int, list[int]]:
        running = list(self.left)[:2]
        self.most = max(self.most, len(self.left))
        for number in running:
            self.left[number] -= 1
            if not self.left[number]:
                del self.left[number]
        return {number: [number] for number in running}


def test_requests_are_stepped_until_all_have_their_tokens() -> None:
    echo = Echo()
    engine = Stepping(echo, "echo")
    case = Case([[1]] * 5, 3, [0.0, 0.0, 0.0, 0.01, 0.02])
    assert [seen.tokens for seen in engine.run(case)] == [[n] * 3 for n in range(5)]
    assert [seen.tokens for seen in engine.run(case)] == [[n] * 3 for n in range(5, 10)]  # numbers are never used twice
    assert echo.most >= 3


def test_an_outcome_counts_from_when_a_request_was_due() -> None:
    seen = [Seen(), Seen()]
    for entry, moments in zip(seen, ((1.0, 2.0), (3.0, 5.0)), strict=True):
        for moment in moments:
            note(entry, [7], moment)
    result = outcome(Case([[1, 2], [3, 4]], 2, [0.5, 2.5]), seen)
    assert (result["ttft_s"], result["latency_s"]) == ([0.5, 0.5], [1.5, 2.5])
    assert (result["seconds"], result["output_tokens_per_s"]) == (5.0, 0.8)
    with pytest.raises(RuntimeError, match="2 of 3 tokens"):
        outcome(Case([[1, 2], [3, 4]], 3, [0.5, 2.5]), seen)


def test_an_engine_in_a_process_is_stopped_and_goes_on(fake: list[str], tmp_path: Path) -> None:
    process = EngineProcess("fake", fake, tmp_path / "log")
    try:
        assert process.version == "fake 1"
        process.stop()
        while process.busy_cores(0.01):  # a signal takes a moment to arrive
            pass
        assert process.busy_cores(0.05) == 0
        process.go_on()
        assert process.run(Case([[5], [6]], 2, [0.0, 0.0]))["tokens"] == [[5, 5], [6, 6]]
        with pytest.raises(EngineStopped, match=r"(?s)fake ended with exit code 1.*out of luck"):
            process.run(Case([[5]], 13, [0.0]))
    finally:
        process.close()


def test_an_engine_that_fails_is_out_and_the_others_go_on(fake: list[str], tmp_path: Path) -> None:
    case = read_case("2,4,2")
    rates = iter(range(1, 100))
    contest = Contest({"2,4,2": case}, tmp_path, measure=lambda: {"read_gb_s": float(next(rates))})
    outcomes: dict[str, Any] = {}
    try:
        contest.enter(Planned("absent", (sys.executable, "-c", "raise SystemExit('no engine')"), 2.0))
        contest.enter(Planned("fake", tuple(fake), 2.0, arrivals=False))
        contest.round({"2,4,2": case, "2,4,2,9": read_case("2,4,2,9")}, outcomes, "round 1")
        assert list(contest.report) == ["fake"]
        assert "no engine" in contest.failures["absent"]
        assert list(outcomes) == ["2,4,2"]  # what takes no arrivals is given none
        assert around(outcomes["2,4,2"]["fake"][0]) == {"read_gb_s": 2.0}
        contest.round({"2,4,13": read_case("2,4,13")}, outcomes, "round 2")
        assert "out of luck" in contest.failures["fake"]
    finally:
        contest.close()


def test_each_round_can_begin_with_another_engine(
    fake: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = read_case("1,4,2")
    contest = Contest({"1,4,2": case}, tmp_path, measure=dict)
    try:
        for name in "abc":
            contest.enter(Planned(name, tuple(fake), 2.0))
        capsys.readouterr()
        for number in range(4):
            contest.round({"1,4,2": case}, {}, f"round {number}", first=number)
    finally:
        contest.close()
    order = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert "".join(order) == "abcbcacababc"


@pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
@pytest.mark.parametrize("kind", NAMES)
def test_a_weights_bytes_are_those_that_the_kernels_read(kind: str) -> None:
    weight = torch.ones(64, 12800, dtype=torch.bfloat16)
    expected = weight_bytes({"quantization": kind}) * weight.numel()
    # w8a8's one scale a row is nothing beside the row.
    assert pack(weight, 64, kind).nbytes == pytest.approx(expected, rel=1e-3 if kind == "w8a8" else 1e-9)


def test_phalanx_is_planned_for_each_variant_and_number_of_ranks() -> None:
    planned = plan_phalanx(Path("/models/m"), ["", "quantization=int8,threads=1"], [1, 2], SIZES)
    assert [engine.name for engine in planned] == [
        "phalanx ranks=1",
        "phalanx ranks=2",
        "phalanx ranks=1 quantization=int8 threads=1",
        "phalanx ranks=2 quantization=int8 threads=1",
    ]
    assert planned[3].command[-5:] == ("/models/m", "ranks=2", "max_model_len=99", "quantization=int8", "threads=1")
    assert all(engine.ours for engine in planned)
    bf16 = 1.5 + 16 / 2048 if cpu.compresses() else 2
    assert [engine.weight_bytes for engine in planned] == [bf16, bf16, 1 + 2 / 32, 1 + 2 / 32]
    assert weight_bytes({"dtype": "float32"}) == 4
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        plan_phalanx(Path("m"), ["int8"], [1], SIZES)


def test_a_peer_that_is_not_installed_is_left_out_with_what_to_do(tmp_path: Path) -> None:
    for name in ("vllm", "openvino"):
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
    exported = tmp_path / "models" / f"{tmp_path.name}-openvino-int8"
    exported.mkdir(parents=True)
    [int8], _ = plan_peers(tmp_path, ["openvino_int8"], [1], SIZES, tmp_path)
    assert (int8.command[2], int8.weight_bytes) == (str(exported), 1.0)
    planned, missing = plan_peers(tmp_path, ["vllm", "llamacpp_q8", "transformers"], [1, 2], SIZES, tmp_path)
    assert [engine.name for engine in planned] == ["vllm ranks=1", "vllm ranks=2", "transformers"]
    assert planned[1].command[-2:] == ("ranks=2", "max_model_len=99")
    assert not any(engine.ours for engine in planned)
    [message] = missing
    assert message.startswith("llamacpp_q8 is left out")
    assert message.endswith(f"benchmarks/lab/peers/install.py {tmp_path} {tmp_path} llamacpp makes it")
    with pytest.raises(ConfigError, match="did you mean 'vllm'"):
        plan_peers(tmp_path, ["vlm"], [1], SIZES, tmp_path)


def figures(speed: float, ttft: float, token: int) -> dict[str, Any]:
    outcome = {"ttft_s": [ttft], "latency_s": [ttft + 1.0], "new_tokens": 11, "seconds": 1.0}
    return outcome | {"output_tokens_per_s": speed, "tokens": [[token] * 11]}


def test_a_verdict_is_of_medians_with_ratios_to_every_peer_and_shares_of_the_limit() -> None:
    spec = preset_spec("qwen2_5_0_5b")
    planned = {name: Planned(name, (), size) for name, size in (("phalanx ranks=1", 2.0), ("q8", Q8_0_BYTES))}
    outcomes = {
        "1,64,11": {
            "phalanx ranks=1": [figures(speed, 0.2, 5) for speed in (8.0, 9.0, 2.0)],
            "q8": [figures(speed, 0.1, 6) for speed in (4.0, 4.0, 4.0)],
        }
    }
    rates = {"read_gb_s": BANDWIDTH / 1e9, "bf16_gflops": FLOPS / 1e9, "int8_gflops": 2 * FLOPS / 1e9}
    cases = {"1,64,11": read_case("1,64,11")}
    verdict = judge(cases, outcomes, planned, spec, rates)["1,64,11"]
    mine, other = verdict["engines"]["phalanx ranks=1"], verdict["engines"]["q8"]
    assert (mine["output_tokens_per_s"], mine["runs_output_tokens_per_s"]) == (8.0, [8.0, 9.0, 2.0])
    assert (mine["tpot_ms"], mine["ttft_s"]) == (100.0, 0.2)
    assert mine["limit_tokens_per_s"] < other["limit_tokens_per_s"]
    assert mine["share_of_limit"] == pytest.approx(8.0 / mine["limit_tokens_per_s"], abs=0.01)
    assert (mine["first_tokens_as_phalanx"], other["first_tokens_as_phalanx"]) == (1.0, 0.0)
    # Each run's share is of what memory gave when it ran.
    for run, rate in zip(outcomes["1,64,11"]["q8"], (1.0, 2.0, 4.0), strict=True):
        run["limits_before"] = {"read_gb_s": rate * BANDWIDTH / 1e9}
    again = judge(cases, outcomes, planned, spec, rates)["1,64,11"]["engines"]["q8"]
    assert 1.4 * other["limit_tokens_per_s"] < again["limit_tokens_per_s"] < 2 * other["limit_tokens_per_s"]
    assert again["share_of_limit"] == pytest.approx(4.0 / again["limit_tokens_per_s"], abs=0.01)
    assert again["share_of_bf16_limit"] > again["share_of_limit"]
    to = verdict["phalanx_to"]["phalanx ranks=1"]["q8"]
    assert (to["output_tokens_per_s"], to["ttft"], to["rounds_left_out"]) == (2.0, 0.5, 0)
    assert to["rounds_output_tokens_per_s"] == [2.0, 2.25, 0.5]
    assert "share_of_limit" not in judge(cases, outcomes, planned, spec, {})["1,64,11"]["engines"]["q8"]
    assert agreement(outcomes["1,64,11"]["q8"], outcomes["1,64,11"]["q8"]) == 1.0
    points = curve(outcomes, 0, lambda run: run["output_tokens_per_s"])
    assert points == {"phalanx ranks=1": [(1.0, 8.0)], "q8": [(1.0, 4.0)]}


def steady(run: dict[str, Any], before: float, after: float) -> dict[str, Any]:
    return run | {"limits_before": {"read_gb_s": before}, "limits_after": {"read_gb_s": after}}


def test_ratios_are_of_the_runs_of_one_round_so_that_a_machine_that_drifts_does_not_matter() -> None:
    drift = (1.0, 2.0, 4.0, 3.0, 0.5)
    mine, other = ([figures(speed * factor, 0.1, 5) for factor in drift] for speed in (12.0, 10.0))
    assert ratios(mine, other)["output_tokens_per_s"] == 1.2
    assert ratios(mine, other[:2])["rounds_output_tokens_per_s"] == [1.2, 1.2]  # the other failed after two


def test_a_round_in_which_the_machine_changed_does_not_count() -> None:
    mine = [steady(figures(speed, 0.1, 5), 20.0, 20.0) for speed in (12.0, 12.0, 99.0)]
    other = [steady(figures(10.0, 0.1, 5), 20.0, after) for after in (20.0, 16.0, 20.0 * (0.99 - UNSTEADY_ABOVE))]
    found = ratios(mine, other)
    assert (found["rounds_output_tokens_per_s"], found["rounds_left_out"]) == ([1.2, 1.2], 1)
    assert moved(other) == pytest.approx(0.01 + UNSTEADY_ABOVE)
    assert moved([]) == moved([figures(1.0, 0.1, 5)]) == 0
    assert moved([figures(1.0, 0.1, 5) | {"limits_before": {"cpu_share": 0.4}}]) == 0.6  # others had the rest
    again = ratios(mine[1:], other[2:] * 2)
    assert again["output_tokens_per_s"] == "too noisy: the machine's limit fell by more than 25% within 2 of 2 rounds"


def test_only_what_bounds_a_case_leaves_rounds_of_it_out() -> None:
    spec = spec_from_config(load_preset("qwen2_5_0_5b")["shape"], "qwen2_5_0_5b")
    limits = {"read_gb_s": 25.0, "bf16_gflops": 3000.0, "int8_gflops": 6000.0}
    decode, prompt = read_case("1,64,64"), read_case("1,1024,1")
    halved = {name: value / 2 for name, value in limits.items()}

    def run(*changed: str, **more: float) -> dict[str, Any]:
        after = {name: (halved if name in changed else limits)[name] for name in limits}
        return figures(1.0, 0.1, 5) | {"limits_before": limits, "limits_after": after | more}

    def moved_by(case: Case, weight_bytes: float, outcome: dict[str, Any]) -> float:
        return limit_moved(weight_bytes, spec, case, limits, [run(), outcome])

    assert moved_by(decode, 2.0, run("read_gb_s")) > 0.4
    assert moved_by(decode, 2.0, run("bf16_gflops", "int8_gflops")) < 0.1
    assert moved_by(prompt, 2.0, run("bf16_gflops")) > 0.4
    assert moved_by(prompt, 2.0, run("read_gb_s", "int8_gflops")) < 0.1
    assert moved_by(prompt, 1.0, run("int8_gflops")) > 0.4
    assert moved_by(prompt, 2.0, run(cpu_share=0.5)) == 0.5
    assert limit_moved(2.0, spec, decode, {}, [run("int8_gflops")]) == 0.5  # nothing says what the limit is


def test_a_ratio_whose_quartiles_lie_on_both_sides_of_1_is_too_noisy_to_tell() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert ratio([0.5, 1.1, 1.2, 1.3, 9.0], 5) == 1.2
    assert ratio([0.8, 0.9, 1.2, 1.3, 9.0], 5) == "too noisy: 0.90 to 1.30 in the middle half of 5 rounds"
    assert ratio([1.0, 1.0], 2) == 1.0
    assert ratio([2.0], 1) == 2.0


def test_a_verdict_in_words_says_how_steady_the_machine_was() -> None:
    planned = {name: Planned(name, (), 2.0) for name in ("phalanx ranks=1", "peer")}
    engines = {
        "phalanx ranks=1": [steady(figures(speed, 0.2, 5), 20.0, 19.0) for speed in (8.0, 12.0)],
        "peer": [steady(figures(10.0, 0.1, 5), 18.0, 20.0)] * 2,
    }
    verdict = judge({"1,64,11": read_case("1,64,11")}, {"1,64,11": engines}, planned, preset_spec("qwen2_5_0_5b"), {})
    assert lines(verdict) == [
        "1,64,11: the machine's rates fell by up to 10% from round to round",
        "1,64,11: phalanx ranks=1 to peer: too noisy: 0.90 to 1.10 in the middle half of 2 rounds (TTFT: 0.5)",
    ]


def test_what_keeps_an_engine_from_instructions_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("HELLO", "there")
    show = "import json, os; print(json.dumps({'ready_s': 0, 'version': os.environ.get({!r}, 'none')}))"
    for name, expected in (("ONEDNN_MAX_CPU_ISA", "none"), ("HELLO", "there")):
        code = show.replace("{!r}", repr(name))
        process = EngineProcess("fake", [sys.executable, "-c", code], tmp_path / "log")
        process.close()
        assert process.version == expected


def test_a_plot_is_well_formed_with_every_line_named() -> None:
    drawn = {"phalanx <1>": [(1, 10.0), (32, 200.0)], "vllm": [(4, 50.0)], "none": []}
    text = document([chart("Speed & more", "at once", "tokens/s", drawn), chart("Empty", "x", "y", {})])
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Speed & more", "phalanx <1>", "vllm", "32", "200", "Empty"} <= set(words)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == 3


@pytest.mark.parametrize(("value", "top"), [(0, 1), (1, 1), (1.5, 2), (7, 8), (9, 10), (157.4, 200), (0.03, 0.04)])
def test_an_axis_ends_at_a_round_number(value: float, top: float) -> None:
    assert nice_top(value) == pytest.approx(top)


def test_limits_end_with_one_json_line(tiny: Path) -> None:
    result = run_benchmark("limits", f"model={tiny}", "seconds=0.01", "gib=0.01")
    for name in ("read_gb_s", "bf16_gflops", "bf16_matmul_gflops", "context_switch_us"):
        assert result[name] > 0
    assert set(result["tokens_per_s_at_best"]) == {"decode_1_request", "decode_32_requests", "prefill_1024"}


@pytest.mark.slow
def test_latency_ends_with_one_json_line_of_every_number_of_ranks(tiny: Path) -> None:
    lengths = ("prompt_tokens=9", "new_tokens=4", "concurrencies=1,3", "ranks=1,2", "repeats=1", "limits_s=0.01")
    result = run_benchmark("latency", f"model={tiny}", *lengths)
    assert set(result["ranks"]) == {"1", "2"}
    for case in (result["ranks"]["2"]["1"], result["ranks"]["1"]["3"]):
        assert case["ttft_s"] > 0 < case["share_of_limit"]


@pytest.mark.slow
def test_the_prefix_cache_is_measured_with_hits_and_without(tiny: Path) -> None:
    sizes = ("prompt_tokens=300", "requests=3", "cost_prompt_tokens=20", "cost_new_tokens=3", "repeats=2")
    result = run_benchmark("prefix_cache", f"model={tiny}", *sizes)
    assert result["hit_tokens_without_sharing"] == 0
    assert 128 <= result["hit_tokens_of_each_prompt"] <= 270
    assert len(result["runs_ttft_s"]["no_cache"]) == 2


@pytest.mark.slow
def test_a_comparison_ends_with_one_json_line_and_a_plot(tiny: Path, tmp_path: Path) -> None:
    options = ("peers=transformers,vllm", "cases=2,9,4;1,9,1", "ranks=1", "repeats=1", "limits_s=0.01")
    result = run_benchmark("compare", f"model={tiny}", f"peers_folder={tmp_path}", *options)
    assert set(result["cases"]) == {"2,9,4", "1,9,1"}
    to = result["cases"]["1,9,1"]["phalanx_to"]["phalanx ranks=1"]["transformers"]
    assert len(to["rounds_output_tokens_per_s"]) + to["rounds_left_out"] == 1
    assert set(result["engines"]) == {"phalanx ranks=1", "transformers"}
    assert [message.split()[0] for message in result["missing"]] == ["vllm"]
    assert not result["failed"]
