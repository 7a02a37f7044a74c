"""The GPU benchmark's tables of kernels, on a CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx.benchmarks import gpu, limits
from phalanx.benchmarks.lab.gpu_sections.kernel_times import kernel_roles as parts
from phalanx.benchmarks.lab.gpu_sections.kernel_times import kernels
from phalanx.benchmarks.lab.gpu_sections.kernel_times.kernel_roles import (
    Case,
    Least,
    describe,
    least_of,
    roles,
    shorten,
    tabulate,
)
from phalanx.benchmarks.lab.gpu_sections.kernel_times.roofline import Ceilings
from phalanx.benchmarks.lab.gpu_sections.shapes import TINY, shape_of
from phalanx.benchmarks.limits import Work
from phalanx.engine.execution.slot_table import SlotTable
from phalanx.kernels import cpu, cuda
from phalanx.parallel import layers as parallel_layers

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_s=1000.0, read_gb_s=800.0, matmul_tflops=100.0)
QWQ, QWEN3 = (shape_of(family, False) for family in gpu.FAMILIES)


# What kernels are for

LAYER = {
    "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNT": parts.QKV,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": parts.QKV,
    "_rotate_and_store": parts.ROTATE,
    "decode_kernel": parts.ATTENTION,
    "merge_kernel": parts.ATTENTION,
    "nvjet_sm90_tst_8x64_64x16_2x1_v_bz_TNN": parts.OUTPUT,
    "_add_rms_norm": parts.NORM,
    "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT": parts.GATE_UP,
    "_silu_mul": parts.ACTIVATION,
    "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK2_TNT": parts.DOWN,
}
BEFORE = {
    "Memcpy HtoD (Pinned -> Device)": parts.AROUND,
    "indexSelectSmallIndex": parts.AROUND,
    "_rms_norm": parts.NORM,
}
AFTER = {
    "nvjet_sm90_tss_384x8_64x4_2x1_v_bz_TNT": parts.LOGITS,
    "_chunk_maxima": parts.SAMPLING,
    "_row_maxima": parts.SAMPLING,
    "Memcpy DtoH (Device -> Pinned)": parts.AROUND,
}
STEP = [*BEFORE.items(), *(2 * [*LAYER.items(), ("_add_rms_norm", parts.NORM)]), *AFTER.items()]
"""As an H200 runs a step of two layers."""


def test_a_kernel_is_for_what_its_place_between_phalanxs_own_kernels_says() -> None:
    names, expected = zip(*(3 * STEP), strict=True)
    assert roles(names) == list(expected)


def test_kernels_of_a_prompt_are_told_apart_by_name_where_their_place_does_not() -> None:
    flash = "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloop"
    names = ["_rotate_and_store", flash, "void cutlass::Kernel2<cutlass_80_gemm>", "index", "_add_rms_norm"]
    assert roles(names) == [parts.ROTATE, parts.ATTENTION, parts.OUTPUT, parts.AROUND, parts.NORM]
    assert roles(["unknown", "gemm"]) == [parts.AROUND] * 2


def test_long_names_are_cut_to_what_tells_them_apart() -> None:
    add = (
        "void at::native::vectorized_elementwise_kernel<2, at::native::CUDAFunctorOnSelf_add<long>, std::array<char*>>"
    )
    assert shorten(add) == "vectorized_elementwise_kernel:CUDAFunctorOnSelf_add"
    assert shorten("_add_rms_norm") == "_add_rms_norm"
    assert shorten("Memcpy HtoD (Pinned -> Device)") == "Memcpy HtoD"
    assert len(shorten("x" * 200)) == parts.NAME_LENGTH


def test_the_engines_own_steps_have_kernels_in_the_order_that_roles_are_read_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    names: list[str] = []
    run, multiply = InterpretedFunction.run, parallel_layers.linear

    def started(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    def multiplied(*args: Any) -> torch.Tensor:
        names.append("nvjet")
        return multiply(*args)

    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(InterpretedFunction, "run", started)
    monkeypatch.setattr(parallel_layers, "linear", multiplied)
    shape = shape_of("qwen3_0_6b", True)
    cuda.interpret(True)
    try:
        with kernels.open_bench(shape, shape.make_folder(tmp_path), CPU, True, CEILINGS) as bench:
            for case in (Case(2, 24), Case(1, 0, 8)):
                names.clear()
                bench._run(kernels.plans_of(case, 2, 16, 300), 2)
                found = Counter(roles(names))
                layers = shape.spec.num_layers
                products = dict.fromkeys((parts.QKV, parts.OUTPUT, parts.GATE_UP, parts.DOWN), 2 * layers)
                assert {role: found[role] for role in products} == products
                assert found[parts.ROTATE] == found[parts.ACTIVATION] == 2 * layers
                assert found[parts.NORM] == 2 * (2 * layers + 1)
                assert found[parts.ATTENTION] >= 2 * layers
                assert found[parts.LOGITS] == 2
                assert found[parts.SAMPLING] >= 2
                assert found[parts.AROUND] == 0
    finally:
        cuda.interpret(False)


# What they must do at least


@pytest.mark.parametrize("shape", [QWQ, QWEN3])
def test_the_parts_of_a_decode_step_are_the_whole(shape: Any) -> None:
    work, rows, context = Work(shape.spec), 8, 2048
    found = least_of(work, Case(rows, context))
    vectors = 2 * limits.vector_weights(work.spec)
    whole = limits.step_weight_bytes(work) - vectors + rows * context * limits.kv_token_bytes(work)
    activations = least_of(Work(shape.spec, 0.0, 0.0), Case(rows, context))
    assert sum(least.bytes - activations[role].bytes for role, least in found.items()) == pytest.approx(whole)
    flops = rows * limits.token_flops(work.spec, context)
    assert sum(least.flops for least in found.values()) == pytest.approx(flops)


def test_a_prompt_multiplies_what_its_tokens_take_and_its_last_layers_mlp_is_of_one_token() -> None:
    work, prompt = Work(QWEN3.spec), 1024
    found = least_of(work, Case(1, 0, prompt))
    mlp = 6.0 * QWEN3.spec.hidden_size * QWEN3.spec.intermediate_size
    whole = prompt * limits.token_flops(work.spec, (prompt + 1) / 2, head=False) - (prompt - 1) * mlp
    whole += 2.0 * limits.head_weights(work.spec)
    assert sum(least.flops for least in found.values()) == pytest.approx(whole)
    assert Case(1, 0, prompt).name == "prompt_1024"


def test_a_part_at_the_limit_takes_the_longer_of_moving_and_multiplying() -> None:
    assert Least(1e9).seconds(CEILINGS) == 1e-3
    assert Least(1e9, 1e12).seconds(CEILINGS) == 1e-2


# Tables


def test_a_table_has_times_rates_and_the_gaps_between_kernels() -> None:
    events = [("_rms_norm", 0.0, 4.0), ("nvjet_a", 5.0, 15.0), ("_rotate_and_store", 16.0, 20.0)]
    events += [(name, 100.0 + start, 100.0 + end) for name, start, end in events]
    table = tabulate(events[::-1], 2, 25e-6, {parts.QKV: Least(5e6, 1e8)}, CEILINGS)
    assert (table["busy_us"], table["step_us"], table["kernels_a_step"]) == (18.0, 25.0, 3.0)
    assert (table["idle_share"], table["traced_idle_share"]) == (0.28, 0.7)
    assert next(iter(table["roles"])) == parts.QKV
    assert table["roles"][parts.QKV] == {
        "us": 10.0,
        "share": 0.4,
        "mb": 5.0,
        "gb_s": 500.0,
        "share_of_copy_rate": 0.5,
        "tflops": 10.0,
        "share_of_matmul_rate": 0.1,
        "least_us": 5.0,
        "kernels": [{"name": "nvjet_a", "calls": 1.0, "us": 10.0}],
        "names": 1,
    }
    assert "mb" not in table["roles"][parts.NORM]
    lines = list(describe("decode_1x8", table))
    assert "step 25.0 us" in lines[0]
    assert len(lines) == 4
    assert list(describe("decode_1x8", {"error": "no"})) == ["decode_1x8: no"]
    with pytest.raises(RuntimeError, match="no kernels"):
        tabulate([], 2, 1.0, {}, CEILINGS)


def test_decode_plans_are_those_of_overlapping_steps() -> None:
    case, steps = Case(3, 20), 5
    slots = SlotTable(3, 40, 4, CPU)
    seen = set()
    for i, plan in enumerate(kernels.plans_of(case, steps, 4, 300)):
        slots.apply(plan)
        batch = slots.batch(plan)
        assert plan.only_decodes
        assert batch.positions.tolist() == [19 + i] * 3
        # The token of the step before is not told yet: it is on the device.
        assert slots._known[:3].tolist() == [20 + max(0, i - 1)] * 3
        assert len(set(batch.attention.slot_mapping.tolist())) == 3
        seen.update(batch.attention.slot_mapping.tolist())
    assert i == steps - 1
    assert len(seen) == 3 * steps


def test_a_case_that_fails_leaves_the_others_their_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = shape_of("qwen3_0_6b", True)
    with kernels.open_bench(shape, shape.make_folder(tmp_path), CPU, False, CEILINGS) as bench:
        table = bench._table

        def fail(case: Case) -> dict[str, Any]:
            if case.rows == 2:
                raise RuntimeError("out of memory")
            return table(case)

        monkeypatch.setattr(bench, "_table", fail)
        found = bench.eager()
        prompt = bench.prompt()
        host = bench.host()
        assert "no CUDA graphs" in bench.graphs()["skipped"]
    assert list(found) == [f"decode_{rows}x{TINY.context}" for rows in TINY.batches]
    assert found["decode_2x24"]["error"] == "RuntimeError: out of memory"
    assert found["decode_5x24"]["step_us"] > 0
    assert found["decode_5x24"]["kernels_a_step"] >= 1
    assert prompt["prompt_8"]["busy_us"] > 0
    assert list(host) == ["decode_1x24", "prompt_8"]
    for launches in host.values():
        assert launches["launch_us"] > 0
        own = [function["us"] for function in launches["functions"]]
        assert own == sorted(own, reverse=True)
        assert any("worker.py" in function["function"] for function in launches["functions"])
    assert "launched in" in next(describe("prompt_8", host["prompt_8"]))
