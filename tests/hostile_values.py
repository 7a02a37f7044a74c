"""Values that a JSON file may hold where a number, a name or a list is meant, and what may come of them."""

from __future__ import annotations

import functools
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from phalanx import CheckpointError, ConfigError, InvalidRequest

NESTED: list[Any] = functools.reduce(lambda inner, _: [inner], range(400), [])
"""Lists in lists, as deep as Python's own reader of JSON takes and other readers do not."""

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "false": False,
    "zero": 0,
    "one": 1,
    "minus-one": -1,
    "fraction": 1.5,
    "nan": math.nan,
    "infinity": math.inf,
    "minus-infinity": -math.inf,
    "1e308": 1e308,
    "5e-324": 5e-324,
    "2**31-1": 2**31 - 1,
    "2**63": 2**63,
    "10**400": 10**400,
    "text": "x",
    "empty": "",
    "number-as-text": "7",
    "surrogate": "\ud800",
    "nul": "a\0b",
    "long": "y" * 100_000,
    "list": [],
    "list-of-zero": [0],
    "list-of-null": [None],
    "list-of-text": ["a"],
    "object": {},
    "object-of-null": {"a": None},
    "nested": NESTED,
}
"""By name: every type that JSON has, and of each the values at which programs break."""

NO_OBJECTS: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"a": [1, ',
    "list": b"[]",
    "null": b"null",
    "nested": b'{"a": ' + b"[" * 100_000,
    "nested-objects": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "no-text": b'{"a": "\xff\xfe"}',
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}
"""Files that are no JSON object, or one that Python does not read."""

PATIENCE_S = 60.0
"""A bound against hanging, for one folder: on a busy machine two ranks start in many seconds."""
MEMORY_BYTES = 2**29
"""What the folders of one test may take at most, above what the process had at its peak before."""
MESSAGE_CHARACTERS = 2000


def read_json(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file."""
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def refusal(what: str, action: Callable[[], object], *words: str) -> str | None:
    """Run `action`, and return None if it went well, or else the message with which it was refused.

    Fails, saying `what`, unless an error is one that a caller may catch, of bounded length, and holds all `words`.
    """
    started = time.monotonic()
    message = None
    try:
        action()
    except (CheckpointError, ConfigError, InvalidRequest) as error:
        message = str(error)
        message.encode()
        assert len(message) < MESSAGE_CHARACTERS, (what, len(message))
        assert [word for word in words if word not in message] == [], (what, message)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {str(error)[:500]!a}") from error
    assert time.monotonic() - started < PATIENCE_S, what
    return message


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if the peak of this process rises by much: no value of a file may be taken for a size."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BYTES
