"""launch.plan and an engine on CPUs agree on the KV cache, to the block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from phalanx import LLM, EngineConfig
from phalanx.engine.client.in_group import GroupLLM
from phalanx.engine.client.llm import RequestOutput
from phalanx.engine.memory import profiler
from phalanx.engine.memory.sizes import RUNTIME_BYTES
from phalanx.launch.cli.plan_table import Plan, Setup, make_plan
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.launch.plan import read_spec
from phalanx.tests.models import TINY_SHAPE

AVAILABLE = 3_000_001
"""Bytes that an engine finds free once its weights are loaded: less than all of its sequences could use."""
COMMON: dict[str, Any] = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 64,
    "device": "cpu",
    "threads": 1,
    "tokenizer": "none",
}
CASES: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "kv_memory": 0.5},
    {"dtype": "float32", "kv_memory": 1_000_001.0},
    {"dtype": "bfloat16", "kv_memory": 1_000_001.0, "kv_cache_dtype": "int8"},
    {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    {"dtype": "bfloat16", "block_size": 48},
    {"dtype": "bfloat16", "quantization": "int8"},
    {"dtype": "bfloat16", "quantization": "int4", "kv_cache_dtype": "int8"},
    {"dtype": "bfloat16", "quantization": "w8a8", "kv_memory": 700_000.0},
    {"dtype": "bfloat16", "max_num_seqs": 2},  # the cache is as large as its sequences can use
    {"dtype": "float32", "max_model_len": 100, "max_num_seqs": 3},
]


def kv_tokens(rank: int, count: int, folder: str) -> list[int]:
    """KV tokens by the status of an engine on these ranks, for each of CASES; nothing on the others than rank 0."""
    profiler.available_memory = lambda: AVAILABLE
    group = dist.new_group(list(range(count)), backend="gloo")
    found: list[int] = []

    def ask(llm: LLM) -> list[RequestOutput]:
        status = llm.status()
        found.append(status.total_blocks * status.block_size)
        return []

    for case in CASES:
        llm = GroupLLM(group, folder, **COMMON | case)
        llm._together(ask)
        llm.close()
    return found


def _planned(folder: Path, ranks: int, case: dict[str, Any]) -> Plan:
    """The plan for a host on which AVAILABLE bytes are left once ranks have started and loaded their weights."""
    config = EngineConfig(model=str(folder), ranks=ranks, **COMMON | case)
    spec = read_spec(str(folder))
    weights = sum(need.weights for need in make_plan(spec, Setup(config)).needs)
    # Bytes that are named are given to an engine unseen; a plan sees to it that the host has them.
    spare = 2**30 if config.kv_memory > 1 else 0
    return make_plan(spec, Setup(config, (AVAILABLE + weights + ranks * RUNTIME_BYTES + spare,)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_says_the_kv_tokens_that_an_engine_makes(
    run_ranks: Callable[..., list[Any]], tmp_path: Path, ranks: int, tied: bool
) -> None:
    folder = make_random_model(tmp_path / "model", {**TINY_SHAPE, "tie_word_embeddings": tied})
    plans = [_planned(folder, ranks, case) for case in CASES]
    made = run_ranks(ranks, kv_tokens, str(folder))[0]
    assert made == [plan.kv_tokens for plan in plans]
    assert all(plan.fits for plan in plans)
    # What bounds the cache is the memory, the bytes that are named, or what sequences can use: each in some case.
    most = [plan.max_model_len * plan.setup.config.max_num_seqs for plan in plans]
    assert any(tokens < limit for tokens, limit in zip(made, most, strict=True))
    assert any(tokens >= limit for tokens, limit in zip(made, most, strict=True))
