"""Objects that say by their `type` what they are: items, blocks and parts, each checked by a schema of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..http.errors import ApiError, invalid
from ..http.json_body import shown, to_struct

Kinds = Mapping[str, type[msgspec.Struct]]


def typed(values: dict[str, Any], kinds: Kinds, path: str, why: str, default: str | None = None) -> msgspec.Struct:
    """The struct of `kinds` that `values` describe; a null is as good as no value.

    `path` is where the object is in the request, `why` what to say of a type that is not in `kinds`, `default` the type
    of an object that has none. Raises ApiError (400) with the path of the field that is wrong.
    """
    kind = values.get("type")
    if kind is None:
        kind = default
    if kind is None:
        raise invalid(f"{path}.type is required", f"{path}.type", "missing_required_parameter")
    if not isinstance(kind, str) or kind not in kinds:
        raise invalid(f"{path}.type={shown(kind)} is not supported: {why}", f"{path}.type", "unsupported_value")
    rest = {name: value for name, value in values.items() if name != "type"}
    with at(path):
        return to_struct(rest, kinds[kind])


def parts_text(content: str | list[dict[str, Any]], kinds: Kinds, path: str, why: str) -> str | list[dict[str, str]]:
    """The content of a message as chat has it: a text, or parts that are texts. Raises ApiError for any other part."""
    if isinstance(content, str):
        return content
    parts = [typed(part, kinds, f"{path}[{index}]", why) for index, part in enumerate(content)]
    return [{"type": "text", "text": text_of(part)} for part in parts]


def text_of(part: msgspec.Struct) -> str:
    """The text of a part, which is its only required field."""
    return str(getattr(part, part.__struct_fields__[0]))


class at:
    """Within this block the paths of ApiErrors are in the object at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Add the path to an error that leaves the block."""
        if not isinstance(error, ApiError) or error.status != 400:
            return
        info = error.info
        inner = info.param
        info.param = f"{self._path}.{inner}" if inner else self._path
        if inner and info.message.startswith(inner):
            info.message = info.message.replace(inner, info.param, 1)
        else:
            info.message = f"{info.param}: {info.message}"


def rename(error: ApiError, names: Mapping[str, str]) -> None:
    """Give an error the path that its field has in another request.

    `names` has that path for fields and beginnings of paths, such as messages[3] -> input[5]; the longest one that
    fits is taken.
    """
    param = error.info.param
    if not param:
        return
    fitting = [name for name in names if param == name or param.startswith((f"{name}.", f"{name}["))]
    if not fitting:
        return
    old = max(fitting, key=len)
    error.info.param = names[old] + param[len(old) :]
    if param in error.info.message:
        error.info.message = error.info.message.replace(param, error.info.param, 1)
    elif old in error.info.message:
        error.info.message = error.info.message.replace(old, names[old], 1)


def check_count(items: list[Any], most: int, setting: str, path: str) -> None:
    """Raise ApiError for a list that is longer than a setting allows."""
    if len(items) > most:
        raise invalid(f"{path} has {len(items)} entries; it may have at most {most} ({setting})", path)
