"""Fixtures of the tests that start whole programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1031,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 258,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose steps take about a millisecond, with a byte-level tokenizer and a chat template."""
    from phalanx.launch.random_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("serve") / "tiny", TINY, dtype="float32")
