"""Calls of tools within an answer's text, found while it grows: what is between them stays text."""

from __future__ import annotations

import enum
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable

from .parts import CallArguments, CallBegin, CallEnd, Part, Text

NAME_LIMIT = 256
"""Characters of a tool's or a parameter's name at most; a longer one makes no call."""
BLANKS_LIMIT = 1024
"""Characters of white space that are held back, or belong to the form of calls, at most; more are text."""
_PIECE = 4096


class CallState(enum.Enum):
    """What is known of a text that may be a call."""

    OPEN = enum.auto()
    ENDED = enum.auto()
    """It was a call; `rest` comes after it."""
    NO_CALL = enum.auto()
    """It is text: `raw`, then `rest`, in which a call may begin."""


class CallReader(ABC):
    """Reads what follows an opening tag, in any pieces.

    A call begins once its name is known. From then on what it holds reaches the client as it comes; where it breaks off
    or goes wrong, the call ends with the arguments that it has, which are no JSON then, and the rest is text.
    """

    def __init__(self, opening: str, number: int) -> None:
        self._opening = opening
        self._number = number
        self._state = CallState.OPEN
        self._text = ""
        self._at = 0
        self._raw: list[str] = []  # what was read before the call began
        self._begun = self._ended = False
        self._waiting: list[str] = []  # arguments that came before the name
        self._parts: list[Part] = []
        self._next: Callable[[bool], bool] = self._begin_reading()

    @abstractmethod
    def _begin_reading(self) -> Callable[[bool], bool]:
        """The first step.

        A step reads from `_text` at `_at`, and returns whether it has come on; otherwise it needs more text. Its
        argument says whether there will be none.
        """

    def feed(self, text: str, last: bool) -> list[Part]:
        """Take in more text; with `last` there is no more, and the state is not OPEN afterwards."""
        self._text += text
        while self._state is CallState.OPEN and self._next(last):
            pass
        if last and self._state is CallState.OPEN:
            self._fail()
        if not self._begun:
            self._raw.append(self._text[: self._at])
        self._text, self._at = self._text[self._at :], 0
        parts, self._parts = self._parts, []
        return parts

    @property
    def state(self) -> CallState:
        """What is known so far."""
        return self._state

    @property
    def raw(self) -> str:
        """What was read of a text that is no call."""
        return "".join(self._raw)

    @property
    def rest(self) -> str:
        """What comes after a call, or after what was read of a text that is none."""
        return self._text

    def _blank(self) -> str:
        """Skip white space. Returns the character after it; nothing if it has not come."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._text[self._at : self._at + 1]

    def _begin(self, name: str) -> None:
        self._begun = True
        self._parts.append(CallBegin(self._number, f"call_{uuid.uuid4().hex[:24]}", name))
        waiting, self._waiting = "".join(self._waiting), []
        self._argue(waiting)

    def _argue(self, text: str) -> None:
        """Add to the arguments."""
        if not self._begun:
            self._waiting.append(text)
        elif text and self._parts and isinstance(before := self._parts[-1], CallArguments):
            self._parts[-1] = CallArguments(self._number, before.text + text)
        elif text:
            self._parts.append(CallArguments(self._number, text))

    def _end_arguments(self, whole: bool = True) -> None:
        if not self._ended:
            self._ended = True
            self._parts.append(CallEnd(self._number, whole))

    def _fail(self) -> bool:
        """It is no call, or not one any more."""
        if self._begun:
            self._end_arguments(whole=False)
        self._state = CallState.ENDED if self._begun else CallState.NO_CALL
        return False

    def _close(self, closing: str, last: bool) -> bool:
        """End the call, with its closing tag if it has one."""
        left = self._text[self._at :].lstrip()
        begin = len(self._text) - len(left)
        if begin - self._at <= BLANKS_LIMIT:
            if left.startswith(closing):
                self._at = begin + len(closing)
            elif closing.startswith(left) and not last:
                return False
        self._state = CallState.ENDED
        return False


class CallScanner:
    """Tells an answer's text from the calls in it.

    White space before a call, between calls and after the last one belongs to the form of calls and is dropped. All
    other text comes out as it went in. Time and memory grow with the text's length, whatever it is.
    """

    def __init__(self, openings: tuple[str, ...], new_reader: Callable[[str, int], CallReader]) -> None:
        """A call begins with one of `openings`; `new_reader` makes a reader of what follows it, given its number."""
        self._openings = openings
        self._new_reader = new_reader
        self._held = ""
        self._reader: CallReader | None = None
        self._before = ""  # white space and the opening tag, in case that they are no call's
        self._calls = 0
        self._after_call = False

    def feed(self, text: str, last: bool = False) -> list[Part]:
        """What more of the text brings; with `last` nothing is held back."""
        parts: list[Part] = []
        # What is held is looked at again and again, so that a long text comes in pieces.
        for begin in range(0, max(1, len(text)), _PIECE):
            self._held += text[begin : begin + _PIECE]
            while self._read(parts, last and begin + _PIECE >= len(text)):
                pass
        return parts

    def _read(self, parts: list[Part], last: bool) -> bool:
        if self._reader is None:
            return self._find_call(parts, last)

        text, self._held = self._held, ""
        parts += self._reader.feed(text, last)
        state = self._reader.state
        if state is CallState.OPEN:
            return False
        if state is CallState.NO_CALL:
            self._show(parts, self._before + self._reader.raw)
        else:
            self._calls += 1
            self._after_call = True
        self._held, self._reader = self._reader.rest, None
        return True

    def _find_call(self, parts: list[Part], last: bool) -> bool:
        found = [(start, tag) for tag in self._openings if (start := self._held.find(tag)) >= 0]
        if found:
            start, tag = min(found)
            end = max(len(self._held[:start].rstrip()), start - BLANKS_LIMIT)
            self._show(parts, self._held[:end])
            self._before = self._held[end:start] + tag
            self._held = self._held[start + len(tag) :]
            self._reader = self._new_reader(tag, self._calls)
            return True

        end = len(self._held)
        if not last:
            end = max(len(self._held[: self._end_without_tag()].rstrip()), end - BLANKS_LIMIT)
        elif self._after_call and end <= BLANKS_LIMIT and not self._held.strip():
            end = 0
        self._show(parts, self._held[:end])
        self._held = self._held[end:]
        return False

    def _end_without_tag(self) -> int:
        """Where the text ends, or an opening tag may begin at its end: only a tag's first character is "<"."""
        start = self._held.rfind("<")
        begins = start >= 0 and any(tag.startswith(self._held[start:]) for tag in self._openings)
        return start if begins else len(self._held)

    def _show(self, parts: list[Part], text: str) -> None:
        if not text:
            return
        self._after_call = False
        if parts and isinstance(before := parts[-1], Text):
            parts[-1] = Text(before.text + text)
        else:
            parts.append(Text(text))
