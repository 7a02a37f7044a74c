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
    text = _printed_by("tests/gpu/test_kernels.py", CUDA_VISIBLE_DEVICES="")
    assert "tests/gpu was skipped: no GPU: torch.cuda.is_available() is False" in text


@pytest.mark.slow
def test_it_passes_in_tritons_interpreter() -> None:
    text = _printed_by("-q", "-rs", "tests/gpu", PHALANX_TEST_DEVICE="cpu")
    skipped = [line for line in text.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 3, skipped
    assert all("what a GPU alone has" in line for line in skipped)


def _printed_by(*arguments: str, **environment: str) -> str:
    """What pytest prints in a process of its own, which succeeds."""
    command = [sys.executable, "-m", "pytest", *arguments]
    env = {**os.environ, **environment}
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout
