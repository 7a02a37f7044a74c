"""The GPU benchmark's checkpoint and its group of one rank, on a CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from phalanx.benchmarks import limits
from phalanx.benchmarks.lab.gpu_sections import loading, one_rank
from phalanx.benchmarks.lab.gpu_sections.shapes import shape_of, two_ranks_shape
from phalanx.engine.errors import ConfigError
from phalanx.parallel.loading.safetensors_files import locate_tensors

CPU = torch.device("cpu")
QWQ = shape_of("qwq_32b", False)


# A checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> loading.Checkpoint:
    shape = loading.loading_shape(shape_of("qwq_32b", True), True)
    return loading.Checkpoint(shape, shape.make_folder(tmp_path), CPU, 50.0, True)


def test_a_checkpoint_of_eight_gigabytes_has_the_shape_of_the_large_model() -> None:
    shape = loading.loading_shape(QWQ, False)
    assert shape.spec.hidden_size == QWQ.spec.hidden_size
    weights = limits.layer_weights(shape.spec) + limits.head_weights(shape.spec) * 2
    assert 7.9e9 < 2 * weights < 8.1e9


def test_a_checkpoint_is_written_loaded_and_compared_with_its_files(checkpoint: loading.Checkpoint) -> None:
    for section in (checkpoint.limits, checkpoint.warm, checkpoint.cold):
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            section()
    written = checkpoint.write()
    assert written["files"] == written["files_synced"] > 1
    assert checkpoint.limits()["warm_gb_s"]["map"] > 0
    warm = checkpoint.warm()
    assert warm["first"]["bytes"] == warm["readers"]["2"]["bytes"] == written["bytes"]
    assert warm["tensors_checked"] >= loading.CHECKED
    assert checkpoint.engine()["tokens"] == 1
    # A tensor that is not what its file says is found out.
    stored = next(iter(locate_tensors(checkpoint._folder).values()))
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(b"\x01\x02" * 8)
    with pytest.raises(RuntimeError, match="is not what its file holds"):
        checkpoint._check()


def test_files_that_do_not_leave_memory_are_not_called_cold(
    checkpoint: loading.Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write()
    monkeypatch.setattr(loading, "drop", lambda files: 1.0)
    assert "100% of the files stay in memory" in checkpoint.cold()["skipped"]
    checkpoint._synced.clear()
    assert "the disk took more than" in checkpoint.cold()["skipped"]


def test_a_disk_that_is_too_small_is_refused(checkpoint: loading.Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1e5))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        checkpoint.write()


@pytest.mark.parametrize("way", ["read", "map"])
def test_every_byte_of_the_files_is_read(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file, size in zip(files, (10_000, 777), strict=True):
        file.write_bytes(bytes(size))
    monkeypatch.setattr(loading, "READ_BYTES", 1000)
    times = iter([0.0, 1e-9])
    monkeypatch.setattr(loading.time, "perf_counter", lambda: next(times))
    assert loading.read_gb_s(files, 3, way) == 10_777


# A group of one rank


def test_one_rank_has_a_group_graphs_and_an_engine_and_leaves_nothing(tmp_path: Path) -> None:
    rank, small = one_rank.OneRank(CPU), two_ranks_shape().make_folder(tmp_path)
    with pytest.raises(ConfigError, match="see the section group"):
        rank.graph()
    group = rank.group()
    assert all(group[name]["works"] is True for name in ("first_all_reduce", "broadcast", "gather", "barrier"))
    assert rank.graph()["right"] is True
    assert rank.engine(small)["equal"] is True
    torn = rank.teardown()
    assert torn["gone"] is True
    assert torn["graphs"]["works"] is torn["group"]["works"] is torn["again"]["works"] is True
    assert not torch.distributed.is_initialized()


def test_symmetric_memory_that_is_not_there_says_so_step_by_step() -> None:
    memory = one_rank.OneMemory(CPU)
    found = memory.rendezvous()
    tune = memory.tune()
    assert not torch.distributed.is_initialized()
    assert "is of GPUs" in found["connect"]["fails"]
    assert "fails" in found["empty"]
    assert "rendezvous" not in found  # there is nothing to meet on
    assert memory.sums() == {"skipped": one_rank.NO_MEMORY}
    assert tune["skipped"] == one_rank.NO_MEMORY
    assert tune["teardown"]["works"] is True


def test_each_sum_is_compared_at_once_and_replayed() -> None:
    memory = one_rank.OneMemory(CPU)
    fake: Any = SimpleNamespace(
        algorithms=("one_shot", "two_shot", "fused"),
        sum=lambda name, x: x if name == "one_shot" else x + 1,
        add_norm=lambda *arguments: 1 / 0,
    )
    memory._memory = fake
    found = memory.sums()
    assert found["one_shot"]["eager"]["works"] is found["one_shot"]["graph"]["works"]["right"] is True
    assert found["two_shot"]["eager"]["works"] is found["two_shot"]["graph"]["works"]["right"] is False
    assert found["multimem"] == "not offered"
    assert found["fused"]["eager"]["fails"].startswith("ZeroDivisionError")
