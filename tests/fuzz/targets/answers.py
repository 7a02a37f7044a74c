"""What a model writes: calls of tools and thinking are read alike however the text comes, and nothing is lost."""

from __future__ import annotations

import json
from typing import Any

from phalanx.engine.coordinator.text.reasoning import Phase, ReasoningSplitter, ReasoningTags
from phalanx.engine.protocol.messages import Delta
from phalanx.serving.gateway.generation.answer_reader import AnswerReader, ToolSyntax
from phalanx.serving.gateway.generation.parts import CallArguments, CallBegin, CallEnd, Part, Reasoning, Text
from phalanx.serving.gateway.http.sse import TextEvent, event
from phalanx.tests.fuzz.bounds import in_time
from phalanx.tests.fuzz.choices import Choices

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string"}, "n": {"type": "integer"}, "l": {"type": "array"}},
            },
        },
    }
]
PIECES = (
    "<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "<parameter=n>", "<parameter=l>",
    "</parameter>", '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", ', '"arguments": ',
    '"parameters": ', "{", "}",
    "[", "]", '"', "\\", "\\u00e9", "\\ud83d", ", ", ": ", "\n", " ", "true", "null", "-1.5e3", "text", "é🙂",
    "<", "</",
    "<tool", "<think>", "</think>", "<thi", "</thi", "f", "a",
)  # fmt: skip
TAGS = (ReasoningTags("<think>", "</think>"), ReasoningTags("<think>", "</think>", 1, 2), ReasoningTags("[T]", "[/T]"))
SYNTAXES: tuple[ToolSyntax | None, ...] = ("hermes", "qwen3_coder", None)


def fuzz_one(data: bytes) -> None:
    """Read one text whole and in pieces."""
    choices = Choices(data)
    syntax, tags, phase = choices.pick(SYNTAXES), choices.pick(TAGS), choices.pick(list(Phase))
    sizes = [1 + choices.number(7) for _ in range(4)]
    text = "".join(
        choices.pick(PIECES) if choices.number(5) else choices.text(PIECES, 2) for _ in range(choices.number(40))
    )
    text += choices.rest().decode(errors="replace")
    pieces = _cut(text, sizes)

    with in_time():
        whole = _read(syntax, [text])
        assert _read(syntax, pieces) == whole
    shown, calls = whole
    assert len(shown) <= len(text)
    for _, arguments, ended in calls:
        if ended and syntax == "qwen3_coder" and shown == "":
            json.dumps(arguments)
    if tags.opening_id is None:
        with in_time():
            assert _split(tags, phase, pieces) == _split(tags, phase, [text])
    _check_events(text)


def _cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    at = turn = 0
    while at < len(text):
        size = sizes[turn % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
        turn += 1
    return pieces


def _read(syntax: ToolSyntax | None, pieces: list[str]) -> tuple[str, list[tuple[str, str, bool]]]:
    """(the text, each call's name, arguments and whether it ended)"""
    reader = AnswerReader(syntax, TOOLS)
    parts: list[Part] = [part for piece in pieces for part in reader.feed(Delta("", 0, piece, []))]
    parts += reader.finish()
    text, calls = "", []
    for part in parts:
        if isinstance(part, Text):
            text += part.text
        elif isinstance(part, CallBegin):
            assert part.call == len(calls)
            assert not calls or calls[-1][2], "a call begins before the one before has ended"
            calls.append((part.name, "", False))
        elif isinstance(part, CallArguments):
            name, before, ended = calls[part.call]
            assert not ended
            calls[part.call] = (name, before + part.text, False)
        elif isinstance(part, CallEnd):
            calls[part.call] = (*calls[part.call][:2], True)
        else:
            assert isinstance(part, Reasoning)
    assert all(ended for _, _, ended in calls)
    assert reader.calls == len(calls)
    return text, calls


def _split(tags: ReasoningTags, phase: Phase, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(tags, phase)
    thinking, answer = "", ""
    for place, piece in enumerate(pieces):
        before, after = splitter.feed(piece, last=place == len(pieces) - 1)
        thinking, answer = thinking + before, answer + after
    assert thinking + answer == "".join(pieces)
    return thinking, answer


def _check_events(text: str) -> None:
    """An event is one line, and reads as what was put in."""
    text = text.encode(errors="replace").decode()
    shape = event({"a": TextEvent.MARK, "b": [TextEvent.MARK]})
    for encoded in (event({"a": text, "b": [text]}), TextEvent(shape).filled(text)):
        assert encoded.startswith(b"data: ")
        assert encoded.endswith(b"\n\n")
        assert encoded.count(b"\n") == 2
        assert json.loads(encoded[6:]) == {"a": text, "b": [text]}
