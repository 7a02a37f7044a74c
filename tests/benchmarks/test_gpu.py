"""The GPU's benchmark, without one: its arithmetic, its processes, and all of its sections on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phalanx import LLM, SamplingParams
from phalanx.benchmarks import gpu, limits
from phalanx.benchmarks.lab.gpu_sections import goals, serving
from phalanx.benchmarks.lab.gpu_sections.children import Job, attempt, run_group, serve_job
from phalanx.benchmarks.lab.gpu_sections.device import Mark, best_s
from phalanx.benchmarks.lab.gpu_sections.kernel_times import roofline
from phalanx.benchmarks.lab.gpu_sections.kernel_times.attention import (
    Case,
    Inputs,
    Paged,
    cases_of,
    measure_attention,
    sdpa,
)
from phalanx.benchmarks.lab.gpu_sections.kernel_times.roofline import Ceilings, busy_time, idle_share, mixed_s
from phalanx.benchmarks.lab.gpu_sections.shapes import FULL, TINY, mixed_requests, shape_of
from phalanx.benchmarks.lab.peers.programs.continuous import ContinuousBatching, dummy_model
from phalanx.benchmarks.limits import Work
from phalanx.engine.errors import ConfigError
from phalanx.engine.scheduling.step_plan import StepPlan

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_s=1000.0, read_gb_s=800.0, matmul_tflops=100.0)
QWQ, QWEN3 = (shape_of(family, False) for family in gpu.FAMILIES)


# What could be reached, and what was


def test_a_decode_step_at_the_limit_has_a_share_of_one() -> None:
    work = Work(QWQ.spec)
    read = limits.step_weight_bytes(work) + 8 * 2048 * limits.kv_token_bytes(work)
    figures = roofline.decode_figures(work, 8, 2048, read / 1e12, CEILINGS)
    assert (figures["share_of_roofline"], figures["share_of_copy_bandwidth"]) == (1.0, 1.0)
    assert figures["share_of_read_bandwidth"] == 1.25
    assert figures["gb_s"] == 1000.0
    assert figures["tokens_per_s"] == pytest.approx(8 / (read / 1e12), abs=0.1)
    slower = roofline.decode_figures(work, 8, 2048, 2 * read / 1e12, CEILINGS)
    assert slower["share_of_roofline"] == 0.5


def test_a_large_batch_is_limited_by_multiplying() -> None:
    work = Work(QWQ.spec)
    seconds = 10_000 * limits.token_flops(work.spec, 1.0) / 1e14
    figures = roofline.decode_figures(work, 10_000, 1.0, seconds, CEILINGS)
    assert figures["share_of_roofline"] == 1.0
    assert figures["tflops"] == 100.0
    assert figures["share_of_copy_bandwidth"] < 1


def test_a_prompt_counts_the_products_and_what_its_tokens_attend_to() -> None:
    work, prompt = Work(QWQ.spec), 8192
    attention = 4 * 64 * 40 * 128 * prompt * (prompt + 1) / 2
    flops = 2 * prompt * limits.layer_weights(work.spec) + attention + 2 * limits.head_weights(work.spec)
    figures = roofline.prefill_figures(work, prompt, flops / 0.5e14, CEILINGS)
    assert (figures["share_of_roofline"], figures["share_of_matmul_rate"]) == (0.5, 0.5)
    assert figures["tflops"] == 50.0
    assert figures["ttft_ms"] == pytest.approx(flops / 0.5e11, abs=0.001)


@given(st.integers(1, 40), st.integers(1, 500), st.integers(1, 30))
def test_equal_requests_take_as_long_as_a_case_of_them(requests: int, prompt: int, new: int) -> None:
    work, rates = Work(QWEN3.spec), (1e12, 1e14)
    expected = requests * new / limits.case_limit_tokens_per_s(work, requests, prompt, new, *rates)
    assert mixed_s(work, [(prompt, new)] * requests, *rates) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=1, max_size=8), st.integers(0, 7))
def test_a_longer_request_never_takes_less_time(lengths: list[tuple[int, int]], index: int) -> None:
    work, rates = Work(QWEN3.spec), (1e12, 1e14)
    prompt, new = lengths[index % len(lengths)]
    longer = list(lengths)
    longer[index % len(lengths)] = prompt + 1, new + 1
    assert mixed_s(work, longer, *rates) > mixed_s(work, lengths, *rates)


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 3), st.integers(1, 4))
def test_attention_counts_each_query_and_key_that_it_sees(queries: int, before: int, heads: int, dim: int) -> None:
    keys = queries + before
    seen = sum(before + i + 1 for i in range(queries))
    assert roofline.attention_flops(queries, keys, heads, dim) == 4 * heads * dim * seen
    assert roofline.attention_bytes(keys, 3, heads, dim, 2) == 2 * 3 * keys * heads * dim * 2


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_a_device_is_busy_wherever_anything_runs(spans: list[tuple[int, int]]) -> None:
    intervals = [(start, start + length) for start, length in spans]
    covered = {tick for start, end in intervals for tick in range(start, end)}
    assert busy_time(intervals) == len(covered)


def test_gaps_are_idle_and_overlaps_are_none() -> None:
    assert idle_share([0.1, -0.3, 0.2], 3.0) == 0.1
    assert idle_share([], 0.0) == 0.0


def test_kernels_are_listed_by_their_time_and_gaps_between_them_are_idle() -> None:
    table = serving.kernel_table([("a", 0, 10), ("b", 12, 14), ("a", 14, 30), ("b", 38, 40)], steps=2)
    assert table["kernels"][0] == {"name": "a", "us_per_step": 13.0, "calls_per_step": 1.0}
    assert [kernel["name"] for kernel in table["kernels"]] == ["a", "b"]
    assert table["idle_share"] == 0.25
    with pytest.raises(RuntimeError, match="no kernels"):
        serving.kernel_table([], steps=2)


# Models and loads


def test_the_mixed_load_is_nano_vllms_own() -> None:
    requests = mixed_requests(FULL, QWEN3.spec.vocab_size)
    assert len(requests) == 256
    assert sum(request.new_tokens for request in requests) == 133_966  # as its README says
    assert {100 <= len(request.prompt) <= 1024 >= request.new_tokens >= 100 for request in requests} == {True}
    assert max(token for request in mixed_requests(TINY, 300) for token in request.prompt) < 300


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_a_tiny_model_has_its_familys_architecture_and_groups(family: str, tmp_path: Path) -> None:
    whole, tiny = shape_of(family, False).spec, shape_of(family, True).spec
    assert tiny.architecture == whole.architecture
    assert (tiny.tied_embeddings, tiny.qk_norm) == (whole.tied_embeddings, whole.qk_norm)
    assert tiny.num_query_heads // tiny.num_kv_heads == whole.num_query_heads // whole.num_kv_heads
    folder = shape_of(family, True).make_folder(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_longest_prompts_are_given_up_first_where_memory_is_short() -> None:
    assert serving.lengths_to_try(QWQ) == [32769, 8193, 2288]
    config = serving.engine_config(QWQ, Path("folder"), "cuda", False, 8193)
    assert (config.max_num_seqs, config.max_model_len, config.graphs, config.attention) == (256, 8193, "auto", "auto")


def test_a_batch_that_does_not_fit_says_so_and_is_measured_at_a_shorter_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []

    def decode(served: Any, rows: int, context: int) -> dict[str, Any]:
        measured.append((rows, context))
        return {"step_ms": 1.0}

    monkeypatch.setattr(serving, "_decode", decode)
    capacity = SimpleNamespace(num_blocks=4001, block_size=64, max_model_len=32769)
    worker = SimpleNamespace(capacity=capacity, cache=SimpleNamespace(keys=[], values=[]))
    engine: Any = SimpleNamespace(worker=worker, group=SimpleNamespace(device=CPU))
    llm: Any = SimpleNamespace(
        status=lambda: SimpleNamespace(total_blocks=4001, block_size=64, peak_memory=[], report=[])
    )
    served = serving.Served(QWQ, llm, engine, CEILINGS, 0.0)
    results = serving.measure_decode(served)
    assert measured == [(1, 2048), (8, 2048), (64, 2048), (256, 4000 // 256 * 64 - 240)]
    assert results["256"]["skipped"].startswith("the KV cache of 256064 tokens holds 111 sequences of 2048 and 240")
    assert results["256"]["instead"] == results["64"] == {"step_ms": 1.0}
    capacity.num_blocks = 257
    assert serving.measure_decode(served)["256"]["instead"] is None


def test_goals_are_told_from_what_was_measured_and_what_was_not_is_none() -> None:
    decode = {
        "1": {"share_of_copy_bandwidth": 0.85, "host_gap_share": 0.02},
        "256": {"skipped": "too large", "instead": {"share_of_roofline": 0.5, "host_gap_share": 0.05}},
        "measured_in_s": 3.0,
    }
    triton, cases = {"us": 1.0}, {}
    for name, speed in (("decode_1x2048", 0.95), ("decode_8x2048", 0.92), ("prefill_8_of_8", 0.1)):
        cases[name] = {"triton": triton, "flash_attn_3": {"speed_of_own_to_this": speed}, "flashinfer": {"skipped": ""}}
    found = goals.goals(
        {
            "shapes": {"qwq_32b": {"decode": decode, "prefill": {"error": "no"}}},
            "attention": {"cases": cases},
            "peer": {"phalanx_to_peer": 3.5},
            "two_ranks": {"equal": False},
        }
    )
    assert {name: (goal["found"], goal["reached"]) for name, goal in found.items()} == {
        "qwq_32b_decode_1_of_copy_bandwidth": (0.85, True),
        "qwq_32b_prefill_8192_of_matmul_rate": (None, None),
        "qwq_32b_decode_256_of_roofline": (0.5, False),
        "decode_attention_to_flash_attn_3": (0.92, True),
        "decode_attention_to_flashinfer": (None, None),
        "qwq_32b_host_gap": (0.05, False),
        "qwen3_0_6b_host_gap": (None, None),
        "throughput_to_transformers": (3.5, True),
        "equal_tokens_of_two_ranks": (False, False),
    }
    assert {goal["reached"] for goal in goals.goals({}).values()} == {None}


# Sections and processes


def test_sections_are_run_in_the_order_of_what_matters() -> None:
    everything = gpu.Options().groups()
    assert everything == list(gpu.GROUPS)
    some = gpu.Options(sections="decode,ready", shapes="qwen3_0_6b").groups()
    assert [(group.kind, group.family, list(group.sections)) for group in some] == [
        ("ceilings", "qwq_32b", ["ceilings"]),
        ("serving", "qwen3_0_6b", ["engine", "decode"]),
        ("ready", "qwen3_0_6b", ["all", "lazy"]),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sections": "decode,pcie"}, "sections=decode,pcie: 'pcie' is not one of decode, prefill"),
        ({"shapes": "qwq"}, "shapes=qwq: 'qwq' is not one of qwq_32b, qwen3_0_6b"),
        ({"device": "tpu"}, "device=tpu must be one of cuda, cpu"),
        ({"shape": "large"}, "shape=large must be one of full, tiny"),
        ({"device": "cpu"}, "device=cpu takes hours for shape=full; set shape=tiny"),
        ({"interpret": True}, "interpret=true is for device=cpu"),
    ],
)
def test_a_wrong_option_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gpu.Options(**changes).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_runs_without_one() -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU; device=cpu shape=tiny runs the same code"):
        gpu.measure(gpu.Options())


def _job(sections: list[str], seconds: float, kind: str = "fake") -> Job:
    return Job(kind, "", dict.fromkeys(sections, 0.0), time.monotonic() + seconds, "cpu", True, False, {})


def _outcome(program: str, job: Job) -> dict[str, Any]:
    return dict(run_group([sys.executable, "-c", program], job, os.environ))


def test_a_process_that_dies_takes_only_the_sections_that_it_still_owes() -> None:
    program = """
import json, os, sys
print(json.dumps({"section": "first", "result": {"x": 1}}), flush=True)
print("an illegal memory access", file=sys.stderr, flush=True)
os.abort()
"""
    outcome = _outcome(program, _job(["first", "second"], 60))
    assert outcome["first"] == {"x": 1}
    assert "exit code -6" in outcome["second"]["error"]
    assert "an illegal memory access" in outcome["second"]["error"]


def test_a_process_that_hangs_is_killed_with_those_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(600)
"""

    class OnceItHasStarted(threading.Timer):
        def run(self) -> None:
            while not pid.exists() or not pid.read_text():
                self.finished.wait(0.01)
            super().run()

    monkeypatch.setattr(threading, "Timer", OnceItHasStarted)
    outcome = _outcome(program, _job(["first"], -60.0))
    assert "did not end in time" in outcome["first"]["error"]
    child = Path(f"/proc/{pid.read_text()}/stat")
    until = time.monotonic() + 30
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "the process it started lives on"
        time.sleep(0.01)


def test_a_section_that_fails_is_reported_and_one_without_time_is_skipped() -> None:
    def fail() -> None:
        raise ValueError("a card fell out")

    failed = attempt(fail, 0.0, time.monotonic() + 10)
    assert failed["error"] == "ValueError: a card fell out"
    assert "in fail" in failed["trace"]
    skipped = attempt(fail, 20.0, time.monotonic() + 10.4)
    assert skipped == {"skipped": "time budget: 10 s are left, it may take 20 s; raise limit_s"}
    assert attempt(lambda: {"x": 1}, 0.0, time.monotonic() + 10)["x"] == 1


def test_a_group_that_cannot_be_set_up_fails_its_sections(capfd: pytest.CaptureFixture[str]) -> None:
    opened = []

    @contextmanager
    def room(job: Job) -> Iterator[Any]:
        opened.append(job)
        if job.kind == "broken":
            raise ConfigError("too little memory")
        yield {"a": lambda: {"x": 1}, "b": lambda: 1 / 0}

    saved = os.dup(1)
    try:
        for kind in ("broken", "whole"):
            os.dup2(saved, 1)
            serve_job(json.dumps(asdict(_job(["a", "b"], 10, kind))), room)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [answer["section"] for answer in answers] == ["a", "b", "a", "b"]
    assert [answer["result"].get("error", "")[:25] for answer in answers] == [
        "ConfigError: too little m",
        "ConfigError: too little m",
        "",
        "ZeroDivisionError: divisi",
    ]
    assert [job.kind for job in opened] == ["broken", "whole"]
    assert opened[0].sections == {"a": 0.0, "b": 0.0}


# What measures


def test_work_is_timed_by_its_shortest_round() -> None:
    calls = []
    works = [lambda: calls.append("a"), lambda: (calls.append("b"), time.sleep(0.002))]
    seconds = best_s(works, CPU, repeats=3, graph=True)
    assert calls == ["a", "b"] * 4
    assert 0.001 <= seconds < 1
    first, second = Mark(CPU), Mark(CPU)
    assert second.seconds_since(first) >= 0


@contextmanager
def _served(tmp_path: Path) -> Iterator[serving.Served]:
    shape = shape_of("qwen3_0_6b", True)
    with serving.serve(shape, shape.make_folder(tmp_path), "cpu", False, CEILINGS) as served:
        yield served


def test_decode_steps_are_timed_without_computing_prompts_and_the_engine_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, greedy = [[5, 6, 7], [8] * 20], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    with _served(tmp_path) as served:
        computed: list[StepPlan] = []
        worker: Any = served.engine.worker
        launch = type(worker).launch
        monkeypatch.setattr(type(worker), "launch", lambda self, plan: (computed.append(plan), launch(self, plan))[1])
        before = [output.outputs[0].token_ids for output in served.llm.generate(prompts, greedy)]
        computed.clear()
        results = serving.measure_decode(served)
        assert {len(plan.slots) for plan in computed} == set(TINY.batches)
        assert all(plan.only_decodes for plan in computed)
        # The first of each batch reads exactly the context that was asked for.
        firsts = {len(plan.slots): set(plan.positions) for plan in reversed(computed)}
        assert firsts == {rows: {TINY.context - 1} for rows in TINY.batches}
        for rows, result in results.items():
            assert result["tokens_per_s"] == pytest.approx(int(rows) * 1e3 / result["step_ms"], rel=0.01)
            assert TINY.context <= result["context"] <= TINY.context + TINY.slack
            assert 0 <= result["host_gap_share"] < 1
        after = [output.outputs[0].token_ids for output in served.llm.generate(prompts, greedy)]
        status = served.llm.status()
    assert after == before
    assert (status.running, status.free_blocks) == (0, status.total_blocks)


def test_prompts_and_the_mixed_load_are_timed_by_the_client(tmp_path: Path) -> None:
    with _served(tmp_path) as served:
        prefill, load = serving.measure_prefill(served), serving.measure_throughput(served)
        served.max_model_len = 20
        assert "skipped" in serving.measure_prefill(served)["20"]
    assert set(prefill) == {str(prompt) for prompt in TINY.prompts}
    assert all(len(result["runs_ms"]) == TINY.repeats + 1 for result in prefill.values())
    assert load["output_tokens"] == sum(r.new_tokens for r in mixed_requests(TINY, 300))
    assert load["requests"] == TINY.requests
    assert load["roofline_s"] <= load["seconds"]


def test_every_attention_kernel_computes_what_sdpa_does() -> None:
    shape = shape_of("qwq_32b", True)
    found = measure_attention(shape, CPU, CEILINGS)
    assert set(found["cases"]) == {case.name for case in cases_of(shape)}
    for case in found["cases"].values():
        assert "error" not in case
        for name, result in case.items():
            assert "skipped" in result or result["us"] > 0, name
            assert result.get("largest_error", 0.0) <= 0.05, name


def test_keys_stand_in_the_blocks_that_the_table_names() -> None:
    inputs = Inputs.random(Case(3, 21, 1), QWEN3.spec, CPU)
    paged = Paged(inputs, 8)
    pool = paged.pool(inputs.k[0])
    pool.flatten(0, 1)[paged.slot_mapping] = inputs.k[0].flatten(0, 1)
    for row in range(3):
        assert torch.equal(pool[paged.table[row]].flatten(0, 1)[:21], inputs.k[0][row])
    assert sdpa(inputs)[0]().shape == inputs.q.shape


# The peer


def test_the_peer_has_phalanxs_dummy_weights_and_batches_continuously(tmp_path: Path) -> None:
    shape = shape_of("qwen3_0_6b", True)
    folder = shape.make_folder(tmp_path)
    requests = [([5, 6, 7], 7), ([9] * 30, 3), ([11, 12], 12)]
    peer = ContinuousBatching(dummy_model(folder, CPU, torch.float32), 30, 12, len(requests))
    with closing(peer):
        seconds, theirs = peer.run(requests)
        again = peer.run(requests[:1])[1]
    assert seconds > 0
    assert again == theirs[:1]
    sampling = [SamplingParams(max_tokens=new, temperature=0, ignore_eos=True) for _, new in requests]
    config: dict[str, Any] = {"dtype": "float32", "load_format": "dummy", "kv_memory": 2**22, "max_model_len": 64}
    with LLM(str(folder), **config) as llm:
        ours = llm.generate([prompt for prompt, _ in requests], sampling)
    assert [output.outputs[0].token_ids for output in ours] == theirs


# All of it


def _run(*arguments: str) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "device=cpu", "shape=tiny", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def _errors(result: Any) -> list[str]:
    if not isinstance(result, dict):
        return []
    own = [str(result["error"])] if "error" in result else []
    return own + [error for value in result.values() for error in _errors(value)]


def test_where_no_time_is_left_every_section_says_so() -> None:
    result = _run("limit_s=0")
    assert result["ceilings"]["copy_gb_s"] > 0
    skipped = [result[name] for name in ("attention", "peer", "two_ranks")]
    skipped += [section for name in ("loading", "nccl_one") for section in result[name].values()]
    skipped += [section for shape in result["shapes"].values() for section in shape.values()]
    skipped += [
        section for name in ("ready", "kernels") for shape in result[name].values() for section in shape.values()
    ]
    assert len(skipped) == 3 + 5 + 7 + 2 * 5 + 2 * 2 + 2 * 4
    assert {entry["skipped"].partition(":")[0] for entry in skipped} == {"time budget"}


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_and_the_file_has_what_was_printed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    result = _run(f"out={out}")
    assert json.loads(out.read_text()) == result
    assert _errors(result) == []
    assert set(result["shapes"]) == {"qwq_32b_tiny", "qwen3_0_6b_tiny"}
    for shape in result["shapes"].values():
        assert set(shape) == {"engine", "decode", "prefill", "throughput", "profile"}
        assert set(shape["decode"]) - {"measured_in_s"} == {str(rows) for rows in TINY.batches}
        assert all(0 < shape["decode"][str(rows)]["share_of_roofline"] < 2 for rows in TINY.batches)
        assert shape["throughput"]["output_tokens"] > 0
        assert "device=cpu has none" in shape["profile"]["skipped"]
    assert result["two_ranks"]["equal"] is True
    assert result["two_ranks"]["reports"][1][0].startswith("2 rank(s) on cpu")
    assert result["peer"]["phalanx_to_peer"] > 0
    for starts in result["ready"].values():
        assert 0 < starts["all"]["ready_s"] <= starts["all"]["first_token_s"]
    for tables in result["kernels"].values():
        assert tables["eager"]["decode_1x24"]["busy_us"] > 0
        assert tables["prompt"]["prompt_8"]["busy_us"] > 0
        assert tables["host"]["prompt_8"]["launch_us"] > 0
    assert result["loading"]["warm"]["tensors_checked"] > 0
    assert result["nccl_one"]["teardown"]["gone"] is True
    assert result["settings"]["shape"] == "tiny"
    assert result["ceilings"]["machine"]["device"] == "cpu"


@pytest.mark.slow
def test_the_gpus_path_runs_in_tritons_interpreter() -> None:
    result = _run("interpret=true", "sections=decode,attention", "shapes=qwen3_0_6b")
    assert _errors(result) == []
    [shape] = result["shapes"].values()
    assert "graphs=eager; steps overlap: yes" in shape["engine"]["report"]
    assert "attention=triton" in shape["engine"]["report"][0]
    assert all(shape["decode"][str(rows)]["step_ms"] > 0 for rows in TINY.batches)
    assert all(case["triton"]["largest_error"] <= 0.05 for case in result["attention"]["cases"].values())
