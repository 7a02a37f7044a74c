"""The GPU's correctness suite, without one: it says why it is skipped, and its tests pass in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phalanx.tests.gpu.place import why_skipped

ROOT = Path(__file__).resolve().parents[1]


def test_it_is_skipped_without_a_gpu_and_beside_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT / "tests" / "gpu" / "test_kernels.py")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert why_skipped(paths) == "no GPU: torch.cuda.is_available() is False"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_skipped(paths) is None
    assert "run by themselves" in str(why_skipped([*paths, str(ROOT / "tests" / "kernels" / "test_sampling.py")]))


@pytest.mark.slow
def test_it_says_why_it_is_skipped_without_being_asked() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu/test_kernels.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert process.returncode == 0, process.stdout[-3000:]
    assert "tests/gpu was skipped: no GPU: torch.cuda.is_available() is False" in process.stdout


@pytest.mark.slow
def test_it_passes_in_tritons_interpreter() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", str(ROOT / "tests" / "gpu")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PHALANX_TEST_DEVICE": "cpu"},
    )
    assert process.returncode == 0, process.stdout[-3000:]
    skipped = [line for line in process.stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 3, skipped
    assert all("what a GPU alone has" in line for line in skipped)
