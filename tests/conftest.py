"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
    return _random_model("qwq_tiny", tmp_path_factory)


def _random_model(preset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import yaml
    from phalanx.launch.random_model import make_random_model
    from phalanx.tests.models import ROOT

    shape = yaml.safe_load((ROOT / "configs" / "models" / f"{preset}.yaml").read_text())["shape"]
    return make_random_model(tmp_path_factory.mktemp("models") / preset, shape, dtype="float32")
