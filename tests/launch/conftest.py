"""Fixtures of the tests that start whole programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.tests.models import TINY_SHAPE


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose steps take about a millisecond, with a byte-level tokenizer and a chat template."""
    from phalanx.launch.model_files.random_model import make_random_model

    return make_random_model(
        tmp_path_factory.mktemp("serve") / "tiny", {**TINY_SHAPE, "max_position_embeddings": 32768}, dtype="float32"
    )
