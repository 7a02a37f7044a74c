"""What an answer consists of, for every face of the API: thinking, text, and calls of tools, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More text of thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class Text:
    """More text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A tool is called. Calls of a completion are numbered from 0, and one ends before the next begins."""

    call: int
    id: str
    """For the tool's result to name."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments: a piece of the text of a JSON object."""

    call: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call's arguments have ended."""

    call: int
    whole: bool = True
    """False of arguments that were cut off, or went wrong."""


Part = Reasoning | Text | CallBegin | CallArguments | CallEnd
