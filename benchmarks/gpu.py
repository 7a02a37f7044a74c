"""What phalanx reaches on one GPU, as shares of what the GPU was measured to do just before: one command, one JSON.

    python benchmarks/gpu.py out=benchmarks/results/gpu_h200.json        # at most 9 minutes
    python benchmarks/gpu.py sections=decode,profile shapes=qwen3_0_6b
    python benchmarks/gpu.py sections=kernels,loading,nccl_one
    python benchmarks/gpu.py device=cpu shape=tiny                       # the same code on any machine, to try it

Models are made in place: a config.json and load_format=dummy. Each group of sections runs in a process of its own. A
section that fails or is skipped says why, and the others go on; ceilings are always measured. The last line is JSON.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.gpu_sections.children import Job, Sections, out_of_time, run_group, serve_job, this_program
from phalanx.benchmarks.lab.gpu_sections.goals import goals
from phalanx.engine.errors import ConfigError

QWQ, QWEN3 = FAMILIES = ("qwq_32b", "qwen3_0_6b")


@dataclass(frozen=True)
class Group:
    """Sections that share a process: seconds until it has started, and those that each may take on an H100."""

    kind: str
    family: str
    start_s: float
    sections: dict[str, float]


GROUPS = (
    Group("ceilings", QWQ, 0, {"ceilings": 30}),
    Group("serving", QWQ, 30, {"engine": 0, "decode": 12, "prefill": 30, "throughput": 75, "profile": 6}),
    Group("serving", QWEN3, 25, {"engine": 0, "decode": 5, "prefill": 8, "throughput": 30, "profile": 4}),
    Group("attention", QWQ, 10, {"attention": 50}),
    Group("peer", QWEN3, 15, {"peer": 60}),
    Group("two_ranks", QWQ, 10, {"two_ranks": 35}),
    Group("ready", QWEN3, 5, {"all": 25, "lazy": 20}),
    Group("kernels", QWEN3, 20, {"eager": 6, "prompt": 3, "graphs": 6, "host": 2}),
    Group("loading", QWQ, 10, {"checkpoint": 15, "limits": 10, "warm": 10, "cold": 10, "engine": 15}),
    Group("kernels", QWQ, 30, {"eager": 8, "prompt": 3, "graphs": 8, "host": 2}),
    Group("nccl_one", QWQ, 10, {"group": 5, "graph": 3, "engine": 20, "teardown": 3}),
    Group("nccl_one", QWQ, 10, {"rendezvous": 3, "sums": 5, "tune": 10}),
    Group("ready", QWQ, 5, {"all": 40, "lazy": 30}),
)
"""In the order of what matters most, for when the time is up."""

LINE = 600
"""Characters of a section's result that are printed as it comes."""
CEILINGS_S = 60.0
PATIENCE = 1.6
"""A group may take this many times the seconds that it is expected to take."""

SECTIONS = ("decode", "prefill", "throughput", "profile", "attention", "peer", "ready", "two_ranks")
SECTIONS += ("kernels", "loading", "nccl_one")
OF_A_FAMILY = ("ready", "kernels")
OF_A_KIND = ("loading", "nccl_one")
"""Kinds whose groups have several sections: these stand under their kind, with or without the family's name."""


@dataclass
class Options:
    """What to measure."""

    sections: str = "all"  # or some of SECTIONS, separated by commas
    shapes: str = ",".join(FAMILIES)  # models that are served
    device: str = "cuda"  # or cpu
    shape: str = "full"  # or tiny: small models and short runs
    interpret: bool = False  # on a CPU: Triton's kernels, run by its interpreter, instead of the CPU's own
    limit_s: float = 540.0  # for everything
    out: str | None = None  # a file for the JSON line

    def check(self) -> None:
        """Raises ConfigError."""
        chosen: dict[str, tuple[str, ...]] = {"device": ("cuda", "cpu"), "shape": ("full", "tiny")}
        for name, allowed in chosen.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)} must be one of {', '.join(allowed)}")
        for name, allowed in {"sections": (*SECTIONS, "all"), "shapes": FAMILIES}.items():
            if unknown := [part for part in getattr(self, name).split(",") if part not in allowed]:
                raise ConfigError(f"{name}={getattr(self, name)}: {unknown[0]!r} is not one of {', '.join(allowed)}")
        if self.device == "cpu" and self.shape == "full":
            raise ConfigError("device=cpu takes hours for shape=full; set shape=tiny")
        if self.interpret and self.device != "cpu":
            raise ConfigError("interpret=true is for device=cpu")

    def groups(self) -> list[Group]:
        """What to run, in order."""
        found = []
        for group in GROUPS:
            served = group.kind == "serving"
            sections = {name: s for name, s in group.sections.items() if self._wants(name if served else group.kind)}
            if served or group.kind in OF_A_FAMILY:
                sections = sections if group.family in self.shapes.split(",") else {}
            if sections:
                found.append(replace(group, sections={"engine": 0.0, **sections} if served else sections))
        return found

    def _wants(self, section: str) -> bool:
        return (
            section == "ceilings"
            or (section != "engine" and self.sections == "all")
            or section in self.sections.split(",")
        )


@dataclass
class Results:
    """What was found so far."""

    options: Options
    values: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)

    def add(self, group: Group, section: str, result: Any) -> None:
        """Put a section's result in its place."""
        name = group.family if self.options.shape == "full" else f"{group.family}_tiny"
        if group.kind == "serving":
            self.shapes.setdefault(name, {})[section] = result
        elif group.kind in OF_A_FAMILY:
            self.values.setdefault(group.kind, {}).setdefault(name, {})[section] = result
        elif group.kind in OF_A_KIND:
            self.values.setdefault(group.kind, {})[section] = result
        else:
            self.values[section] = result

    @property
    def ceilings(self) -> dict[str, float]:
        """For the other sections. Raises ConfigError, with what went wrong, if there are none."""
        found = self.values["ceilings"]
        names = ("copy_gb_s", "read_gb_s", "matmul_tflops", "host_to_device_gb_s")
        if "copy_gb_s" not in found:
            raise ConfigError(f"the ceilings could not be measured: {found}")
        return {name: found[name] for name in names if name in found}

    def whole(self) -> dict[str, Any]:
        """With the ratio to the peer, and what became of the goals."""
        peer = self.values.get("peer", {}).get("output_tokens_per_s")
        for name, shape in self.shapes.items():
            ours = shape.get("throughput", {}).get("output_tokens_per_s")
            if peer and ours and name.startswith(QWEN3):
                self.values["peer"]["phalanx_to_peer"] = round(ours / peer, 2)
        whole = {"benchmark": "gpu", **self.values, "shapes": self.shapes}
        return {**whole, "goals": goals(whole)}


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    import torch
    from phalanx.benchmarks.lab.gpu_sections.kernel_times.kernel_roles import describe

    options.check()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no GPU; device=cpu shape=tiny runs the same code without one")
    until = time.monotonic() + options.limit_s
    results = Results(options)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if options.interpret:
        environment["TRITON_INTERPRET"] = "1"
    for group in options.groups():
        for section, result in _outcome(group, options, results, until, environment):
            results.add(group, section, result)
            line = (
                f"{options.limit_s - until + time.monotonic():.0f} s: {group.kind} {group.family} {section}: {result}"
            )
            print(line[:LINE], flush=True)
            if group.kind == "kernels":
                tables = (item for item in result.items() if isinstance(item[1], dict))
                for line in itertools.chain.from_iterable(describe(*item) for item in tables):
                    print(line, flush=True)
    whole = results.whole()
    for name, goal in whole["goals"].items():
        print(f"{name}: {goal}")
    return whole


def _outcome(
    group: Group, options: Options, results: Results, until: float, environment: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """Every section's result."""
    full = options.shape == "full"
    now = time.monotonic()
    expected = {name: seconds if full else 0.0 for name, seconds in group.sections.items()}
    needed = (group.start_s if full else 0.0) + next(seconds for name, seconds in expected.items() if name != "engine")
    job = Job(group.kind, group.family, expected, now + CEILINGS_S, options.device, not full, options.interpret, {})
    if group.kind != "ceilings":  # they get what they need in any case
        if until - now < needed:
            yield from ((name, out_of_time(needed, until - now)) for name in expected)
            return
        # One that hangs must not take all the time there is.
        most = PATIENCE * (group.start_s + sum(group.sections.values()))
        job = replace(job, until=min(until, now + most), ceilings=results.ceilings)
    yield from run_group(this_program(__file__), job, environment)


@contextmanager
def open_group(job: Job) -> Iterator[Sections]:
    """The functions that measure a group's sections, in its process."""
    import torch
    from phalanx.benchmarks.lab.gpu_sections import serving
    from phalanx.benchmarks.lab.gpu_sections.device import facts
    from phalanx.benchmarks.lab.gpu_sections.kernel_times import kernels
    from phalanx.benchmarks.lab.gpu_sections.kernel_times.ceilings import measure_ceilings
    from phalanx.benchmarks.lab.gpu_sections.kernel_times.roofline import Ceilings
    from phalanx.benchmarks.lab.gpu_sections.shapes import shape_of
    from phalanx.kernels import cuda

    if job.interpret:
        cuda.interpret(True)
    device = torch.device(job.device, 0) if job.device == "cuda" else torch.device("cpu")
    if job.kind == "ceilings":
        yield {"ceilings": lambda: {**measure_ceilings(device), "machine": facts(device)}}
        return
    rates = dict(job.ceilings)
    host_to_device = rates.pop("host_to_device_gb_s", None)
    ceilings = Ceilings(**rates)
    shape = shape_of(job.family, job.tiny)
    with tempfile.TemporaryDirectory() as parent:
        folder = shape.make_folder(Path(parent))
        if job.kind == "serving":
            with serving.serve(shape, folder, job.device, job.interpret, ceilings) as served:
                yield {
                    "engine": lambda: served.report,
                    "decode": lambda: serving.measure_decode(served),
                    "prefill": lambda: serving.measure_prefill(served),
                    "throughput": lambda: serving.measure_throughput(served),
                    "profile": lambda: serving.measure_profile(served),
                }
        elif job.kind == "kernels":
            with kernels.open_bench(shape, folder, device, job.interpret, ceilings) as bench:
                yield {"eager": bench.eager, "prompt": bench.prompt, "graphs": bench.graphs, "host": bench.host}
        else:
            yield _sections_alone(job, folder, device, ceilings, host_to_device)


def _sections_alone(job: Job, folder: Path, device: Any, ceilings: Any, host_to_device: float | None) -> Sections:
    """Results of the groups that need no engine serving all of them; `folder` holds the family's config.json."""
    from phalanx.benchmarks.lab.gpu_sections import loading, one_rank, processes
    from phalanx.benchmarks.lab.gpu_sections.kernel_times.attention import measure_attention
    from phalanx.benchmarks.lab.gpu_sections.shapes import shape_of, two_ranks_shape

    shape = shape_of(job.family, job.tiny)
    small = two_ranks_shape().make_folder(folder.parent)
    stored = loading.loading_shape(shape, job.tiny)
    checkpoint = loading.Checkpoint(
        stored, stored.make_folder(folder.parent / "stored"), device, host_to_device, job.tiny
    )
    rank = one_rank.OneRank(device)
    memory = one_rank.OneMemory(device)
    kinds: dict[str, Sections] = {
        "attention": {"attention": lambda: measure_attention(shape, device, ceilings)},
        "peer": {"peer": lambda: processes.measure_peer(shape, folder, device)},
        "two_ranks": {"two_ranks": lambda: processes.measure_two_ranks(small, device)},
        "ready": {name: partial(processes.measure_ready, shape, folder, device, name) for name in ("all", "lazy")},
        "loading": {
            "checkpoint": checkpoint.write,
            "limits": checkpoint.limits,
            "warm": checkpoint.warm,
            "cold": checkpoint.cold,
            "engine": checkpoint.engine,
        },
        "nccl_one": {
            "group": rank.group,
            "graph": rank.graph,
            "engine": lambda: rank.engine(small),
            "teardown": rank.teardown,
            "rendezvous": memory.rendezvous,
            "sums": memory.sums,
            "tune": memory.tune,
        },
    }
    return kinds[job.kind]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        serve_job(sys.argv[2], open_group)
    else:
        from phalanx.benchmarks.lab.common import run

        run(Options, measure)
