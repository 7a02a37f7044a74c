"""What the benchmarks share: options, the machine they ran on, percentiles, and the JSON line at the end."""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from phalanx.engine.config import unknown_name
from phalanx.engine.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def read_options(kind: type[T], arguments: Sequence[str]) -> T:
    """key=value arguments as an instance of the dataclass `kind`; an unknown or ill-typed one ends the program."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    try:
        for argument in arguments:
            if argument.partition("=")[0] not in names:
                raise ConfigError(unknown_name("option", argument.partition("=")[0], names))
        options = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(list(arguments)))
        )
    except (ConfigError, OmegaConfBaseException) as error:
        sys.exit(str(error).splitlines()[0])
    assert isinstance(options, kind)
    return options


def model_folder(name: str) -> str:
    """A folder as it is; for a preset of configs/models, a random checkpoint of its shape, made once."""
    from phalanx.launch.presets import load_preset, presets
    from phalanx.launch.random_model import make_random_model

    if name not in presets():
        return name
    return str(make_random_model(ROOT / "models" / name.replace("_", "-"), load_preset(name)["shape"]))


def random_prompts(requests: int, tokens: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Prompts of seeded random token ids."""
    rng = random.Random(seed)
    low, high = min(100, vocabulary // 2), min(20000, vocabulary - 1)
    return [[rng.randint(low, high) for _ in range(tokens)] for _ in range(requests)]


def percentiles(values: Sequence[float], digits: int = 2) -> dict[str, float]:
    """p50, p95 and p99 by the nearest rank; zeros for no values."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], digits) if ordered else 0.0

    return {"p50": at(0.50), "p95": at(0.95), "p99": at(0.99)}


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1] if Path("/proc/meminfo").exists() else "0"
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "memory_gib": round(int(memory) / 2**20, 1),
    }


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    import torch
    import transformers
    from phalanx import __version__

    return {
        "phalanx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finish(result: dict[str, Any], out: str | None) -> None:
    """Print the JSON line a benchmark ends with, and keep it in `out` if that is named."""
    line = json.dumps({**result, "machine": machine(), "versions": versions()})
    print(line)
    if out:
        Path(out).write_text(line + "\n")
