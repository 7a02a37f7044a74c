"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A test that draws its inputs draws the same ones each time, however slow or busy the machine is: it fails for a fault
# alone. `--hypothesis-profile=explore`, as in `make test-all`, draws others.
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("phalanx", settings.get_profile("explore"), derandomize=True)
settings.load_profile("phalanx")

# A shell that runs the tests in the background has what it starts ignore Ctrl-C, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before Triton is imported, here and in the processes that tests start: its kernels then run on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(n, function, *args): see tests/ranks.py."""
    from phalanx.tests.ranks import run_ranks as run

    return run


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 9 query and 3 KV heads, a real tokenizer and chat template."""
    from phalanx.tests.models import require_smollm2

    return require_smollm2()


@pytest.fixture(scope="session")
def qwq_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 with QwQ's 40 query and 8 KV heads, an untied head and float32 weights."""
    return _random_model(tmp_path_factory, "float32")


@pytest.fixture(scope="session")
def qwq_tiny_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape as checkpoints come: bfloat16 weights of Qwen2's own standard deviation, 0.02."""
    return _random_model(tmp_path_factory, "bfloat16", initializer_range=0.02)


def _random_model(tmp_path_factory: pytest.TempPathFactory, dtype: str, **changes: Any) -> Path:
    from phalanx.launch.cli.presets import load_preset
    from phalanx.launch.model_files.random_model import make_random_model

    shape = {**load_preset("qwq_tiny")["shape"], **changes}
    return make_random_model(tmp_path_factory.mktemp("models") / "qwq-tiny", shape, dtype=dtype)
