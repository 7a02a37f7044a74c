"""The memory that is available: the machine's, within the limits of control groups, from files as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.engine.memory import profiler
from phalanx.engine.memory.host_memory import available_memory
from phalanx.launch import plan

GIB = 2**30
UNLIMITED = 9223372036854771712
"""What version 1 says where there is no limit."""


def _write(root: Path, files: dict[str, object]) -> Path:
    """A machine with 20 GiB available, and these files."""
    for name, text in {"proc/meminfo": f"MemTotal: {24 * 2**20} kB\nMemAvailable: {20 * 2**20} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def _v1(group: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        "proc/self/cgroup": f"9:name=systemd:/\n4:memory:{group or '/'}\n0::/",
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"cache 5\ntotal_cache 6\ntotal_inactive_file {inactive}",
    }


def _v2(group: str, limit: int | str, used: int, inactive: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    return {
        "proc/self/cgroup": f"0::{group or '/'}",
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7",
    }


@pytest.mark.parametrize("version", [_v1, _v2])
@pytest.mark.parametrize("group", ["", "/docker/0123"])
def test_a_containers_limit_counts_less_what_it_uses(tmp_path: Path, version: type[object], group: str) -> None:
    assert available_memory(_write(tmp_path, version(group, 8 * GIB, 3 * GIB))) == 5 * GIB


@pytest.mark.parametrize("version", [_v1, _v2])
def test_files_that_a_container_read_lately_give_way(tmp_path: Path, version: type[object]) -> None:
    assert available_memory(_write(tmp_path, version("", 8 * GIB, 7 * GIB, inactive=4 * GIB))) == 5 * GIB


@pytest.mark.parametrize(
    "files", [{}, _v1("", UNLIMITED, 3 * GIB), _v2("", "max", 3 * GIB), _v2("/slice", 64 * GIB, GIB)]
)
def test_the_machines_memory_is_the_limit_where_a_group_has_none_or_a_larger_one(
    tmp_path: Path, files: dict[str, object]
) -> None:
    assert available_memory(_write(tmp_path, files)) == 20 * GIB


@pytest.mark.parametrize(("limits", "expected"), [((8, 16), 7), ((16, 8), 6)])
def test_the_tightest_group_of_those_around_a_process_counts(
    tmp_path: Path, limits: tuple[int, int], expected: int
) -> None:
    files = _v2("/outer", limits[1] * GIB, 2 * GIB) | _v2("/outer/inner", limits[0] * GIB, GIB)
    assert available_memory(_write(tmp_path, files)) == expected * GIB


def test_a_container_that_sees_its_own_group_at_the_mount_is_limited_by_it(tmp_path: Path) -> None:
    # Docker without a namespace for control groups: the path is the host's, the files stand at the mount itself.
    files = _v1("", 8 * GIB, GIB) | {"proc/self/cgroup": "4:memory:/docker/0123"}
    assert available_memory(_write(tmp_path, files)) == 7 * GIB
    above = _v2("", 6 * GIB, GIB) | {"proc/self/cgroup": "0::/../elsewhere"}
    assert available_memory(_write(tmp_path / "v2", above)) == 5 * GIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    assert available_memory(_write(tmp_path, _v2("", GIB, 2 * GIB))) == 0


def test_an_engine_and_a_plan_ask_the_same_function() -> None:
    assert profiler.available_memory is plan.available_memory is available_memory
    assert 0 < available_memory() < 2**50
