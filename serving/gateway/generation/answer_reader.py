"""From what the engine says to the parts of an answer: thinking and text."""

from __future__ import annotations

from ....engine.protocol.messages import Completion, Delta, ModelInfo
from ..gateway import Gateway
from ..schemas.chat import ChatRequest
from .parts import Part, Reasoning, Text


class AnswerReader:
    """Reads one completion."""

    def feed(self, delta: Delta) -> list[Part]:
        """The parts that a Delta adds."""
        parts: list[Part] = []
        if delta.reasoning:
            parts.append(Reasoning(delta.reasoning))
        if delta.text:
            parts.append(Text(delta.text))
        return parts

    def finish(self, ending: Completion) -> list[Part]:
        """The parts that were held back."""
        return []


def readers(request: ChatRequest, info: ModelInfo, gateway: Gateway, n: int) -> list[AnswerReader]:
    """A reader for each of n completions."""
    return [AnswerReader() for _ in range(n)]
