"""The correctness suite for a GPU: `python -m pytest tests/gpu`; see place.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.execution import resolved_settings, worker_factory
from phalanx.engine.execution.cuda_graphs import EagerRecorder
from phalanx.kernels import cpu, cuda
from phalanx.tests.gpu.place import ON_GPU, why_skipped
from phalanx.tests.models import TINY_SHAPE

HERE = str(Path(__file__).resolve().parent)
WHY_SKIPPED = pytest.StashKey[str]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip this folder's tests, with the reason, where they cannot run; else let Triton compile its kernels."""
    ours = [item for item in items if str(item.path).startswith(HERE)]
    reason = why_skipped([str(item.path) for item in items])
    if reason is not None:
        config.stash[WHY_SKIPPED] = reason
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))
    elif ON_GPU:
        assert "triton" not in sys.modules, "Triton was imported before its interpreter could be turned off"
        os.environ["TRITON_INTERPRET"] = "0"  # of this process, and of ranks that it starts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say why the tests were skipped: pytest says so only where it is asked to (-rs)."""
    reason = config.stash.get(WHY_SKIPPED, None)
    if reason is not None:
        terminalreporter.write_line(f"tests/gpu was skipped: {reason}")


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU, Triton's kernels instead of the C++ ones, and what CUDA graphs would hold runs one by one."""
    if ON_GPU:
        yield
        return
    monkeypatch.setattr(cpu, "native", None)
    monkeypatch.setattr(
        resolved_settings, "choose_graphs", lambda setting, **facts: (_graphs(setting), f"graphs={setting}")
    )
    monkeypatch.setattr(worker_factory, "CudaRecorder", lambda device: EagerRecorder())
    cuda.interpret(True)
    yield
    cuda.interpret(False)


def _graphs(setting: str) -> str:
    return "none" if setting == "auto" else setting


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 2 layers with a byte-level tokenizer and a chat template."""
    return _random(tmp_path_factory, {**TINY_SHAPE, "initializer_range": 0.2})


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True}


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3: heads are normalised, and its head is tied to its embedding."""
    return _random(tmp_path_factory, {**TINY_SHAPE, **QWEN3, "initializer_range": 0.1})


@pytest.fixture(scope="session")
def qwen3_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape as checkpoints come: bfloat16 weights of the usual standard deviation."""
    return _random(tmp_path_factory, {**TINY_SHAPE, **QWEN3, "initializer_range": 0.02}, "bfloat16")


def _random(tmp_path_factory: pytest.TempPathFactory, shape: dict[str, Any], dtype: str = "float32") -> Path:
    from phalanx.launch.model_files.random_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("models") / "random", shape, dtype=dtype)
