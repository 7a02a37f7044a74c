"""A decoder's forward pass: what a trace hears, which tokens come out, what a checkpoint may hold besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import EngineConfig
from phalanx.benchmarks.step import step_plan
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.execution.worker_factory import build_worker
from phalanx.engine.models.decoder import CausalLM
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.kernels import cpu
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.parallel.group import local_group
from phalanx.tests.models import TINY_SHAPE

LAYERS = TINY_SHAPE["num_hidden_layers"]


def _worker(folder: Path, **changes: Any) -> Worker:
    config = EngineConfig(model=str(folder), max_model_len=64, max_num_seqs=4, **changes)
    return build_worker(
        config, spec_from_config(read_config(folder), str(folder)), folder, local_group(torch.device("cpu"))
    )


@pytest.fixture(params=["cpu", "torch"])
def worker(request: pytest.FixtureRequest, tiny: Path) -> Worker:
    """One whose layers are one call, and one whose layers are called one after the other."""
    if request.param == "cpu" and cpu.native is None:
        pytest.skip("not built; see test_extensions.py")
    return _worker(tiny, attention=request.param)


def test_a_trace_hears_of_every_part_in_order_and_changes_no_bit(worker: Worker) -> None:
    plan = step_plan(rows=3, first=0, count=7, block_size=worker.settings.block_size)
    heard: list[str] = []
    with torch.inference_mode():
        worker.slot_table.apply(plan)
        batch = worker.slot_table.batch(plan)
        expected = worker.model(batch, worker.cache, batch.sample_tokens)
        found = worker.model(batch, worker.cache, batch.sample_tokens, heard.append)
    assert torch.equal(found, expected)
    assert heard == ["embedding", *["attention", "mlp"] * LAYERS, "norm"]


def test_hidden_states_of_some_tokens_are_theirs_among_all(worker: Worker) -> None:
    plan = step_plan(rows=2, first=0, count=9, block_size=worker.settings.block_size)
    with torch.inference_mode():
        worker.slot_table.apply(plan)
        batch = worker.slot_table.batch(plan)
        everyone = worker.model(batch, worker.cache)
        for tokens in ([8, 17], [3], []):
            some = worker.model(batch, worker.cache, torch.tensor(tokens, dtype=torch.int64))
            torch.testing.assert_close(some, everyone[tokens], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_may_hold_old_rotary_buffers_and_the_copy_of_a_tied_head(tmp_path: Path, tied: bool) -> None:
    folder = make_random_model(tmp_path / "model", {**TINY_SHAPE, "tie_word_embeddings": tied}, dtype="float32")
    model: CausalLM = _worker(folder).model
    assert model.may_be_left_over("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert model.may_be_left_over("lm_head.weight") == tied
    assert not model.may_be_left_over("model.norm.weight")
