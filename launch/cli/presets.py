"""The presets in configs/: models, and the choices of the other groups."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def choices(group: str, folders: Sequence[Path] = (CONFIGS,)) -> list[str]:
    """Return the names to which a group such as models (the presets) can be set."""
    return sorted(path.stem for folder in folders for path in (folder / group).glob("*.yaml"))


def presets() -> list[str]:
    """Return the names of the model presets."""
    return choices("models")


def load_preset(name: str) -> dict[str, Any]:
    """Return what a preset holds: `model`, `shape` (the fields of a config.json), maybe `sampling`."""
    values = yaml.safe_load((CONFIGS / "models" / f"{name}.yaml").read_text())
    assert isinstance(values, dict)
    return values
