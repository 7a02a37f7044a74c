"""From a body's bytes to a request: strict JSON, then a struct; every refusal names the field and the value."""

from __future__ import annotations

import asyncio
import difflib
import gc
import itertools
import json
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from .errors import ApiError, invalid
from .neutral import without_neutral, without_nulls

Request = TypeVar("Request", bound=msgspec.Struct)

_INT_LOW, _INT_HIGH = -(2**63), 2**64 - 1
_INT_DIGITS = 300
"""Digits of a number without a fraction at most, so that it is a float's number, too."""
_LONG_NUMBER = re.compile(r"\d{19}")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_PATH = re.compile(r" - at `(?:key` in `)?\$\.?(.*)`$")
_UNKNOWN = re.compile(r"^Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(\w+)`")
_SHOWN_CHARS = 100
_MAX_DEPTH = 64

LONG_BODY_BYTES = 256 * 1024
"""Length of a body from which it is parsed on a thread: a shorter one takes a few milliseconds."""
# One at a time: what parsing takes beside the bodies themselves, which are counted, is bounded so.
_long_bodies = ThreadPoolExecutor(1, "phalanx-long-bodies")


async def read_struct(body: bytes, kind: type[Request], refused: Mapping[str, str] | None = None) -> Request:
    """The request in a body, as parse_json() and to_struct() make it; a long one is parsed beside the event loop."""
    if len(body) < LONG_BODY_BYTES:
        return to_struct(parse_json(body), kind, refused)
    return await asyncio.get_running_loop().run_in_executor(_long_bodies, _parse_long, body, kind, refused)


def _parse_long(body: bytes, kind: type[Request], refused: Mapping[str, str] | None) -> Request:
    # Millions of new objects would have the garbage collector look at all of them again and again, and each time
    # nothing else of this process would run.
    gc.disable()
    try:
        return to_struct(parse_json(body, yielding=True), kind, refused)
    finally:
        gc.enable()


def parse_json(body: bytes, yielding: bool = False) -> dict[str, Any]:
    """The JSON object of a body.

    json's scanner keeps every other thread waiting while it makes lists of numbers; with `yielding` it calls Python for
    each number, so that others get their turn, and takes longer.

    Raises ApiError (400) for bytes that are no UTF-8, for text that is no JSON object, and for what JSON leaves open or
    forbids: a name that occurs twice, NaN, Infinity, a lone half of a surrogate pair, a number of more than 300 digits,
    more than 64 levels of nesting.
    """
    try:
        text = body.decode("utf-8-sig")  # editors and shells of Windows begin it with a byte-order mark
    except UnicodeDecodeError as error:
        raise invalid(
            f"the body is not valid UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None

    hooks: dict[str, Any] = {"parse_int": _bounded_int} if yielding or _LONG_NUMBER.search(text) else {}
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite_float, **hooks
        )
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None

    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object; got {_kind(value)}", code="invalid_json")
    if text.count("{") + text.count("[") > _MAX_DEPTH and _is_deep(value):
        raise _too_deep()
    if "\\u" in text and _SURROGATE.search(text):
        _refuse_surrogates(value, "")
    return value


def json_object(text: str, *, long_numbers: bool = False) -> dict[str, Any] | None:
    """The JSON object that a text is; None for any other text.

    It is None, too, for an object that could not be sent on: with NaN or Infinity, a lone half of a surrogate pair,
    more than 64 levels, or, unless `long_numbers`, an integer that has no place in the protocol's 64 bits.
    """
    parse_int = _bounded_int if long_numbers else _sendable_int
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=parse_int)
        if not isinstance(value, dict) or _is_deep(value):
            return None
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def check_sendable(value: Any, path: str) -> None:
    """Raise ApiError with the path of a number that has no place in the protocol's 64 bits."""
    if isinstance(value, int) and not _INT_LOW <= value <= _INT_HIGH:
        bound = f"it must be in [{_INT_LOW}, {_INT_HIGH}]"
        raise invalid(f"{path}={shown(value)} is out of range: {bound}", path, "invalid_value")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_sendable(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            check_sendable(item, _join(path, name))


def to_struct(
    values: dict[str, Any], kind: type[Request], refused: Mapping[str, str] | None = None, strict: bool = True
) -> Request:
    """The request that `values` describe; a null is as good as no value. Without `strict`, "5" is a number, too.

    Raises ApiError (400) whose `param` is the path of the first field that is wrong. `refused` has what to say about
    fields that other servers take and this one does not; what changes nothing of them is left out (http/neutral.py).
    """
    values = without_neutral(values, refused or {})
    try:
        return msgspec.convert(values, kind, strict=strict, str_keys=True)
    except msgspec.ValidationError:
        values = without_nulls(values, kind)  # which takes a while, and is seldom needed
    try:
        return msgspec.convert(values, kind, strict=strict, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explained(str(error), values, kind) from None


def shown(value: object) -> str:
    """A value as an error message quotes it: at most 100 characters."""
    # A value of megabytes is not turned into text to be cut: each of its items has a character at least.
    text = repr(_beginning(value, [_SHOWN_CHARS + 1]))
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


def _beginning(value: Any, left: list[int]) -> Any:
    """The value with no more than left[0] of its items, which is counted down."""
    left[0] -= 1
    if isinstance(value, str | bytes):
        return value[: _SHOWN_CHARS + 1]
    if isinstance(value, dict):
        items = itertools.takewhile(lambda _: left[0] > 0, value.items())
        return {_beginning(name, left): _beginning(item, left) for name, item in items}
    if isinstance(value, list):
        return [_beginning(item, left) for item in itertools.takewhile(lambda _: left[0] > 0, value)]
    return value


def _explained(message: str, values: dict[str, Any], kind: type[msgspec.Struct]) -> ApiError:
    """msgspec's message with the field's path and value."""
    found = _PATH.search(message)
    path = found[1] if found else ""
    what = message[: found.start()] if found else message

    if unknown := _UNKNOWN.match(what):
        name = unknown[1]
        near = difflib.get_close_matches(name, kind.__struct_fields__, 1) if not path else []
        hint = f"; did you mean {near[0]}?" if near else ""
        return invalid(f"unknown field {shown(name)}{hint}", _join(path, name[:_SHOWN_CHARS]), "unknown_parameter")
    if missing := _MISSING.match(message):
        return invalid(f"{_join(path, missing[1])} is required", _join(path, missing[1]), "missing_required_parameter")
    what = what[:1].lower() + what[1:]
    got = _value_at(values, path)
    return invalid(f"{path or 'the body'}: {what}{got}", path or None, "invalid_value")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value_at(values: Any, path: str) -> str:
    """The value that a path such as stop[0] leads to; nothing where msgspec does not name the whole path."""
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        try:
            values = values[name] if name else values[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return f"; got {shown(values)}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {shown(name)} occurs twice in one object")
            seen.add(name)
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:_SHOWN_CHARS]} is too large")
    return value


def _finite_float(text: str) -> float | int:
    value = _finite(text)
    # 1.0 is an integer to JSON Schema, and to clients that have only one type of number.
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def _bounded_int(text: str) -> int:
    if len(text) > _INT_DIGITS:
        raise ValueError(f"the number {text[:_SHOWN_CHARS]} has more than {_INT_DIGITS} digits")
    return int(text)


def _sendable_int(text: str) -> int:
    if len(text) > 20 or not _INT_LOW <= int(text) <= _INT_HIGH:
        raise ValueError(f"the number {text[:_SHOWN_CHARS]} is out of range")
    return int(text)


def _is_deep(value: Any) -> bool:
    """Whether a value has more than 64 levels."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _too_deep() -> ApiError:
    return invalid(f"the body is nested too deeply: it may have {_MAX_DEPTH} levels", code="invalid_json")


def _refuse_surrogates(value: Any, path: str) -> None:
    """Raise ApiError for a string with half of a surrogate pair, which no tokenizer and no wire takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise invalid(
                f"{path or 'a name'} holds half of a surrogate pair, which is not valid Unicode",
                path or None,
                "invalid_json",
            ) from None
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_surrogates(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            _refuse_surrogates(name, path)
            _refuse_surrogates(item, _join(path, name))


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
