"""How much memory this host has left, within the limits of the control groups (containers) that this process is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class _Files:
    """Names of a control group's files: its limit and its use, and the field of memory.stat that can be reclaimed."""

    limit: str
    used: str
    reclaimable: str


V2 = _Files("memory.max", "memory.current", "inactive_file")
V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes that a new process could use on this host now.

    The machine's MemAvailable, or what is left below the limit of a control group of version 1 or 2, if that is less.
    `root` is the folder in which /proc and /sys are looked up.
    """
    return max(0, min([_of_machine(root), *_of_groups(root)]))


def _of_machine(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group that limits this process: its own, and those that hold it."""
    mount = root / "sys/fs/cgroup"
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            yield from _along(mount, path, V2)
        elif "memory" in controllers.split(","):
            yield from _along(mount / "memory", path, V1)


def _along(mount: Path, path: str, files: _Files) -> Iterator[int]:
    """Yield the bytes left in the group at `path` and in those above it.

    In a container the mount may be its own group already: the mount itself then has the group's files, and the folders
    that `path` names are absent.
    """
    folder = mount
    for name in ("", *(name for name in path.split("/") if name not in ("", ".."))):
        folder = folder / name
        limit = folder / files.limit
        used = folder / files.used
        if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
            yield int(text) - int(used.read_text()) + _reclaimable(folder / "memory.stat", files.reclaimable)


def _reclaimable(stat: Path, field: str) -> int:
    """Return the bytes of cached files, such as a checkpoint's, that count as used but can be reclaimed."""
    for line in stat.read_text().splitlines() if stat.exists() else ():
        name, _, value = line.partition(" ")
        if name == field:
            return int(value)
    return 0
