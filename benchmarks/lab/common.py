"""What the benchmarks share: options, models, the machine they ran on, percentiles, the JSON line at the end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from omegaconf.errors import OmegaConfBaseException
from phalanx import __version__
from phalanx.engine.config import unknown_name
from phalanx.engine.errors import ConfigError, PhalanxError
from phalanx.launch.cli.schema import from_words

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """key=value arguments as an instance of the dataclass `kind`. Raises ConfigError for a wrong name or type."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in names:
            raise ConfigError(unknown_name("option", name, names))
        if not equals:
            raise ConfigError(f"{argument!r} has no value; write {name}=VALUE")
    try:
        return from_words(kind, arguments)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def check_writable(name: str, path: str | Path | None) -> None:
    """Raise ConfigError for the file of an option that cannot be written: before anything is measured for it."""
    if path is None:
        return
    try:
        is_new = not os.path.lexists(path)
        with open(path, "ab"):
            pass
        if is_new:
            os.unlink(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}={path} cannot be written: {getattr(error, 'strerror', error)}") from error


def model_folder(model: str | None, preset: str) -> Path:
    """The folder `model`, or without one a random checkpoint of the shape of a preset, made where it is missing."""
    if model is not None:
        return Path(model)
    from phalanx.launch.get_model import load_shape
    from phalanx.launch.model_files.random_model import make_random_model

    return make_random_model(ROOT / "models" / preset.replace("_", "-"), load_shape(preset))


def significant(value: float, digits: int) -> float:
    """The value with so many significant digits, by which small ones are as exact as large ones."""
    return float(f"{value:.{digits}g}")


def percentiles(values: Sequence[float], digits: int) -> dict[str, float] | None:
    """p50, p95 and p99 by the nearest rank, the ceil(share * count)-th smallest; None of no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share}": round(ordered[math.ceil(share * len(ordered) / 100) - 1], digits) for share in (50, 95, 99)}


def machine() -> dict[str, Any]:
    """Processor, cores this process may use and memory, of a Linux machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Return the versions of the software that decides the figures."""
    others = {name: version(name) for name in ("torch", "transformers")}
    return {"phalanx": __version__, "python": platform.python_version(), **others}


def run(kind: type[T], benchmark: Callable[[T], dict[str, Any]]) -> None:
    """A benchmark's program: its options from the command line; its result, completed, as the last line printed.

    The file that an option `out` names gets the same line. Bad input ends the program with a message. A program that
    is told to end (SIGTERM, or Ctrl-C) ends what it has started first.
    """
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, _: sys.exit(128 + number))
    try:
        options = read_options(kind, sys.argv[1:])
        for name in ("out", "plot"):
            check_writable(name, getattr(options, name, None))
        load_before = round(os.getloadavg()[0], 2)  # shows whether others were using the machine
        result = benchmark(options)
    except PhalanxError as error:
        sys.exit(f"error: {error}")
    host = {**machine(), "load_before": load_before}
    line = json.dumps({**result, "settings": settings(options), "machine": host, "versions": versions()})
    print(line, flush=True)
    out = getattr(options, "out", None)
    if out is not None:
        Path(out).write_text(line + "\n")


def settings(options: Any) -> dict[str, Any]:
    """All options; a path is cut to its last part: where things lie on a machine concerns nobody else."""
    values = dataclasses.asdict(options)
    values.pop("out", None)
    named = {name: values[name] for name in ("model", "input", "plot") if values.get(name) is not None}
    absolute = {name: value for name, value in values.items() if isinstance(value, str) and os.path.isabs(value)}
    return {**values, **{name: Path(value).name for name, value in {**named, **absolute}.items()}}
