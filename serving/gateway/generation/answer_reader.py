"""From the deltas of a completion to the parts of an answer, in the form in which its model writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ....engine.protocol.messages import Delta, ModelInfo
from ....engine.protocol.reasoning_tags import tags_in
from ..config import GatewayConfig
from .call_scanner import CallScanner
from .hermes import hermes_scanner
from .parameter_types import parameter_types
from .parts import CallBegin, Part, Reasoning, Text
from .qwen3_coder import qwen3_coder_scanner

ToolSyntax = Literal["hermes", "qwen3_coder"]
_SYNTAXES: dict[str, ToolSyntax] = {"hermes": "hermes", "qwen3_coder": "qwen3_coder"}


@dataclass(frozen=True)
class Dialect:
    """How a model writes what is no plain answer."""

    tools: ToolSyntax | None
    """The form of its calls; None if none is known."""
    reasoning: bool
    """Whether its thinking is split off."""


def dialect_of(info: ModelInfo, config: GatewayConfig) -> Dialect:
    """A model's dialect, as the settings tool_syntax and reasoning have it, or else its chat template."""
    template = info.chat_template or ""
    syntax = config.tool_syntax
    if syntax == "auto":
        # Others write <tool_call> around something else.
        if "<function=" in template and "<parameter=" in template:
            syntax = "qwen3_coder"
        elif "<tool_call>" in template and "<arg_key>" not in template:
            syntax = "hermes"
    reasoning = tags_in(template) is not None if config.reasoning == "auto" else config.reasoning == "think"
    return Dialect(_SYNTAXES.get(syntax), reasoning)


class AnswerReader:
    """Reads one completion. The same text gives the same parts, but for where they are cut, however it comes."""

    def __init__(
        self,
        syntax: ToolSyntax | None = None,
        tools: list[dict[str, Any]] | None = None,
        *,
        shows_reasoning: bool = True,
        most_calls: int | None = None,
    ) -> None:
        """`tools` are those of the request, which are called in the form of `syntax`; without one all is text.

        Without `shows_reasoning` thinking is left out. Calls beyond `most_calls` are left out.
        """
        self._shows_reasoning = shows_reasoning
        self._most_calls = most_calls
        self._calls = 0
        self._scanner: CallScanner | None = None
        if syntax == "hermes":
            self._scanner = hermes_scanner()
        elif syntax == "qwen3_coder":
            self._scanner = qwen3_coder_scanner(parameter_types(tools or []))

    @property
    def calls(self) -> int:
        """Calls so far."""
        return self._calls

    def feed(self, delta: Delta) -> list[Part]:
        """The parts that become known by a delta."""
        parts: list[Part] = []
        if delta.reasoning and self._shows_reasoning:
            parts.append(Reasoning(delta.reasoning))
        if not delta.text:
            return parts
        if self._scanner is None:
            parts.append(Text(delta.text))
            return parts
        return parts + self._counted(self._scanner.feed(delta.text))

    def finish(self) -> list[Part]:
        """The parts that are left when the completion has ended."""
        return [] if self._scanner is None else self._counted(self._scanner.feed("", last=True))

    def whole(self, reasoning: str, text: str) -> list[Part]:
        """The parts of a completion that has come as a whole."""
        return [*self.feed(Delta("", 0, text, [], reasoning=reasoning)), *self.finish()]

    def _counted(self, parts: list[Part]) -> list[Part]:
        kept = []
        for part in parts:
            if not isinstance(part, Text | Reasoning):
                if self._most_calls is not None and part.call >= self._most_calls:
                    continue
                self._calls += isinstance(part, CallBegin)
            kept.append(part)
        return kept
