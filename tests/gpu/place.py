"""Where the tests of this folder compute: on a GPU; with PHALANX_TEST_DEVICE=cpu in Triton's interpreter, to try them.

A process in which other tests run has Triton's interpreter on, so on a GPU these are run by themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from phalanx.kernels import cuda

ON_GPU = os.environ.get("PHALANX_TEST_DEVICE", "cuda") != "cpu"
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRAPHS = ("eager", "all", "lazy")
"""Settings of CUDA graphs, to be compared with none. On a CPU what a graph would hold runs one by one: conftest.py."""
NEEDS_GPU = "what a GPU alone has: PHALANX_TEST_DEVICE=cpu leaves it out"


def engine_config(**changes: Any) -> dict[str, Any]:
    """Return the settings of an engine small enough for several at once; float32 shows errors that rounding hides."""
    config: dict[str, Any] = {
        "device": DEVICE.type,
        "dtype": "float32",
        "attention": "triton",
        "max_model_len": 512 if ON_GPU else 128,
        "max_num_seqs": 13 if ON_GPU else 5,
        "max_num_batched_tokens": 96 if ON_GPU else 64,
        "kv_memory": 4e8 if ON_GPU else 2**23,
    }
    return {**config, **changes}


def why_skipped(items: Sequence[str]) -> str | None:
    """Why tests of this folder cannot run in a session of tests with these paths; None if they can."""
    if not ON_GPU:
        return None
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    if any("/tests/gpu/" not in path for path in items):
        return "on a GPU tests/gpu are run by themselves: others need Triton's interpreter in the same process"
    return None


@contextmanager
def torch_alone() -> Iterator[None]:
    """Let torch's operations serve on a CPU, not Triton's kernels in the interpreter."""
    was = cuda.interpreting()
    cuda.interpret(False)
    try:
        yield
    finally:
        cuda.interpret(was)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises RuntimeError; on a CPU there is nothing to wait for."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Seeded random numbers on the device, the same on every one."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(actual: torch.Tensor, expected: torch.Tensor, slack: float = 2.0) -> None:
    """To `slack` units in the last place of the dtype, and to float32's sums."""
    unit = torch.finfo(actual.dtype).eps
    tolerance = slack * unit + 1e-5
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)
