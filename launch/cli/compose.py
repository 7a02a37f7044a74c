"""From command-line words to a checked configuration, with one clear line for whatever is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...engine.config import EngineConfig, unknown_name
from ...engine.errors import ConfigError
from ..ranks.rank_info import RankInfo
from .presets import CONFIGS, choices
from .schema import Keys, describe_type, key_docs, parse_size, schema_of

CONFIG_NAME = "config"
HYDRA_VERSION_BASE = "1.3"
GROUPS = ("engine", "runtime", "models", "bench")
# In values of these keys even ${...} is text.
_TEXT = ("prompt", "system", "api_key", "admin_key")

# What these keys hold is shown nowhere.
SECRETS = ("api_key", "admin_key")
REDACTED = "[redacted]"

K = TypeVar("K", bound=Keys)
S = TypeVar("S")


@dataclass(frozen=True)
class Job(Generic[K]):
    """What one run of a program was asked to do."""

    rank_info: RankInfo
    keys: K
    values: dict[str, Any]
    """Every key of the configuration, EngineConfig's too, as plain data."""

    def settings(self, kind: type[S]) -> S:
        """Return one of the settings that the keys include. Raises ConfigError for a value that cannot be."""
        values = {field.name: self.values[field.name] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def engine_config(self) -> EngineConfig:
        """Return the engine's configuration. Raises ConfigError, or InvalidRequest for sampling.*, naming the key."""
        names = [field.name for field in dataclasses.fields(EngineConfig)]
        values = {name: self.values[name] for name in names}
        if values["model"] is None:
            names_known = ", ".join(choices("models"))
            raise ConfigError(
                f"model is missing: give model=FOLDER, model=organisation/name, or a preset: {names_known}"
            )
        _check_preset_name(values["model"])
        if isinstance(values["kv_memory"], str):
            values["kv_memory"] = _kv_memory(values["kv_memory"])
        return EngineConfig.from_dict(values)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments by Hydra's own parser. Raises ConfigError for an unknown flag."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message} (write key=value; --help lists the keys, --hydra-help the flags)")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(list(arguments))


def prepare_arguments(arguments: Sequence[str], keys: type[Keys], rank_info: RankInfo) -> list[str]:
    """Rewrite the arguments for Hydra: presets become group choices, text is quoted, torchrun sets ranks.

    Raises ConfigError for a name that is no key, or ranks other than torchrun started.
    """
    config_dir = parse_arguments(arguments).config_dir
    folders = [CONFIGS, *([Path(config_dir)] if config_dir else [])]
    literal = [name for name in key_docs(keys) if type_of(name, keys) in (str, str | None)]
    prepared = [_rewrite(argument, choices("models", folders), literal) for argument in arguments]

    # Every override must name a key or a choice that exists.
    names = [*key_docs(keys), *GROUPS]
    given: dict[str, Any] = {}
    overrides = parse_arguments(prepared).overrides
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{text!r} cannot be read as key=value: {str(error).splitlines()[0]}") from error

        name = override.key_or_group
        if name.startswith(("hydra.", "hydra/")):
            continue
        if name not in names and not name.startswith(("shape.", "bench.", "sampling.logit_bias.")):
            raise ConfigError(unknown_name("configuration key", name, names))
        if override.is_delete() and name not in GROUPS:
            raise ConfigError(f"{text!r} takes a key away, and every key has a value: write {name}=VALUE")
        given[name] = override.value()
        if name in GROUPS and given[name] is not None and given[name] not in choices(name, folders):
            raise ConfigError(unknown_name(f"choice of {name}:", str(given[name]), choices(name, folders)))

    if rank_info.launched:
        if given.get("ranks", rank_info.size) != rank_info.size:
            raise ConfigError(
                f"ranks={given['ranks']}, but torchrun started {rank_info.size}: leave ranks out, or start as many"
            )
        if "ranks" not in given:
            # Hydra's parser wants all overrides side by side.
            prepared.insert(prepared.index(overrides[0]) if overrides else 0, f"ranks={rank_info.size}")
    return prepared


def compose(arguments: Sequence[str], keys: type[K], rank_info: RankInfo) -> Job[K]:
    """Compose prepared arguments. Raises ConfigError naming the key, its value and what it may be."""
    register_schema(keys)
    parsed = parse_arguments(arguments)
    # A folder added by --config-dir is searched here as Hydra will search it.
    extra = [f"hydra.searchpath=[{Path(parsed.config_dir).resolve()}]"] if parsed.config_dir else []
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base=HYDRA_VERSION_BASE):
            config = hydra.compose(parsed.config_name or CONFIG_NAME, overrides=[*parsed.overrides, *extra])
        return job_of(config, keys, rank_info)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, keys)) from error


def redact(arguments: Sequence[str], job: Job[K]) -> list[str]:
    """Return the arguments for a command that prints the configuration: without the secrets that are set."""
    hidden = [f"{name}={_quote(REDACTED)}" for name in SECRETS if job.values.get(name) is not None]
    shown = [argument for argument in arguments if argument.partition("=")[0] not in SECRETS]
    return [*shown, *hidden]


def job_of(config: DictConfig, keys: type[K], rank_info: RankInfo) -> Job[K]:
    """Turn a composed configuration into plain data."""
    values = {str(name): None if OmegaConf.is_missing(config, name) else _plain(config[name]) for name in config}
    own = keys(**{field.name: values[field.name] for field in dataclasses.fields(keys)})
    return Job(rank_info, own, values)


def register_schema(keys: type[Keys]) -> None:
    """Register a program's keys with Hydra."""
    ConfigStore.instance().store("schema", schema_of(keys))


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _rewrite(argument: str, presets: list[str], literal: list[str]) -> str:
    """Rewrite one word of the command line: model=PRESET as a group choice, values of keys of text quoted."""
    name, separator, value = argument.partition("=")
    if not separator or not value or value == "null":
        return argument
    if name == "model" and value in presets:
        return f"models={value}"
    if name not in literal or (value[0] in "'\"" and value[0] == value[-1] and len(value) > 1):
        return argument
    if name in _TEXT:
        value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
    return f"{name}={_quote(value)}"


def _quote(text: str) -> str:
    """Return Hydra's quoted form of a text: backslashes count only before a quote, where each is written twice."""
    escaped = re.sub(r"(\\*)'", r"\1\1\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - trailing :]}'"


def _kv_memory(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return float(parse_size(text))
    except ConfigError as error:
        raise ConfigError(f"kv_memory={text!r} must be bytes (4GiB), or a fraction in (0, 1]: {error}") from None


def _check_preset_name(model: str) -> None:
    """Raise ConfigError for a bare word that is neither a folder nor a file: it was meant to be a preset."""
    if model and "/" not in model and not os.path.exists(model):
        raise ConfigError(unknown_name("model folder or preset", model, choices("models")))


def _explain(error: Exception, keys: type[Keys]) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    name = re.sub(r"\[.*", "", cause.full_key or "") if cause is not None else ""

    preset = re.match("In '[^']+': ", str(error))
    where = preset[0] if preset else ""
    docs = key_docs(keys)
    if name in docs:
        reason = str(cause).splitlines()[0]
        return f"{where}{name} must be {describe_type(type_of(name, keys))}: {reason}. Its meaning: {docs[name]}"
    if name:
        return where + unknown_name("configuration key", name, list(docs))
    return " ".join(str(error).split())


def type_of(name: str, keys: type[Keys]) -> Any:
    owner: Any = schema_of(keys)
    hint: Any = None
    for part in name.split("."):
        hint = typing.get_type_hints(owner)[part]
        owner = hint
    return hint
