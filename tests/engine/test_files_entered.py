"""How many of the project's files a request goes through, and one decode step: those that a newcomer has to read."""

from __future__ import annotations

import gc
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.coordinator.coordinator import Coordinator
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES_OF_A_REQUEST = 33
MOST_FILES_OF_A_STEP = 23
SAMPLING = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
ELSEWHERE = {
    "engine/constraints/compiler.py",
    "engine/constraints/mask_thread.py",
    "engine/coordinator/text/reasoning.py",
    "engine/execution/cuda_graphs.py",
    "parallel/control.py",
}
"""Files of ARCHITECTURE's way of a request that this one does not go through: of grammars, thinking, GPUs, other
ranks."""


class _Files:
    """Notes the project's files whose functions are called, for sys.setprofile; without tests."""

    def __init__(self) -> None:
        self.entered: set[str] = set()
        self.on = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.on and event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                name = str(path.relative_to(ROOT))
                if not name.startswith(("tests/", ".venv/")):
                    self.entered.add(name)


@pytest.fixture
def no_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing else happens meanwhile: no grammars are made ready, no object of another test is given up."""
    if cpu.native is None:
        pytest.skip("without the C++ kernels other files serve")
    monkeypatch.setattr(InputProcessor, "prepare", lambda self: None)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def request_files(no_rest: None, qwq_tiny_bfloat16: Path) -> set[str]:
    """The files that a request enters, on all threads: text in, text out."""
    files = _Files()
    threading.setprofile(files)
    try:
        with LLM(str(qwq_tiny_bfloat16), max_model_len=128) as llm:
            llm.generate("A first request", SAMPLING)
            files.on = True
            sys.setprofile(files)
            llm.generate("The capital of France is", SAMPLING)
            sys.setprofile(None)
            files.on = False
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return files.entered


def test_a_request_enters_few_files_and_architecture_names_those_it_enters(request_files: set[str]) -> None:
    assert len(request_files) <= MOST_FILES_OF_A_REQUEST, sorted(request_files)

    text = (ROOT / "ARCHITECTURE.md").read_text()
    life = text[text.index("## Life of a request") : text.index("Over HTTP, before 2")]
    named = set(re.findall(r"`([a-z_/]+\.py)`", life))
    assert named - request_files == ELSEWHERE


def test_a_whole_decode_step_enters_few_files(
    no_rest: None, qwq_tiny_bfloat16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[set[str]] = []
    step = Coordinator._step

    def profiled(self: Coordinator) -> None:
        files = _Files()
        files.on = True
        sys.setprofile(files)
        try:
            step(self)
        finally:
            sys.setprofile(None)
        steps.append(files.entered)

    monkeypatch.setattr(Coordinator, "_step", profiled)
    with LLM(str(qwq_tiny_bfloat16), max_model_len=128) as llm:
        llm.generate("The capital of France is", SAMPLING)
    assert steps
    decodes = steps[1:]  # the first computes the prompt
    for files in decodes:
        assert "engine/models/decoder.py" in files
        assert len(files) <= MOST_FILES_OF_A_STEP, sorted(files)
