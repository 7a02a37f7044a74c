"""What the device can do at best: how fast it copies and reads its memory, and multiplies matrices."""

from __future__ import annotations

from typing import Any

import torch

from ..device import best_s

GPU_BYTES, CPU_BYTES = 4 * 2**30, 2**25
GPU_MATMULS = ((8192, 8192, 8192), (8192, 55296, 5120), (8192, 5120, 27648), (16384, 16384, 16384))
CPU_MATMULS = ((256, 256, 256), (128, 512, 512))
"""Rows, outputs and inputs."""
HOST_BYTES = 2**30


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """The rates of roofline.Ceilings, and what they were found with. Takes some seconds, and the device for itself."""
    on_gpu = device.type == "cuda"
    matmuls = {f"{m}x{n}x{k}": _matmul_tflops(m, n, k, device) for m, n, k in (GPU_MATMULS if on_gpu else CPU_MATMULS)}
    copy, reads = _memory_gb_s(GPU_BYTES if on_gpu else CPU_BYTES, device)
    return {
        "copy_gb_s": copy,
        "read_gb_s": max(reads.values()),
        "matmul_tflops": max(matmuls.values()),
        "reads_gb_s": reads,
        "matmuls_tflops": matmuls,
        **_host_gb_s(device),
    }


def _matmul_tflops(m: int, n: int, k: int, device: torch.device) -> float:
    x, w = (torch.randn(rows, k, device=device).to(torch.bfloat16) for rows in (m, n))
    seconds = best_s([lambda: torch.nn.functional.linear(x, w)], device, repeats=20 if device.type == "cuda" else 3)
    return round(2.0 * m * n * k / seconds / 1e12, 3)


def _memory_gb_s(size: int, device: torch.device) -> tuple[float, dict[str, float]]:
    """Return the rate of a copy, counting what it reads and writes, and the rates of several ways to read."""
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * size / best_s([lambda: target.copy_(source)], device, repeats=10) / 1e9
    matrix = source.view(-1, 8192)
    vector = source[:8192]
    works = {"sum": source.view(torch.int32).sum, "amax": source.amax, "mv": lambda: torch.mv(matrix, vector)}
    reads = {name: round(size / best_s([work], device, repeats=10) / 1e9, 1) for name, work in works.items()}
    return round(copy, 1), reads


def _host_gb_s(device: torch.device) -> dict[str, Any]:
    """Return the rates of copies from pinned host memory to the device: the limit of loading weights."""
    if device.type != "cuda":
        return {"host_to_device": {"skipped": "device=cpu has no bus to copy over"}}
    here = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(HOST_BYTES, dtype=torch.uint8, device=device)
    seconds = best_s([lambda: there.copy_(here, non_blocking=True)], device, repeats=5)
    return {"host_to_device_gb_s": round(HOST_BYTES / seconds / 1e9, 1)}
