"""The device that is measured: its clock, its facts, and how long work on it takes."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Work = Callable[[], Any]
CPU = torch.device("cpu")


class Mark:
    """A moment on a device: when it comes to what was asked of it before, the moment is now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds between two moments. Both must have come."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1e3
        return self._time - earlier._time


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(works: Sequence[Work], device: torch.device, repeats: int, graph: bool = False) -> float:
    """Seconds of one of the works in the shortest of `repeats` rounds, each of which runs all of them in turn.

    One round before does not count. With `graph` a GPU runs the round as a CUDA graph, without waiting for the host.
    """

    def everything() -> None:
        for work in works:
            work()

    run = _captured(everything) if graph and device.type == "cuda" else everything
    run()
    synchronize(device)
    times = []
    for _ in range(repeats):
        start = Mark(device)
        run()
        end = Mark(device)
        synchronize(device)
        times.append(end.seconds_since(start))
    return min(times) / len(works)


def _captured(work: Work) -> Work:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def facts(device: torch.device) -> dict[str, Any]:
    """The GPU and the software that drives it, or the kind of a CPU."""
    found: dict[str, Any] = {"device": device.type, "triton": installed("triton"), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {**found, "name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "multiprocessors": properties.multi_processor_count,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        **_driver(),
        **{name: installed(name) for name in ("flash-attn", "flash-attn-3", "fa3-fwd", "flashinfer-python")},
    }


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU: driver, power limit and clocks."""
    names = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"driver_version": f"nvidia-smi does not say: {error}"}
    return dict(zip(names, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))
