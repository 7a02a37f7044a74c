"""A tiny chat model and an engine on it, shared by the tests of the engine's behaviour."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM
from phalanx.tests.models import TINY_SHAPE

CONFIG: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_memory": 2**23}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2 of 2 layers with a byte-level tokenizer and a chat template."""
    from phalanx.launch.model_files.random_model import make_random_model

    return make_random_model(
        tmp_path_factory.mktemp("models") / "tiny", {**TINY_SHAPE, "initializer_range": 0.2}, dtype="float32"
    )


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    """One engine for a module's tests; nothing may be left running in it, and no block lost."""
    with LLM(str(tiny), **CONFIG) as engine:
        yield engine
        status = engine.status()
        assert (status.running, status.waiting) == (0, 0)
        assert status.free_blocks == status.total_blocks
