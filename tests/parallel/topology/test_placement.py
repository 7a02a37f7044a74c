"""Which CPUs ranks get: what must hold on any machine, and what comes out on machines that are not here."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phalanx.parallel.topology.placement import Placement, place
from phalanx.parallel.topology.topology import Node, Topology, read_topology
from phalanx.tests.parallel.topology.recorded import NAMES, lay_out


@st.composite
def _topologies(draw: st.DrawFn) -> Topology:
    """Up to 6 nodes, numbered with gaps, of cores of up to 4 hyperthreads, some not allowed, some without memory."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    numbers = itertools.count()
    nodes = []
    for index, size in enumerate(sizes):
        depths = draw(st.lists(st.integers(1, 4), min_size=size, max_size=size))
        cores = tuple(tuple(itertools.islice(numbers, depth)) for depth in depths)
        nodes.append(Node(3 * index, cores, draw(st.booleans())))
    far = draw(st.lists(st.integers(11, 40), min_size=len(nodes) ** 2, max_size=len(nodes) ** 2))
    distances = tuple(
        tuple(10 if a == b else far[a * len(nodes) + b] for b in range(len(nodes))) for a in range(len(nodes))
    )
    return Topology(tuple(nodes), distances)


def _all(topology: Topology, size: int, threads: int | None = None) -> list[Placement]:
    return [place(topology, rank, size, threads) for rank in range(size)]


def _core_of(topology: Topology) -> dict[int, tuple[int, ...]]:
    return {cpu: core for node in topology.nodes for core in node.cores for cpu in core}


def _node_of(topology: Topology) -> dict[int, int]:
    return {cpu: node.number for node in topology.nodes for cpu in node.cpus}


@given(topology=_topologies(), size=st.integers(1, 40), threads=st.one_of(st.none(), st.integers(1, 30)))
@settings(deadline=None)
def test_every_rank_gets_allowed_cpus_and_as_many_threads_as_it_is_to_have(
    topology: Topology, size: int, threads: int | None
) -> None:
    nodes = _node_of(topology)
    for placement in _all(topology, size, threads):
        assert set(placement.cpus) <= set(placement.share) <= set(nodes)
        assert {nodes[cpu] for cpu in placement.share} == set(placement.nodes)
        cores = {_core_of(topology)[cpu] for cpu in placement.share}
        assert len(placement.cpus) == (len(cores) if threads is None else threads)
        # A core's second hyperthread only works when every core of the rank does.
        uses = Counter(_core_of(topology)[cpu] for cpu in placement.cpus)
        assert max(uses.values()) == 1 or set(uses) == cores
        assert len(set(placement.cpus)) == min(len(placement.cpus), len(placement.share))


@given(topology=_topologies(), size=st.integers(1, 40))
@settings(deadline=None)
def test_ranks_share_no_core_while_there_are_enough_and_no_cpu_while_there_are(topology: Topology, size: int) -> None:
    placements = _all(topology, size)
    owners = Counter(cpu for placement in placements for cpu in placement.share)
    core_owners = Counter(
        core for placement in placements for core in {_core_of(topology)[cpu] for cpu in placement.share}
    )
    if size <= topology.cores:
        assert set(core_owners.values()) == {1}
    else:
        assert len(core_owners) == topology.cores
    # Nodes are given ranks by their cores: of several, one of few hyperthreads may run short of CPUs before another.
    if topology.nodes_with_cpus == 1 and size <= len(_node_of(topology)):
        assert set(owners.values()) == {1}


_MIXED = Topology(
    nodes=(
        Node(0, cores=((0,), (1, 2, 3, 4), (5,), (6, 7, 8, 9), (10, 11, 12, 13)), has_memory=True),
        Node(1, cores=((14,), (15,), (16,)), has_memory=True),
    ),
    distances=((10, 11), (11, 10)),
)  # cores with one hyperthread beside cores with several


@given(topology=_topologies(), size=st.integers(1, 40))
@example(topology=_MIXED, size=9)
@settings(deadline=None)
def test_a_rank_stays_inside_a_node_and_ranks_are_as_even_as_nodes_allow(topology: Topology, size: int) -> None:
    placements = _all(topology, size)
    if size < topology.nodes_with_cpus:
        together = [number for placement in placements for number in placement.nodes]
        assert sorted(together) == sorted(node.number for node in topology.nodes if node.cores)
        return
    assert all(len(placement.nodes) == 1 for placement in placements)
    counts = Counter(placement.nodes[0] for placement in placements)
    sizes = {node.number: len(node.cores) for node in topology.nodes if node.cores}
    if len(set(sizes.values())) == 1:
        assert max(counts.values()) - min(counts.get(number, 0) for number in sizes) <= 1
    for number, ranks in counts.items():
        threads = [len(placement.cpus) for placement in placements if placement.nodes == (number,)]
        assert max(threads) - min(threads) <= 1
        assert ranks > sizes[number] or sum(threads) == sizes[number]


@given(topology=_topologies(), size=st.integers(1, 8))
@settings(deadline=None)
def test_no_other_division_of_ranks_among_nodes_gives_the_poorest_more_cores(topology: Topology, size: int) -> None:
    sizes = [len(node.cores) for node in topology.nodes if node.cores]
    if not len(sizes) <= size <= topology.cores:
        return
    poorest = min(len(placement.cpus) for placement in _all(topology, size))
    divisions = (
        [after - before - 1 for before, after in itertools.pairwise((-1, *bars, size + len(sizes) - 1))]
        for bars in itertools.combinations(range(size + len(sizes) - 1), len(sizes) - 1)
    )
    best = max(
        min(cores // ranks for cores, ranks in zip(sizes, division, strict=True) if ranks) for division in divisions
    )
    assert poorest == best


@given(topology=_topologies(), size=st.integers(1, 5))
@settings(deadline=None)
def test_few_ranks_get_runs_of_nodes_that_no_other_cut_makes_more_even(topology: Topology, size: int) -> None:
    equally_far = tuple(tuple(10 if a == b else 20 for a in topology.nodes) for b in topology.nodes)
    topology = dataclasses.replace(topology, distances=equally_far)
    sizes = [len(node.cores) for node in topology.nodes if node.cores]
    if size >= len(sizes):
        return
    placements = _all(topology, size)
    assert [number for placement in placements for number in placement.nodes] == [
        node.number for node in topology.nodes if node.cores
    ]
    cuts = ((0, *cut, len(sizes)) for cut in itertools.combinations(range(1, len(sizes)), size - 1))
    least = min(sum(sum(sizes[a:b]) ** 2 for a, b in itertools.pairwise(cut)) for cut in cuts)
    assert sum(len(placement.cpus) ** 2 for placement in placements) == least


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16])
def test_a_placement_depends_on_nothing_but_the_machine(tmp_path: Path, name: str, size: int) -> None:
    allowed = lay_out(name, tmp_path)
    placements = _all(read_topology(allowed, tmp_path), size)
    assert placements == _all(read_topology(allowed[::-1], tmp_path), size)
    assert len({placement.cpus for placement in placements}) == min(size, len(allowed))


def _texts(name: str, root: Path, size: int, threads: int | None = None) -> list[str]:
    topology = read_topology(lay_out(name, root), root)
    return [str(placement) for placement in _all(topology, size, threads)]


def test_each_rank_of_four_has_a_cluster_of_two_sockets(tmp_path: Path) -> None:
    assert _texts("xeon_2_sockets_snc2", tmp_path, 4) == [
        "8 thread(s) on CPUs 0-7 of NUMA node 0",
        "8 thread(s) on CPUs 8-15 of NUMA node 1",
        "8 thread(s) on CPUs 16-23 of NUMA node 2",
        "8 thread(s) on CPUs 24-31 of NUMA node 3",
    ]
    topology = read_topology(lay_out("xeon_2_sockets_snc2", tmp_path), tmp_path)
    assert place(topology, 3, 4).share == (*range(24, 32), *range(56, 64))


def test_each_rank_of_two_has_a_socket_and_one_has_everything(tmp_path: Path) -> None:
    assert _texts("xeon_2_sockets_snc2", tmp_path, 2) == [
        "16 thread(s) on CPUs 0-15 of NUMA nodes 0-1",
        "16 thread(s) on CPUs 16-31 of NUMA nodes 2-3",
    ]
    assert _texts("xeon_2_sockets_snc2", tmp_path, 1) == ["32 thread(s) on CPUs 0-31 of NUMA nodes 0-3"]


def test_ranks_that_are_no_multiple_of_the_nodes_are_balanced(tmp_path: Path) -> None:
    nodes = [text[-1] for text in _texts("xeon_2_sockets_snc2", tmp_path, 6)]
    assert nodes == ["0", "0", "1", "1", "2", "3"]
    assert [text.split()[-1] for text in _texts("xeon_2_sockets_snc2", tmp_path, 3)] == ["0", "1", "2-3"]


def test_a_container_divides_the_cores_that_it_has(tmp_path: Path) -> None:
    assert _texts("xeon_container", tmp_path, 2) == [
        "2 thread(s) on CPUs 9-10 of NUMA node 1",
        "2 thread(s) on CPUs 11,13 of NUMA node 1",
    ]
    topology = read_topology(lay_out("xeon_container", tmp_path), tmp_path)
    assert place(topology, 1, 2).share == (11, 13, 43)
    # Five ranks are more than the cores: two have a hyperthread each of one, and the others a core.
    assert [placement.share for placement in _all(topology, 5)] == [(9,), (41,), (10, 42), (11, 43), (13,)]


def test_memory_alone_gets_no_ranks_and_is_not_where_first_touch_goes(tmp_path: Path) -> None:
    topology = read_topology(lay_out("xeon_max_hbm", tmp_path), tmp_path)
    assert [placement.nodes for placement in _all(topology, 2)] == [(0,), (1,)]
    assert [placement.memory_nodes for placement in _all(topology, 2)] == [(0,), (1,)]


def test_a_node_without_memory_takes_that_of_the_nearest(tmp_path: Path) -> None:
    allowed = lay_out("xeon_2_sockets_snc2", tmp_path)
    (tmp_path / "node/has_memory").write_text("0,2-3\n")
    topology = read_topology(allowed, tmp_path)
    assert [placement.memory_nodes for placement in _all(topology, 4)] == [(0,), (0,), (2,), (3,)]
    assert str(place(topology, 1, 4)).endswith("of NUMA node 1, memory of node 0")


def test_nodes_whose_numbers_alternate_between_sockets_are_joined_by_distance(tmp_path: Path) -> None:
    allowed = lay_out("xeon_2_sockets_snc2", tmp_path)
    for number, row in enumerate(["10 21 12 21", "21 10 21 12", "12 21 10 21", "21 12 21 10"]):
        (tmp_path / f"node/node{number}/distance").write_text(row)
    topology = read_topology(allowed, tmp_path)
    assert [placement.nodes for placement in _all(topology, 2)] == [(0, 2), (1, 3)]


def test_threads_that_fit_one_node_stay_there_spaced_out_and_more_than_cores_take_hyperthreads(tmp_path: Path) -> None:
    assert _texts("xeon_2_sockets_snc2", tmp_path, 2, threads=4) == [
        "4 thread(s) on CPUs 0,2,4,6 of NUMA node 0",
        "4 thread(s) on CPUs 16,18,20,22 of NUMA node 2",
    ]
    topology = read_topology(lay_out("xeon_2_sockets_snc2", tmp_path), tmp_path)
    assert place(topology, 0, 4, 10).cpus == (0, 1, 2, 3, 4, 5, 6, 7, 32, 33)
    assert place(topology, 0, 4, 17).cpus == (*range(8), *range(32, 40), 0)


@pytest.mark.parametrize(("rank", "size", "threads"), [(2, 2, None), (-1, 2, None), (0, 0, None), (0, 1, 0)])
def test_what_cannot_be_placed_is_refused(tmp_path: Path, rank: int, size: int, threads: int | None) -> None:
    topology = read_topology(lay_out("epyc_1_socket", tmp_path), tmp_path)
    with pytest.raises(ValueError, match="must be in"):
        place(topology, rank, size, threads)
