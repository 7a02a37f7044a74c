"""One packed linear layer by itself: each weight format, number of rows, shape and instruction set of this machine.

    python benchmarks/parts/linear.py [random=qwen2_5_0_5b] [formats=...] [rows=1,2,4,...] [instructions=...]

The weights are those of all layers of a model, multiplied one after another as in a step, so that they come from memory
(`memory`); or those of one layer, each again and again (`cached`). Instruction sets and places take turns, and the
milliseconds are medians over the repeats. GB/s counts the weight's bytes, GFLOP/s two a weight and row. A share is of
this machine's limit, measured in the same run: from memory the longer of reading and multiplying, cached multiplying
alone. What takes longer than slowest_s for one layer is left out. The last line is JSON.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phalanx.benchmarks.lab.common import run, significant
from phalanx.benchmarks.lab.rates import Limits, measure_limits
from phalanx.benchmarks.latency import whole_numbers
from phalanx.benchmarks.limits import share
from phalanx.engine.config import unknown_name
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.spec import ModelSpec, read_config, spec_from_config
from phalanx.kernels.cpu import PANEL, native
from phalanx.kernels.weight_formats import get_weight_format
from phalanx.kernels.weight_formats.packed import Output, PackedWeight
from phalanx.launch.get_model import load_shape

INSTRUCTION_SETS = ("avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
EMULATED = "emulated_amx"  # measured only where it is named: it is slow, and tells nothing of the machine
FORMATS = {"bf16_12": "none", "bf16": "none", "int8": "int8", "w8a8": "w8a8", "int4": "int4"}
"""A name for each, and the `quantization` that makes it. bf16_12 are bf16 numbers kept in 12 bits."""
EXPONENTS = 60
"""Different exponents, too many for bf16 numbers to fit into 12 bits."""
PLACES = ("memory", "cached")
WARN_BELOW = 5


@dataclass
class Options:
    """What to measure."""

    model: str | None = None  # a folder with a config.json, for its shapes; without one those of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    formats: str = ",".join(FORMATS)
    rows: str = "1,2,4,8,16,32,64,128,1024"
    instructions: str = ""  # names of instruction sets; all that this machine has
    layers: int = 0  # of weights that take turns; 0: as many as the model has
    repeats: int = 5
    pass_s: float = 0.1  # of a repeat: of few rows it goes through many layers, of many rows through one at least
    slowest_s: float = 1.0  # for the linear layers of one layer
    limits_s: float = 0.5  # of each measurement of the machine's limits
    out: str | None = None  # a file for the JSON line

    def check(self) -> None:
        """Raises ConfigError."""
        for name, least in (("repeats", 1), ("layers", 0), ("pass_s", 0), ("slowest_s", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in self.formats.split(","):
            if name not in FORMATS:
                raise ConfigError(unknown_name("format", name, list(FORMATS)))
        for name in self.instruction_sets():
            if name not in (*INSTRUCTION_SETS, EMULATED) or not native.can_run(name):
                raise ConfigError(f"instructions={name} must be among {_here()}, which this machine can run")

    def instruction_sets(self) -> list[str]:
        """Their names."""
        return self.instructions.split(",") if self.instructions else _here()


@dataclass(frozen=True)
class Shape:
    """A linear layer of a decoder layer, and what becomes of its output."""

    name: str
    outputs: int
    inputs: int
    output: Output = Output.STORE

    def make_out(self, rows: int) -> torch.Tensor:
        """What it writes to, or adds to."""
        if self.output == Output.ADD_FLOAT:
            return torch.zeros(rows, self.outputs)
        columns = self.outputs // 2 if self.output == Output.SILU_MUL else self.outputs
        return torch.zeros(rows, columns, dtype=torch.bfloat16)


def shapes_of(spec: ModelSpec) -> list[Shape]:
    """The four of a layer, as a step uses them: what feeds the residual is added to it."""
    queries, keys = spec.num_query_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    return [
        Shape("qkv", queries + 2 * keys, spec.hidden_size),
        Shape("output", spec.hidden_size, queries, Output.ADD_FLOAT),
        Shape("gate_up", 2 * spec.intermediate_size, spec.hidden_size, Output.SILU_MUL),
        Shape("down", spec.hidden_size, spec.intermediate_size, Output.ADD_FLOAT),
    ]


def make_weight(shape: Shape, kind: str, seed: int) -> PackedWeight:
    """Random numbers in a format. Those of `bf16` have too many exponents for 12 bits."""
    draw = torch.Generator().manual_seed(seed)
    padded = -(-shape.outputs // PANEL) * PANEL
    weight = torch.randn(padded, shape.inputs, generator=draw) / shape.inputs**0.5
    if kind == "bf16":
        weight *= torch.exp2(-torch.randint(0, EXPONENTS, weight.shape, generator=draw).float())
    return get_weight_format(FORMATS[kind]).pack(weight.to(torch.bfloat16), shape.outputs)


@dataclass
class Layers:
    """The packed weights of several layers, by shape, and what they are multiplied with."""

    shapes: Sequence[Shape]
    weights: Sequence[Mapping[str, PackedWeight]]

    def __post_init__(self) -> None:
        self._next = itertools.cycle(self.weights)

    def inputs(self, rows: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """x and the output of each shape. No output is made while time is taken: its memory would cost some too."""
        draw = torch.Generator().manual_seed(rows)
        return {
            shape.name: (
                torch.randn(rows, shape.inputs, generator=draw).to(torch.bfloat16),
                shape.make_out(rows),
            )
            for shape in self.shapes
        }

    def from_memory(self, inputs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """Seconds of each shape of the layer whose weights were used longest ago."""
        weights = next(self._next)
        return {shape.name: _seconds(shape, weights[shape.name], *inputs[shape.name]) for shape in self.shapes}

    def cached(self, inputs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
        """The same of the first layer's weights, each of which was used just before."""
        found = {}
        for shape in self.shapes:
            each = shape, self.weights[0][shape.name], *inputs[shape.name]
            _seconds(*each)
            found[shape.name] = _seconds(*each)
        return found


def _seconds(shape: Shape, weight: PackedWeight, x: torch.Tensor, out: torch.Tensor) -> float:
    started = time.perf_counter()
    weight.multiply(x, None, out, shape.output)
    return time.perf_counter() - started


def _here() -> list[str]:
    return [name for name in INSTRUCTION_SETS if native.can_run(name)]


def fill(work: Callable[[], dict[str, float]], seconds: float) -> dict[str, float]:
    """Means by shape over as many calls as fit into some seconds, one at least."""
    until = time.perf_counter() + seconds
    calls = [work()]
    while time.perf_counter() < until:
        calls.append(work())
    return {name: statistics.fmean(call[name] for call in calls) for name in calls[0]}


def packed_layers(kind: str, spec: ModelSpec, options: Options) -> dict[str, Layers]:
    """Weights of a format by instruction set. Sets that pack it alike share them: all do, but for int8."""
    shapes = shapes_of(spec)
    shared: dict[int, Layers] = {}
    found = {}
    for name in options.instruction_sets():
        native.use_kernels(name)
        layout = get_weight_format(FORMATS[kind]).together()
        if layout not in shared:
            weights = [
                {shape.name: make_weight(shape, kind, 4 * layer + i) for i, shape in enumerate(shapes)}
                for layer in range(options.layers or spec.num_layers)
            ]
            shared[layout] = Layers(shapes, weights)
        found[name] = shared[layout]
    return found


def turns(
    by_set: Mapping[str, Layers], rows: int, options: Options, report: Callable[[str], None]
) -> dict[tuple[str, str, str], float]:
    """Median seconds by instruction set, place and shape; the sets and places take turns, those that are too slow are
    left out."""
    inputs = next(iter(by_set.values())).inputs(rows)
    entrants = []
    for name, layers in by_set.items():
        native.use_kernels(name)
        spent = sum(layers.from_memory(inputs).values())
        if options.slowest_s < spent < 2 * options.slowest_s:  # the first call pays for memory that no later one does
            spent = sum(layers.from_memory(inputs).values())
        if spent > options.slowest_s:
            report(f"{name} is left out of {rows} rows: {spent:.2f} s for one layer")
        else:
            entrants.append(name)

    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(options.repeats):
        for name, place in itertools.product(entrants, PLACES):
            native.use_kernels(name)
            measured = by_set[name].from_memory if place == "memory" else by_set[name].cached
            for shape, seconds in fill(partial(measured, inputs), options.pass_s).items():
                found.setdefault((name, place, shape), []).append(seconds)
    return {key: statistics.median(every) for key, every in found.items()}


def figures(seconds: float, nbytes: int, flops: float, read_gb_s: float | None, gflops: float) -> dict[str, float]:
    """Figures of one shape; read_gb_s is None for what comes from a cache."""
    least = flops / (1e9 * gflops)
    if read_gb_s is not None:
        least = max(least, nbytes / (1e9 * read_gb_s))
    return {
        "ms": significant(1000 * seconds, 4),
        "gb_s": significant(nbytes / seconds / 1e9, 4),
        "gflops": significant(flops / seconds / 1e9, 4),
        "share_of_limit": share(least, seconds),
    }


def measure_format(
    kind: str, spec: ModelSpec, rows: Sequence[int], limits: Limits, options: Options
) -> Iterator[dict[str, Any]]:
    """Every case of a format; the shape `layer` is all four."""
    shapes = shapes_of(spec)
    by_set = packed_layers(kind, spec, options)
    weights = next(iter(by_set.values())).weights[0]
    nbytes = {shape.name: weights[shape.name].nbytes for shape in shapes}
    elements = {shape.name: shape.outputs * shape.inputs for shape in shapes}
    for each in (nbytes, elements):
        each["layer"] = sum(each.values())
    gflops = limits.gflops(int8=get_weight_format(FORMATS[kind]).rounds_x)

    for number in rows:
        seconds = turns(by_set, number, options, lambda message: print(f"{kind}: {message}", flush=True))
        for name, place in dict.fromkeys((name, place) for name, place, _ in seconds):
            mine = {shape.name: seconds[name, place, shape.name] for shape in shapes}
            mine["layer"] = sum(mine.values())
            read = limits.read_gb_s if place == "memory" else None
            result = {
                shape: figures(mine[shape], nbytes[shape], 2.0 * number * elements[shape], read, gflops)
                for shape in mine
            }
            yield {"format": kind, "rows": number, "instructions": name, "place": place, "shapes": result}


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    if native is None:
        raise ConfigError("the C++ kernels are not built: install again where a C++17 compiler is found")

    options.check()
    config = load_shape(options.random) if options.model is None else read_config(Path(options.model))
    spec = spec_from_config(config, options.model or options.random)
    rows = whole_numbers("rows", options.rows)

    if options.repeats < WARN_BELOW:
        print(f"repeats={options.repeats}: a median of fewer than {WARN_BELOW} says little", flush=True)

    limits = measure_limits(options.limits_s)
    print("\n".join(limits.lines()), flush=True)

    # The sets and threads of the kernels are put back, whatever happens.
    chosen = native.kernels()
    threads = native.threads()
    native.set_threads(limits.threads)
    cases = []
    try:
        for kind in options.formats.split(","):
            for case in measure_format(kind, spec, rows, limits, options):
                cases.append(case)
                layer = ", ".join(f"{name} {value}" for name, value in case["shapes"]["layer"].items())
                title = f"{case['format']}, {case['rows']} rows, {case['instructions']}, {case['place']}"
                print(f"{title}: a layer {layer}", flush=True)
    finally:
        native.use_kernels(chosen)
        native.set_threads(threads)

    return {"benchmark": "linear", "cases": cases, "limits": asdict(limits)}


if __name__ == "__main__":
    run(Options, measure)
