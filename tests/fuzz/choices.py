"""Fuzzing input as a list of choices: whatever the bytes are, they choose something that has the form of the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

HARD_TEXTS = (
    "", " ", "\0", "\n", "a", "é", "漢", "🙂", "\ud800", "\ufeff", "\u2028", "\U0010ffff", "null", "-1",
    "x" * 300, '"', "\\",
    "{", "}", "[", "]", "<", ">", "/", "..", "%s", "{0}", "{{", "}}",
)  # fmt: skip
HARD_NUMBERS = (
    0, 1, -1, 2, 7, 255, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


class Choices:
    """Reads bytes from the front. Once they are used up, every choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, count: int) -> int:
        """A number from 0 to count - 1, for count up to 65536."""
        size = 1 if count <= 256 else 2
        return int.from_bytes(self.take(size), "little") % count

    def flag(self) -> bool:
        """True or False."""
        return bool(self.number(2))

    def pick(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.number(len(values))]

    def take(self, size: int) -> bytes:
        """The next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def rest(self) -> bytes:
        """All bytes that are left."""
        return self.take(len(self._data))

    @property
    def exhausted(self) -> bool:
        """Whether every byte is used up."""
        return self._at >= len(self._data)

    def text(self, words: Sequence[str] = (), most: int = 6) -> str:
        """A text of a few pieces: words, hard ones, or bytes as they come."""
        pieces = []
        for _ in range(self.number(most + 1)):
            kind = self.number(4)
            if kind == 0:
                pieces.append(self.take(self.number(12)).decode(errors="replace"))
            elif kind == 1 or not words:
                pieces.append(self.pick(HARD_TEXTS))
            else:
                pieces.append(self.pick(words))
        return "".join(pieces)

    def value(self, words: Sequence[str] = (), depth: int = 3) -> Any:
        """A JSON value, whose texts and keys are often `words`."""
        kind = self.number(9)
        if kind == 0 or (kind > 6 and depth == 0):
            return None
        if kind == 1:
            return self.flag()
        if kind == 2:
            return self.pick(HARD_NUMBERS)
        if kind == 3:
            return self.number(65536)
        if kind in (4, 5):
            return self.text(words)
        if kind == 6:
            return self.pick(words) if words else ""
        if kind == 7:
            return [self.value(words, depth - 1) for _ in range(self.number(4))]
        return {self.key(words): self.value(words, depth - 1) for _ in range(self.number(5))}

    def key(self, words: Sequence[str]) -> str:
        """A name of a member of an object."""
        return self.pick(words) if words and self.number(4) else self.text(words, 2)

    def changed(self, value: Any, words: Sequence[str] = ()) -> Any:
        """A copy of a JSON value with one part replaced, removed, doubled or nested."""
        if isinstance(value, dict) and value and self.number(5):
            copy = dict(value)
            name = self.pick(sorted(copy, key=str))
            change = self.number(5)
            if change == 0:
                del copy[name]
            elif change == 1:
                copy[self.key(words)] = self.value(words)
            else:
                copy[name] = self.changed(copy[name], words)
            return copy
        if isinstance(value, list) and value and self.number(5):
            place = self.number(len(value))
            change = self.number(5)
            if change == 0:
                return value[:place] + value[place + 1 :]
            if change == 1:
                return [*value[:place], value[place], *value[place:]]
            return [*value[:place], self.changed(value[place], words), *value[place + 1 :]]
        return self.value(words)

    def mutated(self, data: bytes) -> bytes:
        """A copy of `data` with up to eight bytes, or runs of them, changed, removed or put in."""
        copy = bytearray(data)
        for _ in range(self.number(9)):
            if not copy:
                break
            place = self.number(min(len(copy), 65536))
            change = self.number(5)
            if change == 0:
                copy[place] ^= 1 << self.number(8)
            elif change == 1:
                copy[place] = self.number(256)
            elif change == 2:
                del copy[place : place + 1 + self.number(8)]
            elif change == 3:
                copy[place:place] = self.take(1 + self.number(8))
            else:
                copy[place : place + 8] = self.pick((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little")
        return bytes(copy)
