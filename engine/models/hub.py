"""Where a model's files are: a folder as it is, or a hub name looked up in the local cache, then on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
CONNECT_TIMEOUT_S = 5.0


def resolve_model(name: str) -> Path:
    """The folder of `name`, a path or `organisation/model`.

    Raises ConfigError within seconds if it is neither there nor to be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise ConfigError(
            f"model={name!r} is a file; give a model folder (a GGUF file is converted with "
            f"`python -m phalanx.launch.get_model gguf=FILE out=DIR`)"
        )
    if not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"model={name!r} is no folder here, and no hub name (organisation/model) either")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=_FILES))
        if (cached / "config.json").exists():
            return cached
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    try:
        # One request with a time limit first: snapshot_download alone retries for minutes without a network.
        HfApi().model_info(name, timeout=CONNECT_TIMEOUT_S)
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:
        raise ConfigError(
            f"model={name!r} is not in the local hub cache and cannot be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}); set model= to a "
            f"local folder, or make one with `python -m phalanx.launch.get_model`"
        ) from error
