"""--help: every key of a program, its default and its meaning, from the schema."""

from __future__ import annotations

import textwrap
from typing import Any

from omegaconf import OmegaConf

from .compose import GROUPS
from .presets import choices
from .schema import Keys, key_docs, schema_of

_WIDTH = 110


def help_text(keys: type[Keys], program: str, about: str) -> str:
    """Return the text of --help."""
    defaults: Any = OmegaConf.structured(schema_of(keys))
    docs = key_docs(keys)
    presets_only = {name: docs.pop(name) for name in ("shape", "bench")}
    needed = "engines=[...]" if "engines" in docs else "model=..."
    lines = [f"{program}: {about}", "", f"usage: python -m {program} {needed} [key=value ...]", ""]

    for name, meaning in (docs | presets_only).items():
        if name in ("model", "sampling.max_tokens", "shape"):
            lines.append("")
        missing = OmegaConf.is_missing(defaults, name)
        default = "" if missing or name in presets_only else f" [{_shown(OmegaConf.select(defaults, name))}]"
        lines += _entry(f"{name}{default}", meaning)

    lines += ["", "presets, each chosen by name (values on the command line win over theirs):"]
    for group in GROUPS:
        lines += _entry("model" if group == "models" else group, ", ".join(choices(group)))

    lines += ["", "Hydra's own flags: --cfg job prints the composed configuration; --hydra-help lists all."]
    return "\n".join(line for line, before in zip(lines, ["x", *lines], strict=False) if line or before)


def _entry(title: str, text: str) -> list[str]:
    return [f"  {title}", *textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
