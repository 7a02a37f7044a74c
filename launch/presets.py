"""The models that configs/models knows by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "configs" / "models"


def presets() -> list[str]:
    """Their names."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """What a preset holds: `model`, `shape` (the fields of a config.json), maybe `sampling`."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(values, dict)
    return values
