"""The CPUs that each rank of a host computes on: ranks keep to a NUMA node, a thread has a physical core to itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .topology import Node, Topology, format_cpu_list

Core = tuple[int, ...]
"""The CPUs of one physical core."""


@dataclass(frozen=True)
class Placement:
    """The CPUs of one rank."""

    cpus: tuple[int, ...]
    """One for each thread that computes, in the threads' order."""
    share: tuple[int, ...]
    """All CPUs of this rank, ascending: those above and idle hyperthreads, on which its other threads may run."""
    nodes: tuple[int, ...]
    """The NUMA nodes of the share."""
    memory_nodes: tuple[int, ...]
    """The nodes of memory that a thread of the share touches first: `nodes`, or the nearest to those that have none."""

    def __str__(self) -> str:
        nodes = f"NUMA node{'s' if len(self.nodes) > 1 else ''} {format_cpu_list(self.nodes)}"
        memory = "" if self.memory_nodes == self.nodes else f", memory of node {format_cpu_list(self.memory_nodes)}"
        return f"{len(self.cpus)} thread(s) on CPUs {format_cpu_list(self.cpus)} of {nodes}{memory}"


def place(topology: Topology, rank: int, size: int, threads: int | None = None) -> Placement:
    """The CPUs of rank `rank` of the `size` on this host, with `threads` threads (None: one for each core it gets).

    * With as many ranks as nodes or more, each rank stays inside one node. Each next rank goes to the node that then
      has the most cores for each of its ranks (D'Hondt's rule, which makes the smallest share as large as can be: the
      ranks of a group wait for the slowest). Neighbouring ranks are on the same or on adjacent nodes.
    * With fewer, each rank has whole adjacent nodes, as evenly as can be.
    * Ranks do not share a core unless there are more ranks than cores, nor a CPU unless there are more than CPUs.
    * A thread gets a core to itself, for hyperthreads share the units that multiply. More threads than cores take the
      cores' other hyperthreads, and more than CPUs start again from the first. Fewer are spaced out evenly, and keep to
      one node of several if they fit.

    Raises ValueError for a rank outside 0 to size - 1, or threads below 1.
    """
    if not 0 <= rank < size or (threads is not None and threads < 1):
        raise ValueError(f"rank={rank} must be in [0, {size - 1}], and threads={threads} at least 1 or None")

    chain = _chain(topology)
    sizes = [len(node.cores) for node in chain]
    if size < len(chain):
        ends = _cut_evenly(sizes, size)
        first = ends[rank - 1] if rank else 0
        share = {node.number: list(node.cores) for node in chain[first : ends[rank]]}
    else:
        # Ranks are numbered along the chain: `rank` becomes its number inside the node at `index`.
        counts = _share_out(sizes, size)
        index = 0
        while rank >= counts[index]:
            rank -= counts[index]
            index += 1
        share = {chain[index].number: _part(chain[index].cores, rank, counts[index])}
    return _placement(topology, share, threads)


def _placement(topology: Topology, share: dict[int, list[Core]], threads: int | None) -> Placement:
    if threads is not None:
        roomy = [number for number, cores in share.items() if len(cores) >= threads]
        share = {number: share[number] for number in roomy[:1]} or share
    cores = [core for part in share.values() for core in part]

    if threads is None:
        threads = len(cores)
    if threads <= len(cores):
        cpus = [cores[i * len(cores) // threads][0] for i in range(threads)]
    else:
        depth = max(map(len, cores))
        every = [core[sibling] for sibling in range(depth) for core in cores if sibling < len(core)]
        cpus = [every[i % len(every)] for i in range(threads)]

    nodes = tuple(sorted(share))
    return Placement(
        cpus=tuple(cpus),
        share=tuple(sorted(cpu for core in cores for cpu in core)),
        nodes=nodes,
        memory_nodes=tuple(sorted({_memory_of(topology, number) for number in nodes})),
    )


def _chain(topology: Topology) -> list[Node]:
    """The nodes with CPUs, each followed by the nearest of those that are left; equally near ones by number."""
    left = {index for index, node in enumerate(topology.nodes) if node.cores}
    chain = [min(left)]
    while left := left - {chain[-1]}:
        distances = topology.distances[chain[-1]]
        chain.append(min(left, key=lambda index: (distances[index], index)))
    return [topology.nodes[index] for index in chain]


def _share_out(sizes: Sequence[int], ranks: int, least: int = 0) -> list[int]:
    """Ranks of each node or core of so many cores or CPUs, `least` and more, by D'Hondt's rule.

    Of equal quotients one with fewer ranks goes first, then the first.
    """
    counts = [least] * len(sizes)

    def merit(index: int) -> tuple[Fraction, int, int]:
        return Fraction(sizes[index], counts[index] + 1), -counts[index], -index

    for _ in range(ranks - sum(counts)):
        counts[max(range(len(sizes)), key=merit)] += 1
    return counts


def _part(cores: Sequence[Core], index: int, parts: int) -> list[Core]:
    """Part `index` of a node's cores: whole cores while there are enough, then a core's CPUs, then shared ones."""
    if parts <= len(cores):
        return list(cores[index * len(cores) // parts : (index + 1) * len(cores) // parts])
    cpus = [cpu for core in cores for cpu in core]
    if parts > len(cpus):
        return [(cpus[index % len(cpus)],)]

    # No rank has CPUs of two cores: it would have a thread on each, and the others of these cores would wait for it.
    counts = _share_out([len(core) for core in cores], parts, least=1)
    for core, count in zip(cores, counts, strict=True):
        if index < count:
            return [core[index * len(core) // count : (index + 1) * len(core) // count]]
        index -= count
    raise ValueError(f"part {index} of {parts} is none")


def _cut_evenly(sizes: Sequence[int], parts: int) -> list[int]:
    """Ends of `parts` runs of neighbours, none empty, whose sums have the least sum of squares."""
    # best[end]: the cost and the ends of the first runs, which hold the first `end` sizes.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    for part in range(1, parts + 1):
        best = {
            end: min(
                (cost + sum(sizes[start:end]) ** 2, [*ends, end]) for start, (cost, ends) in best.items() if start < end
            )
            for end in range(part, len(sizes) - parts + part + 1)
        }
    return best[len(sizes)][1]


def _memory_of(topology: Topology, number: int) -> int:
    """The node whose memory a thread on node `number` gets: its own, or the nearest that has memory."""
    index = next(index for index, node in enumerate(topology.nodes) if node.number == number)
    distances = topology.distances[index]
    with_memory = [other for other, node in enumerate(topology.nodes) if node.has_memory] or [index]
    nearest = min(with_memory, key=lambda other: (other != index, distances[other], other))
    return topology.nodes[nearest].number
