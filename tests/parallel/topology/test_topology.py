"""CPUs, cores and NUMA nodes, from sysfs of machines that are not here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from phalanx.parallel.topology.topology import Node, Topology, format_cpu_list, parse_cpu_list, read_topology
from phalanx.tests.parallel.topology.recorded import lay_out

SNC2_DISTANCES = ((10, 12, 21, 21), (12, 10, 21, 21), (21, 21, 10, 12), (21, 21, 12, 10))


def _read(name: str, root: Path) -> Topology:
    return read_topology(lay_out(name, root), root)


def test_one_socket_is_one_node_of_cores_with_their_hyperthreads(tmp_path: Path) -> None:
    topology = _read("epyc_1_socket", tmp_path)
    assert topology == Topology((Node(0, tuple((cpu, cpu + 32) for cpu in range(32))),), ((10,),))
    assert (topology.cores, topology.nodes_with_cpus) == (32, 1)


def test_sockets_in_clusters_are_four_nodes(tmp_path: Path) -> None:
    topology = _read("xeon_2_sockets_snc2", tmp_path)
    assert [node.number for node in topology.nodes] == [0, 1, 2, 3]
    assert [len(node.cores) for node in topology.nodes] == [8] * 4
    assert topology.nodes[2].cores[0] == (16, 48)
    assert topology.distances == SNC2_DISTANCES
    assert topology.problem == ""


def test_a_container_sees_the_host_but_uses_its_own_cpus(tmp_path: Path) -> None:
    topology = _read("xeon_container", tmp_path)
    assert [node.cores for node in topology.nodes] == [(), ((9, 41), (10, 42), (11, 43), (13,)), (), ()]
    assert (topology.cores, topology.nodes_with_cpus) == (4, 1)
    assert topology.problem == ""


def test_nodes_without_cpus_are_memory_alone(tmp_path: Path) -> None:
    topology = _read("xeon_max_hbm", tmp_path)
    assert [len(node.cores) for node in topology.nodes] == [32, 32, 0, 0]
    assert topology.nodes_with_cpus == 2
    assert topology.distances[0] == (10, 21, 13, 23)


def test_node_numbers_may_have_gaps_and_cores_four_hyperthreads(tmp_path: Path) -> None:
    topology = _read("power9_gaps", tmp_path)
    assert [node.number for node in topology.nodes] == [0, 8, 252, 253, 254, 255]
    assert topology.nodes[1].cores[0] == (64, 65, 66, 67)
    assert topology.distances[1] == (40, 10, 80, 80, 80, 80)
    assert topology.cores == 32


def test_offline_cpus_are_of_no_node_and_not_allowed(tmp_path: Path) -> None:
    allowed = set(lay_out("xeon_2_sockets_snc2", tmp_path)) - {7, 39}
    (tmp_path / "node/node0/cpulist").write_text("0-6,32-38\n")
    for cpu in (7, 39):
        shutil.rmtree(tmp_path / f"cpu/cpu{cpu}/topology")
    topology = read_topology(allowed, tmp_path)
    assert [len(node.cores) for node in topology.nodes] == [7, 8, 8, 8]
    assert topology.problem == ""


def test_a_node_may_have_cpus_and_no_memory(tmp_path: Path) -> None:
    allowed = lay_out("xeon_2_sockets_snc2", tmp_path)
    (tmp_path / "node/has_memory").write_text("0,2-3\n")
    assert [node.has_memory for node in read_topology(allowed, tmp_path).nodes] == [True, False, True, True]


def test_this_machine_can_be_read() -> None:
    allowed = os.sched_getaffinity(0)
    topology = read_topology(allowed)
    assert sorted(cpu for node in topology.nodes for cpu in node.cpus) == sorted(allowed)
    assert 1 <= topology.cores <= len(allowed)


def test_without_sysfs_all_cpus_are_one_node_and_cores_of_their_own(tmp_path: Path) -> None:
    topology = read_topology({5, 2}, tmp_path)
    assert topology.nodes == (Node(0, ((2,), (5,))),)
    assert f"one NUMA node: there is no {tmp_path}/node/node*" in topology.problem
    assert "taken for cores of their own" in topology.problem


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("node/node1/cpulist", "8-x", "'8-x' is no list of numbers"),
        ("node/node1/cpulist", "8-15", "names the allowed CPUs 40-47"),
        ("node/node1/distance", "10 20", "gives 2 distances for 4 nodes"),
        ("node/node1/cpulist", None, "No such file"),
    ],
)
def test_nodes_that_make_no_sense_are_one_node_and_the_problem_is_told(
    tmp_path: Path, file: str, text: str | None, problem: str
) -> None:
    allowed = lay_out("xeon_2_sockets_snc2", tmp_path)
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    topology = read_topology(allowed, tmp_path)
    assert problem in topology.problem
    assert topology.nodes_with_cpus == 1
    assert topology.cores == 32


def test_a_core_that_is_not_described_is_one_for_each_of_its_cpus(tmp_path: Path) -> None:
    allowed = lay_out("epyc_1_socket", tmp_path)
    (tmp_path / "cpu/cpu3/topology/core_cpus_list").unlink()
    topology = read_topology(allowed, tmp_path)
    assert "taken for cores of their own" in topology.problem
    assert {(3,), (35,)} < set(topology.nodes[0].cores)
    assert topology.cores == 33


def test_no_cpu_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no CPU is allowed"):
        read_topology([])


@pytest.mark.parametrize("text", ["a", "1-", "-1", "3-1", "1,,2", "1 2"])
def test_text_that_is_no_cpu_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no list of numbers"):
        parse_cpu_list(text)


@given(st.sets(st.integers(0, 300)))
def test_a_cpu_list_is_read_as_it_was_written(cpus: set[int]) -> None:
    assert parse_cpu_list(format_cpu_list(cpus)) == tuple(sorted(cpus))


def test_a_cpu_list_is_written_as_linux_writes_it() -> None:
    assert format_cpu_list([8, 0, 2, 1, 10, 9]) == "0-2,8-10"
    assert parse_cpu_list("\n") == ()
