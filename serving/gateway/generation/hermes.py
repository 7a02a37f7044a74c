"""Calls as Hermes, Qwen2.5 and Qwen3 write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable

from .call_scanner import NAME_LIMIT, CallReader, CallScanner

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_ARGUMENTS = ("arguments", "parameters")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET_OR_QUOTE = re.compile(r'["{}\[\]]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')
_NO_SCALAR = re.compile(r"[^-+.\w]")
_PAIRS = {"}": "{", "]": "["}


def hermes_scanner() -> CallScanner:
    """What finds the calls of one answer."""
    return CallScanner((OPENING,), _HermesCall)


class _Scan(enum.Enum):
    MORE = enum.auto()
    ENDED = enum.auto()
    WRONG = enum.auto()


class _JsonValue:
    """Finds the end of a JSON value in a growing text, by its brackets and quotes."""

    def __init__(self, first: str) -> None:
        """`first` is its first character."""
        self.first = first
        self._open: list[str] = []
        self._in_string = self._escaped = self._begun = False

    def scan(self, text: str, at: int) -> tuple[int, _Scan]:
        """(where in the text the value's part from `at` ends, whether the value ends there)"""
        begun, self._begun = self._begun, self._begun or at < len(text)
        if self.first not in '{["':
            end = _NO_SCALAR.search(text, at)
            if end is None:
                return len(text), _Scan.MORE
            return end.start(), _Scan.ENDED if begun or end.start() > at else _Scan.WRONG

        while at < len(text):
            if self._in_string:
                at = self._in_text(text, at)
            else:
                found = _BRACKET_OR_QUOTE.search(text, at)
                if found is None:
                    return len(text), _Scan.MORE
                at = found.end()
                if found[0] == '"':
                    self._in_string = True
                elif found[0] in _PAIRS.values():
                    self._open.append(found[0])
                elif self._open.pop() != _PAIRS[found[0]]:
                    return found.start(), _Scan.WRONG
            if not self._open and not self._in_string:
                return at, _Scan.ENDED
        return at, _Scan.MORE

    def _in_text(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        found = _QUOTE_OR_ESCAPE.search(text, at)
        if found is None:
            return len(text)
        if found[0] == '"':
            self._in_string = False
        else:
            self._escaped = True
        return found.end()


class _HermesCall(CallReader):
    """One call: a JSON object with a name and arguments, in any order, and other members, which are skipped."""

    def _begin_reading(self) -> Callable[[bool], bool]:
        self._key = ""
        self._name: str | None = None
        self._has_arguments = False
        self._value = _JsonValue("")
        self._collected: list[str] | None = None  # arguments that are no object, until they are whole
        return self._object

    def _object(self, last: bool) -> bool:
        return self._expect({"{": self._member})

    def _member(self, last: bool) -> bool:
        if self._blank() == '"':
            self._next = self._member_name
            return True
        return self._expect({"}": self._object_end})

    def _member_name(self, last: bool) -> bool:
        name = self._string()
        if name is None:
            return False
        self._key = name
        self._next = self._colon
        return True

    def _colon(self, last: bool) -> bool:
        return self._expect({":": self._member_value})

    def _member_value(self, last: bool) -> bool:
        first = self._blank()
        if not first:
            return False
        if self._key == "name" and self._name is None:
            self._next = self._tool_name
            return True

        self._value = _JsonValue(first)
        self._next = self._skipped
        if self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            self._collected = None if first in "{[" else []
            self._next = self._arguments
        return True

    def _tool_name(self, last: bool) -> bool:
        name = self._string()
        if name is None:
            return False
        if not name:
            return self._fail()
        self._name = name
        self._next = self._after_value
        self._begin(name)
        return True

    def _arguments(self, last: bool) -> bool:
        begin = self._at
        self._at, scan = self._value.scan(self._text, begin)
        piece = self._text[begin : self._at]
        if self._collected is None:
            self._argue(piece)
        else:
            self._collected.append(piece)

        if self._collected is not None and (last or scan is not _Scan.MORE):
            whole, self._collected = "".join(self._collected), None
            self._argue(_plain_arguments(whole))
        return self._after_scan(scan)

    def _skipped(self, last: bool) -> bool:
        self._at, scan = self._value.scan(self._text, self._at)
        return self._after_scan(scan)

    def _after_scan(self, scan: _Scan) -> bool:
        if scan is _Scan.WRONG:
            return self._fail()
        self._next = self._after_value if scan is _Scan.ENDED else self._next
        return scan is _Scan.ENDED

    def _after_value(self, last: bool) -> bool:
        # A model may forget the object's last bracket.
        left = self._text[self._at :].lstrip()
        if left and self._has_arguments and self._begun and CLOSING.startswith(left[: len(CLOSING)]):
            if len(left) < len(CLOSING):
                return False
            self._next = self._object_end
            return True
        return self._expect({",": self._member, "}": self._object_end})

    def _object_end(self, last: bool) -> bool:
        if not self._begun:
            return self._fail()
        if not self._has_arguments:
            self._argue("{}")
        self._end_arguments()
        self._next = self._after_object
        return True

    def _after_object(self, last: bool) -> bool:
        return self._close(CLOSING, last)

    def _expect(self, steps: dict[str, Callable[[bool], bool]]) -> bool:
        """Read one character, which decides the next step."""
        found = self._blank()
        if not found:
            return False
        if found not in steps:
            return self._fail()
        self._at += 1
        self._next = steps[found]
        return True

    def _string(self) -> str | None:
        """Read a string; None where it is not whole, or wrong."""
        found = _STRING.match(self._text, self._at)
        if found is None or found.end() - self._at > 6 * NAME_LIMIT:
            if self._text[self._at : self._at + 1] != '"' or len(self._text) - self._at > 6 * NAME_LIMIT:
                self._fail()
            return None
        try:
            value = str(json.loads(found[0], strict=False))
            value.encode()
        except ValueError:
            self._fail()
            return None
        if len(value) > NAME_LIMIT:
            self._fail()
            return None
        self._at = found.end()
        return value


def _plain_arguments(text: str) -> str:
    """Arguments that were written as a string that holds the object, or as null, in the form of an object."""
    try:
        value = json.loads(text, strict=False)
        if not isinstance(value, str):
            return "{}" if value is None else text
        value.encode()  # half of a surrogate pair cannot be sent
    except (ValueError, RecursionError):
        return text
    return value if value.lstrip().startswith("{") else text
