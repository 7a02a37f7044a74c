"""Calls as Qwen3-Coder writes them: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>.

A value is plain text between its tags, but for one line break at either end. A tag within a value is text unless what
must follow it follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from .call_scanner import BLANKS_LIMIT, NAME_LIMIT, CallReader, CallScanner
from .parameter_types import STRING, ParameterTypes, json_string, json_value

OPENING, CLOSING = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
_INK = re.compile(r"\S")
_VALUE_END = "\n" + PARAMETER_END


def qwen3_coder_scanner(types: ParameterTypes) -> CallScanner:
    """What finds the calls of one answer. The model may leave out <tool_call>."""
    return CallScanner((OPENING, FUNCTION), partial(_CoderCall, types))


class _CoderCall(CallReader):
    """One call, whose parameters become the members of a JSON object, each of the type that its schema names."""

    def __init__(self, types: ParameterTypes, opening: str, number: int) -> None:
        self._types = types
        super().__init__(opening, number)

    def _begin_reading(self) -> Callable[[bool], bool]:
        self._tool = ""
        self._separator = "{"
        self._kinds = STRING
        self._value: list[str] | None = None  # a value that is not streamed, until it is whole
        return self._tool_name if self._opening == FUNCTION else self._function

    def _function(self, last: bool) -> bool:
        return self._expect({FUNCTION: self._tool_name})

    def _tool_name(self, last: bool) -> bool:
        name = self._name()
        if name is None:
            return False
        self._tool = name
        self._next = self._between
        self._begin(name)
        return True

    def _between(self, last: bool) -> bool:
        return self._expect({PARAMETER: self._parameter_name, FUNCTION_END: self._function_end})

    def _parameter_name(self, last: bool) -> bool:
        name = self._name()
        if name is None:
            return False
        self._argue(f"{self._separator}{json_string(name)}: ")
        self._separator = ", "
        self._kinds = self._types.get(self._tool, {}).get(name) or STRING
        self._next = self._value_begin
        return True

    def _value_begin(self, last: bool) -> bool:
        if self._at == len(self._text):
            return False
        if self._text[self._at] == "\n":
            self._at += 1
        self._value = None if self._kinds == STRING else []
        if self._value is None:
            self._argue('"')
        self._next = self._in_value
        return True

    def _in_value(self, last: bool) -> bool:
        closing = self._text.find(PARAMETER_END, self._at)
        if closing < 0:
            self._add(len(self._text) - _begun_end(self._text, self._at))
            return False

        end = closing - 1 if closing > self._at and self._text[closing - 1] == "\n" else closing
        follows = self._followed_by(closing + len(PARAMETER_END), (PARAMETER, FUNCTION_END))
        if follows is None and not last:
            self._add(end)
            return False
        if follows is False:
            self._add(closing + len(PARAMETER_END))
            return True

        self._add(end)
        self._at = closing + len(PARAMETER_END)
        self._argue('"' if self._value is None else json_value("".join(self._value), self._kinds))
        self._next = self._between
        return True

    def _followed_by(self, at: int, tags: tuple[str, ...]) -> bool | None:
        """Whether one of the tags comes next, white space left aside; None where it cannot be said yet."""
        found = _INK.search(self._text, at)
        begin = found.start() if found else len(self._text)
        if begin - at > BLANKS_LIMIT:
            return False
        if self._text.startswith(tags, begin):
            return True
        left = self._text[begin : begin + len(max(tags, key=len))]
        return None if any(tag.startswith(left) for tag in tags) else False

    def _add(self, end: int) -> None:
        """Add the text up to `end` to the value."""
        piece = self._text[self._at : end]
        self._at = end
        if self._value is None:
            self._argue(json_string(piece)[1:-1])
        else:
            self._value.append(piece)

    def _function_end(self, last: bool) -> bool:
        self._argue("{}" if self._separator == "{" else "}")
        self._end_arguments()
        self._next = self._after_function
        return True

    def _after_function(self, last: bool) -> bool:
        return self._close(CLOSING, last)

    def _expect(self, steps: dict[str, Callable[[bool], bool]]) -> bool:
        """Read one tag, which decides the next step."""
        self._blank()
        for tag, step in steps.items():
            if self._text.startswith(tag, self._at):
                self._at += len(tag)
                self._next = step
                return True
        return False if self._followed_by(self._at, tuple(steps)) is None else self._fail()

    def _name(self) -> str | None:
        """Read a name and the bracket after it; None where it is not whole, or wrong."""
        end = self._text.find(">", self._at, self._at + NAME_LIMIT + 1)
        name = self._text[self._at : end if end >= 0 else len(self._text)]
        if "<" in name or "\n" in name or len(name) > NAME_LIMIT or (end >= 0 and not name.strip()):
            self._fail()
            return None
        if end < 0:
            return None
        self._at = end + 1
        return name.strip()


def _begun_end(text: str, at: int) -> int:
    """Characters at the end of text[at:] with which the end of a value may begin."""
    for tag in (_VALUE_END, PARAMETER_END):
        for size in range(min(len(text) - at, len(tag) - 1), 0, -1):
            if tag.startswith(text[-size:]):
                return size
    return 0
