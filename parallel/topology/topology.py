"""The CPUs that a process may use, as Linux describes them in sysfs: physical cores and NUMA nodes.

The files are those of Documentation/admin-guide/cputopology.rst and Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys/devices/system")

_NEAR = 10
_FAR = 20
"""Distances of a node to itself and to another where firmware gives none (the kernel's LOCAL_ and REMOTE_DISTANCE)."""


@dataclass(frozen=True)
class Node:
    """One NUMA node: memory, and the CPUs that reach it fastest."""

    number: int
    """The number that Linux gives it; numbers may have gaps."""
    cores: tuple[tuple[int, ...], ...]
    """The allowed CPUs of each physical core, hyperthreads of one core together; none where a node is memory alone
    (HBM, CXL) or where its CPUs are offline or not allowed."""
    has_memory: bool = True

    @property
    def cpus(self) -> tuple[int, ...]:
        """All its allowed CPUs, core by core."""
        return tuple(cpu for core in self.cores for cpu in core)


@dataclass(frozen=True)
class Topology:
    """The NUMA nodes of this host, with the CPUs that may be used."""

    nodes: tuple[Node, ...]
    """By number."""
    distances: tuple[tuple[int, ...], ...]
    """Distances from each of `nodes` to each, 10 for itself (ACPI's SLIT)."""
    problem: str = ""
    """What could not be read, and what is assumed instead; "" if nothing is missing."""

    @property
    def cores(self) -> int:
        """Physical cores with an allowed CPU."""
        return sum(len(node.cores) for node in self.nodes)

    @property
    def nodes_with_cpus(self) -> int:
        """Nodes with an allowed CPU."""
        return sum(bool(node.cores) for node in self.nodes)


def read_topology(allowed: Collection[int], root: Path = SYSFS) -> Topology:
    """The topology that sysfs at `root` has of the CPUs `allowed` to this process (os.sched_getaffinity), in any order.

    Where sysfs does not show NUMA nodes, or not for all of these CPUs, all are taken for one node; where it does not
    show which CPUs share a core, each is taken for a core. `problem` then names it. Raises ValueError without any CPU.
    """
    if not allowed:
        raise ValueError("no CPU is allowed to this process; at least one must be")
    cores, core_problem = _read_cores(sorted(allowed), root / "cpu")
    try:
        nodes, distances = _read_nodes(cores, root / "node")
    except (OSError, ValueError) as error:
        problem = f"all CPUs are taken for one NUMA node: {error}"
        return Topology((Node(0, cores),), ((_NEAR,),), "; ".join(filter(None, (problem, core_problem))))
    return Topology(nodes, distances, core_problem)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The numbers of a list such as "0-3,8,10-11", ascending; "" is an empty one. Raises ValueError for other text."""
    numbers: set[int] = set()
    for piece in text.strip().split(",") if text.strip() else []:
        first, dash, last = piece.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"{text.strip()!r} is no list of numbers such as 0-3,8")
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(numbers))


def format_cpu_list(cpus: Iterable[int]) -> str:
    """The shortest text that parse_cpu_list() reads as these numbers."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _read_cores(allowed: list[int], folder: Path) -> tuple[tuple[tuple[int, ...], ...], str]:
    """The allowed CPUs of each core, in the order of their first, and what is assumed."""
    cores: dict[int, tuple[int, ...]] = {}
    problem = ""
    for cpu in allowed:
        if cpu in cores:
            continue
        try:
            together = set(_siblings(folder / f"cpu{cpu}" / "topology")) & set(allowed) - set(cores)
        except (OSError, ValueError) as error:
            together = set()
            problem = problem or f"CPUs are taken for cores of their own: {error}"
        core = tuple(sorted(together | {cpu}))
        cores.update(dict.fromkeys(core, core))
    return tuple(sorted(set(cores.values()))), problem


def _siblings(folder: Path) -> tuple[int, ...]:
    """The CPUs of one core. Kernels before 5.3 know the file by its other name only."""
    file = folder / "core_cpus_list"
    return parse_cpu_list((file if file.exists() else folder / "thread_siblings_list").read_text())


def _read_nodes(
    cores: tuple[tuple[int, ...], ...], folder: Path
) -> tuple[tuple[Node, ...], tuple[tuple[int, ...], ...]]:
    """The nodes and their distances. Raises OSError or ValueError if a file is missing, or a core's node is."""
    numbers = sorted(int(path.name[4:]) for path in folder.glob("node[0-9]*"))
    if not numbers:
        raise ValueError(f"there is no {folder}/node*")

    owners: dict[int, int] = {}
    for number in numbers:
        owners.update(dict.fromkeys(parse_cpu_list((folder / f"node{number}" / "cpulist").read_text()), number))
    homeless = [cpu for core in cores for cpu in core if cpu not in owners]
    if homeless:
        raise ValueError(f"no {folder}/node*/cpulist names the allowed CPUs {format_cpu_list(homeless)}")

    # Linux 3.8 and later list the nodes that have memory; without the list every node is taken to have some.
    file = folder / "has_memory"
    with_memory = parse_cpu_list(file.read_text()) if file.exists() else tuple(numbers)
    nodes = tuple(
        Node(number, tuple(core for core in cores if owners[core[0]] == number), number in with_memory)
        for number in numbers
    )
    return nodes, tuple(_distances(numbers, index, folder) for index in range(len(numbers)))


def _distances(numbers: list[int], index: int, folder: Path) -> tuple[int, ...]:
    """Distances from the node at `index` of `numbers` to each. Raises ValueError if the file has more or fewer."""
    file = folder / f"node{numbers[index]}" / "distance"
    if not file.exists():
        return tuple(_NEAR if number == numbers[index] else _FAR for number in numbers)
    distances = tuple(int(text) for text in file.read_text().split())
    if len(distances) != len(numbers):
        raise ValueError(f"{file} gives {len(distances)} distances for {len(numbers)} nodes")
    return distances
