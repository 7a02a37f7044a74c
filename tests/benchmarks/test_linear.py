"""The benchmark of one linear layer: its shapes, formats and figures, and the JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phalanx.benchmarks.limits import layer_weights
from phalanx.benchmarks.parts.linear import (
    FORMATS,
    Layers,
    Options,
    Shape,
    figures,
    fill,
    make_weight,
    shapes_of,
)
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import spec_from_config
from phalanx.kernels import cpu
from phalanx.kernels.weight_formats.packed import Output
from phalanx.launch.cli.presets import load_preset
from phalanx.tests.models import TINY_SHAPE

ROOT = Path(__file__).resolve().parents[2]
SPEC = spec_from_config(load_preset("qwen2_5_0_5b")["shape"], "qwen2_5_0_5b")
pytestmark = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")


def test_the_shapes_are_all_matrices_of_a_layer() -> None:
    shapes = {shape.name: (shape.outputs, shape.inputs) for shape in shapes_of(SPEC)}
    assert shapes == {"qkv": (1152, 896), "output": (896, 896), "gate_up": (9728, 896), "down": (896, 4864)}
    assert sum(outputs * inputs for outputs, inputs in shapes.values()) * SPEC.num_layers == layer_weights(SPEC)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_takes_the_bytes_that_its_name_says(kind: str) -> None:
    bits = {"bf16_12": 12 if cpu.compresses() else 16, "bf16": 16, "int8": 8.5, "w8a8": 8, "int4": 4.25}[kind]
    weight = make_weight(Shape("qkv", 60, 4096), kind, seed=1)
    # Besides 12 bits there are tables, and some groups that stand apart.
    assert weight.nbytes == pytest.approx(64 * 4096 * bits / 8, rel=0.05 if kind == "bf16_12" else 0.01)


@pytest.mark.parametrize("kind", FORMATS)
def test_layers_take_turns_from_memory_and_the_first_stays_in_the_cache(kind: str) -> None:
    add, silu_mul = Output.ADD_FLOAT, Output.SILU_MUL
    shapes = [Shape("qkv", 40, 64), Shape("down", 64, 48, add), Shape("gate_up", 96, 64, silu_mul)]
    weights = [{shape.name: make_weight(shape, kind, seed) for shape in shapes} for seed in range(3)]
    layers = Layers(shapes, weights)
    inputs = layers.inputs(5)
    assert {name: tuple(x.shape) for name, (x, _) in inputs.items()} == {
        "qkv": (5, 64),
        "down": (5, 48),
        "gate_up": (5, 64),
    }
    totals = []
    for _ in range(4):
        inputs["down"][1].zero_()
        assert all(seconds > 0 for seconds in layers.from_memory(inputs).values())
        totals.append(inputs["down"][1].clone())
    assert torch.equal(totals[0], totals[3])
    assert not torch.equal(totals[0], totals[1])
    inputs["down"][1].zero_()
    assert set(layers.cached(inputs)) == {"qkv", "down", "gate_up"}
    torch.testing.assert_close(inputs["down"][1], 2 * totals[0])  # once to fetch it, and once that counts


def test_calls_fill_the_time_and_their_mean_counts() -> None:
    times = iter([{"qkv": 1.0}, {"qkv": 3.0}])
    assert fill(lambda: next(times), 0.0) == {"qkv": 1.0}


def test_a_share_is_of_reading_or_multiplying_and_in_a_cache_of_multiplying_alone() -> None:
    found = figures(0.002, nbytes=10**7, flops=1e9, read_gb_s=10.0, gflops=1000.0)
    assert found == {"ms": 2.0, "gb_s": 5.0, "gflops": 500.0, "share_of_limit": 0.5}
    assert figures(0.004, 10**7, 1e9, None, 1000.0)["share_of_limit"] == 0.25
    assert figures(0.004, 10**7, 8e9, 10.0, 4000.0)["share_of_limit"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(formats="int8,int9"), "did you mean 'int8'"),
        (Options(repeats=0), "repeats=0 must be at least 1"),
        (Options(instructions="portable,sse"), "instructions=sse must be among .*portable"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: Options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.check()


def test_every_format_is_measured_on_every_instruction_set_from_memory_and_cached(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**TINY_SHAPE, "torch_dtype": "bfloat16"}))
    small = (
        f"model={tmp_path}",
        "layers=2",
        "rows=1,3",
        "repeats=1",
        "pass_s=0",
        "slowest_s=60",
        "limits_s=0.01",
        "formats=bf16,int8",
    )
    program = str(ROOT / "benchmarks" / "parts" / "linear.py")
    process = subprocess.run(
        [sys.executable, program, *small, "instructions=portable,emulated_amx"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    cases = [(case["format"], case["rows"], case["instructions"], case["place"]) for case in result["cases"]]
    assert cases == [
        (kind, rows, name, place)
        for kind in ("bf16", "int8")
        for rows in (1, 3)
        for name in ("portable", "emulated_amx")  # which pack int8 in two ways
        for place in ("memory", "cached")
    ]
    for case in result["cases"]:
        layer = case["shapes"].pop("layer")
        assert layer["ms"] == pytest.approx(sum(shape["ms"] for shape in case["shapes"].values()), rel=0.01)
    assert "says little" in process.stdout
