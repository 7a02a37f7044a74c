"""The configuration's schema, derived from EngineConfig and SamplingParams: one source of names, types, meanings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import yaml
from omegaconf import MISSING, OmegaConf

from ...engine.config import EngineConfig
from ...engine.errors import ConfigError
from ...engine.protocol.sampling_params import SamplingParams

T = TypeVar("T")

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclasses.dataclass
class Keys:
    """The keys of a program besides the engine's configuration. Programs add some, each followed by its meaning."""

    shape: dict[str, Any] | None = None
    """A model's dimensions, as the presets of configs/models state them for `plan` and `get_model`."""
    bench: dict[str, Any] | None = None
    """The load of a benchmark, as the presets of configs/bench state it."""

    @classmethod
    def included(cls) -> tuple[type, ...]:
        """Dataclasses of settings whose fields are keys of the program too; Job.settings() makes them."""
        return ()


def field_docs(owner: type) -> dict[str, str]:
    """Return the meaning of every field of a class, inherited ones included: the string literal that follows it."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if base.__module__ in ("builtins", "msgspec", "msgspec._core"):
            continue
        definition = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def key_docs(keys: type[Keys]) -> dict[str, str]:
    """Return every dotted key of a program's configuration with its meaning, the program's own keys first."""
    docs = field_docs(keys)
    for included in keys.included():
        docs |= field_docs(included)
    docs |= {name: text for name, text in field_docs(EngineConfig).items() if name != "sampling"}
    return docs | {f"sampling.{name}": text for name, text in field_docs(SamplingParams).items()}


def schema_of(keys: type[Keys]) -> type:
    """Make a structured config for OmegaConf: EngineConfig's fields, the sampling group and the program's own keys."""
    hints = typing.get_type_hints(EngineConfig)
    fields: list[Any] = []
    for field in dataclasses.fields(EngineConfig):
        if field.name == "sampling":
            fields.append(("sampling", _sampling_schema(), dataclasses.field(default_factory=_sampling_schema())))
        elif field.default is dataclasses.MISSING:
            fields.append((field.name, hints[field.name], MISSING))
        elif field.name == "kv_memory":
            fields.append((field.name, Any, field.default))  # a number or a size such as 4GiB: parse_size decides
        else:
            fields.append((field.name, _omegaconf_type(hints[field.name]), field.default))

    for owner in (keys, *keys.included()):
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            fields.append((field.name, _omegaconf_type(hints[field.name]), _default_of(field)))
    return dataclasses.make_dataclass("Configuration", fields)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default in a form that dataclasses take."""
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    if isinstance(field.default, tuple):
        default = list(field.default)
        return dataclasses.field(default_factory=lambda: list(default))
    return field.default


@functools.lru_cache
def _sampling_schema() -> type:
    hints = typing.get_type_hints(SamplingParams)
    fields: list[Any] = []
    for field in msgspec.structs.fields(SamplingParams):
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        hint = _omegaconf_type(hints[field.name])
        if isinstance(default, list):
            # A single stop string may replace the list: SamplingParams decides.
            fields.append((field.name, Any, dataclasses.field(default_factory=list)))
        elif field.name == "logit_bias":
            fields.append((field.name, Any, default))  # OmegaConf cannot merge a mapping into a typed None
        else:
            fields.append((field.name, hint, default))
    return dataclasses.make_dataclass("sampling", fields)


def _omegaconf_type(hint: Any) -> Any:
    """Return `hint` in a form that OmegaConf knows: it has no tuples of any length."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is tuple:
        return types.GenericAlias(list, arguments[:1])
    if origin in (types.UnionType, typing.Union):
        return typing.Union[tuple(_omegaconf_type(argument) for argument in arguments)]  # noqa: UP007
    return hint


def from_words(kind: type[T], words: Sequence[str]) -> T:
    """Return a dataclass `kind` with the values of key=value words, those of keys of text as they are written.

    Raises ConfigError for a word that cannot be read, OmegaConfBaseException for a value of another type.
    """
    hints = typing.get_type_hints(kind)
    text: dict[str, str] = {}
    others: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        text.pop(name, None)
        if hints[name] in (str, str | None) and value != "null":
            text[name] = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
            continue
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except yaml.YAMLError as error:
            raise ConfigError(f"{word!r} cannot be read: {name} must be {describe_type(hints[name])}") from error
        others |= parsed

    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), others, text))
    assert isinstance(options, kind)
    return options


def describe_type(hint: Any) -> str:
    """Describe a type in a user's words."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is type(None) else describe_type(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list such as [{'0.5, 0.5' if arguments[0] is float else 'a, b'}]"
    if origin is dict:
        return "a mapping such as {1: 2.0}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, "any value")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 4GiB, 512 MiB, 2GB or 1e9. Raises ConfigError."""
    match = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigError(f"{text!r} is not a size: write bytes, or a number with one of {', '.join(_UNITS)[2:]}")
    try:
        return int(float(match[1]) * units[match[2].lower()])
    except ValueError:
        raise ConfigError(f"{text!r} is not a size: {match[1]!r} is not a number") from None
