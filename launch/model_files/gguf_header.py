"""The counts and lengths at the beginning of a GGUF file, checked before the gguf package follows them.

That package reads as many values as a file states, also beyond its end, and makes an array of numpy of each. The format
is that of ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from ...engine.errors import CheckpointError

MOST_VALUES = 2**22
"""Values of all the metadata together; a vocabulary of 262,144 tokens has about a million."""
MOST_TEXT_BYTES = 2**24
"""Bytes of one text; a chat template has some thousands."""
MOST_TENSORS = 2**17
MOST_DIMENSIONS = 4

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of each scalar type."""


def check_header(file: Path) -> None:
    """Raise CheckpointError for a file that is no GGUF, or states more than it holds or than a model has."""
    try:
        with file.open("rb") as stream:
            _Header(file, stream).check()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


class _Header:
    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self._file, self._stream = file, stream
        self._size = file.stat().st_size
        self._order = "<"
        self._values = 0

    def check(self) -> None:
        if self._take(4, "its first bytes") != _MAGIC:
            raise self._error("its first bytes are not GGUF")
        version = self._take(4, "its version")
        if int.from_bytes(version, "little") & 0xFFFF == 0:
            self._order = ">"  # of a machine of the other byte order
        tensors = self._number("Q", "tensor_count", MOST_TENSORS)
        entries = self._number("Q", "kv_count", MOST_VALUES)

        for _ in range(entries):
            self._text("a key of its metadata")
            self._value(self._number("I", "the type of a value"))
        for _ in range(tensors):
            self._text("the name of a tensor")
            dimensions = self._number("I", "the dimensions of a tensor", MOST_DIMENSIONS)
            self._skip(8 * dimensions + 4 + 8, "the description of a tensor")

    def _value(self, kind: int) -> None:
        count = 1
        if kind == _ARRAY:
            kind = self._number("I", "the type of an array")
            count = self._number("Q", "the length of an array", MOST_VALUES)
        self._values += count
        if self._values > MOST_VALUES:
            raise self._error(f"its metadata hold more than {MOST_VALUES} values")
        if kind == _STRING:
            for _ in range(count):
                self._text("a text of its metadata")
        elif kind in _SIZES:
            self._skip(count * _SIZES[kind], "a value of its metadata")
        else:
            raise self._error(f"a value of its metadata has type {kind}, which is not known, or is an array of arrays")

    def _text(self, what: str) -> None:
        self._skip(self._number("Q", f"the length of {what}", MOST_TEXT_BYTES), what)

    def _number(self, form: str, what: str, most: int | None = None) -> int:
        (value,) = struct.unpack(self._order + form, self._take(struct.calcsize(self._order + form), what))
        number = int(value)
        if most is not None and number > most:
            raise self._error(f"{what} is {number}; it may be at most {most}")
        return number

    def _take(self, size: int, what: str) -> bytes:
        taken = self._stream.read(size)
        if len(taken) < size:
            raise self._cut_off(what)
        return taken

    def _skip(self, size: int, what: str) -> None:
        end = self._stream.tell() + size
        if end > self._size:
            raise self._cut_off(what)
        self._stream.seek(end)

    def _cut_off(self, what: str) -> CheckpointError:
        return self._error(f"it ends at byte {self._size}, within {what}")

    def _error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self._file} is no GGUF file, or is cut off ({why}); copy it again")
