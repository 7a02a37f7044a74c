"""Where a model's files are: a folder as it is, or a hub name looked up in the local cache, then on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...parallel.loading.json_files import LoadError, read_json_object, shown
from ..errors import ConfigError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
CONNECT_TIMEOUT_S = 5.0


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """Return the folder of `name`, a path or `organisation/model`; from the hub with its `weights`, if they are needed.

    Raises ConfigError within seconds if it is neither on this machine nor to be fetched.
    """
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise ConfigError(
            f"model={name!r} is a file; give a model folder (a GGUF file is converted with "
            f"`python -m phalanx.launch.get_model gguf=FILE out=DIR`)"
        )
    if not _HUB_NAME.fullmatch(name):
        raise _no_name(name)
    return _from_hub(name, weights)


def _no_name(name: str) -> ConfigError:
    return ConfigError(f"model={shown(name)} is no folder here, and no hub name (organisation/model) either")


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    # A whole snapshot in the cache needs no network.
    where = "is not in the local hub cache"
    try:
        cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=_FILES))  # nosec B615 # fetches nothing
    except LocalEntryNotFoundError:
        pass  # the hub is asked
    except HFValidationError as error:  # as for ./folder, which is not there
        raise _no_name(name) from error
    except OSError as error:  # somebody else's cache, say, which this user may not read
        where = f"cannot be looked up in the local hub cache ({error})"
    else:
        missing = _missing_file(cached, weights)
        if missing is None:
            return cached
        where = f"is in the local hub cache without {missing}"
    try:
        # One request with a time limit first: snapshot_download alone retries for minutes without a network.
        HfApi().model_info(name, timeout=CONNECT_TIMEOUT_S)
        # Files of data alone, read as anybody's: the latest are what model=NAME asks for.
        return Path(snapshot_download(name, allow_patterns=_FILES))  # nosec B615 # no code among them
    except Exception as error:
        raise ConfigError(
            f"model={name!r} {where} and cannot be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no answer'}); set model= to a "
            f"local folder, or make one with `python -m phalanx.launch.get_model`"
        ) from error


def _missing_file(folder: Path, weights: bool) -> str | None:
    """Return the first file that a cached snapshot lacks; None if it is whole.

    A snapshot holds what somebody has asked for: after a tokenizer alone was loaded, the weights are not there.
    """
    if not (folder / "config.json").exists():
        return "config.json"
    if not weights:
        return None
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None if any(folder.glob("*.safetensors")) else "model.safetensors"
    try:
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        return next((name for name in names if not (folder / str(name)).exists()), None)
    except (LoadError, OSError, KeyError, AttributeError, TypeError):
        return None  # a damaged index is the checkpoint's reader to name
