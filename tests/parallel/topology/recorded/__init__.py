"""What Linux says of the CPUs of several machines, as files that tests lay out like sysfs."""

from __future__ import annotations

from pathlib import Path

from phalanx.parallel.topology.topology import parse_cpu_list

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.txt"))


def lay_out(name: str, root: Path) -> tuple[int, ...]:
    """Write the files of machine `name` below `root`, which then is as /sys/devices/system there. The allowed CPUs."""
    lines = (Path(__file__).parent / f"{name}.txt").read_text().splitlines()
    entries = dict(line.split(":", 1) for line in lines if not line.startswith("#"))
    allowed = parse_cpu_list(entries.pop("allowed"))
    for path, text in entries.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text.strip() + "\n")
    return allowed
