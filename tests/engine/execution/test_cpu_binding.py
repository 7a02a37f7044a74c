"""The setting bind_cpus: what is bound on which machine, to what, and what is said where it cannot be."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import ConfigError, EngineConfig
from phalanx.engine.execution import cpu_binding
from phalanx.engine.execution.cpu_binding import Binding, bind_process, choose_binding, start_threads
from phalanx.kernels import cpu
from phalanx.parallel.topology.placement import Placement
from phalanx.tests.parallel.topology.recorded import lay_out

ONE_CPU = min(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """The threads of this process and of torch, whatever a test binds."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    cpu_binding._bind_threads(cpus)
    torch.set_num_threads(threads)
    cpu.set_threads(1)


def _config(**values: Any) -> EngineConfig:
    return EngineConfig(model="m", **values)


def _choose(name: str, root: Path, rank: int, size: int, device: str = "cpu", **values: Any) -> Binding:
    return choose_binding(_config(**values), device, rank, size, lay_out(name, root), root)


@pytest.mark.parametrize("size", [1, 4])
def test_auto_binds_where_there_are_several_nodes(tmp_path: Path, size: int) -> None:
    bound = _choose("xeon_2_sockets_snc2", tmp_path, size - 1, size)
    assert bound.placement is not None
    assert bound.threads == len(bound.placement.cpus) == 32 // size
    assert not bound.whole_process


@pytest.mark.parametrize(("name", "threads"), [("epyc_1_socket", 16), ("xeon_container", 2), ("virtual_machine", 1)])
def test_auto_binds_nothing_on_one_node_and_counts_physical_cores(tmp_path: Path, name: str, threads: int) -> None:
    unbound = _choose(name, tmp_path, 1, 2)
    assert unbound == Binding(threads, None, "bind_cpus=auto, and their CPUs are of one NUMA node")
    assert str(unbound) == f"{threads} thread(s), not bound to CPUs: {unbound.note}"


def test_always_binds_on_one_node_too(tmp_path: Path) -> None:
    bound = _choose("epyc_1_socket", tmp_path, 1, 2, bind_cpus="always")
    assert str(bound) == "16 thread(s) on CPUs 16-31 of NUMA node 0"
    assert str(_choose("epyc_1_socket", tmp_path, 1, 2, bind_cpus="always", threads=4)) == (
        "4 thread(s) on CPUs 16,20,24,28 of NUMA node 0"
    )


def test_never_binds_nothing_anywhere(tmp_path: Path) -> None:
    assert _choose("xeon_2_sockets_snc2", tmp_path, 0, 2, bind_cpus="never") == Binding(16, None, "bind_cpus=never")


def test_ranks_on_gpus_are_not_bound_and_may_not_be(tmp_path: Path) -> None:
    assert _choose("xeon_2_sockets_snc2", tmp_path, 0, 2, "cuda").placement is None
    with pytest.raises(ConfigError, match="bind_cpus=always is for ranks on CPUs; with device=cuda set bind_cpus=auto"):
        _choose("xeon_2_sockets_snc2", tmp_path, 0, 2, "cuda", bind_cpus="always")


def test_what_sysfs_lacks_is_told_once_and_in_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bound = [choose_binding(_config(bind_cpus="always"), "cpu", rank, 2, {3, 5}, tmp_path) for rank in range(2)]
    assert [b.placement.cpus for b in bound if b.placement] == [(3,), (5,)]
    assert len(caplog.records) == 1
    assert "bind_cpus=always: all CPUs are taken for one NUMA node: there is no" in caplog.text
    assert all("taken for one NUMA node" in str(each) for each in bound)
    unbound = choose_binding(_config(), "cpu", 0, 1, {3, 5}, tmp_path)
    assert (unbound.threads, unbound.placement) == (2, None)
    assert "taken for one NUMA node" in str(unbound)


def test_a_process_is_bound_with_all_its_threads_and_the_one_of_steps_to_one_cpu() -> None:
    before = os.sched_getaffinity(0)
    found: list[set[int]] = []
    go = threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), found.append(os.sched_getaffinity(0))))
    thread.start()
    bound = bind_process(_config(bind_cpus="always", threads=1), "cpu", 0, len(before))
    go.set()
    thread.join()
    assert found == [{ONE_CPU}] == [os.sched_getaffinity(0)]
    assert bound.whole_process
    assert torch.get_num_threads() == 1


def test_the_thread_of_steps_is_on_one_cpu_only_while_it_runs_them_and_only_in_a_process_of_ours() -> None:
    before = os.sched_getaffinity(0)
    placement = Placement((ONE_CPU,), tuple(sorted(before)), (0,), (0,))
    with Binding(1, placement, whole_process=True).of_steps():
        assert os.sched_getaffinity(0) == {ONE_CPU}
    with Binding(1, placement).of_steps(), Binding(1, None, "", True).of_steps():
        assert os.sched_getaffinity(0) == before
    assert os.sched_getaffinity(0) == before


NO_CPU = Placement((100_000,), (100_000,), (0,), (0,))


def test_threads_that_the_system_refuses_a_cpu_are_an_error_or_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_binding, "choose_binding", lambda *_: Binding(1, NO_CPU))
    with pytest.raises(
        ConfigError, match=r"bind_cpus=always, but threads cannot be bound to CPUs 100000: .*set bind_cpus"
    ):
        bind_process(_config(bind_cpus="always"), "cpu", 0, 1)
    before = os.sched_getaffinity(0)
    unbound = bind_process(_config(), "cpu", 0, 1)
    assert unbound.placement is None
    assert "Invalid argument" in str(unbound)
    assert "threads cannot be bound to CPUs 100000" in caplog.text
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(cpu.native is None, reason="the C++ kernels are not built")
def test_kernel_threads_that_the_system_refuses_a_cpu_are_an_error_or_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = Binding(2, Placement((ONE_CPU, 100_000), (ONE_CPU, 100_000), (0,), (0,)))
    with pytest.raises(ConfigError, match=r"bind_cpus=always, but threads cannot be bound .*Invalid argument"):
        start_threads(_config(bind_cpus="always"), asked, True)
    unbound = start_threads(_config(), asked, True)
    assert (unbound.threads, unbound.placement) == (2, None)
    assert "Invalid argument" in caplog.text
    assert cpu.native.threads() == 2
    assert not cpu.native.bound()


def test_torchs_threads_in_a_callers_process_are_not_said_to_be_bound(caplog: pytest.LogCaptureFixture) -> None:
    asked = Binding(1, Placement((ONE_CPU,), (ONE_CPU,), (0,), (0,)))
    assert "kernels lack this dtype" in start_threads(_config(), asked, False).note
    assert "kernels lack this dtype" in caplog.text
