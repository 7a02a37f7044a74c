"""Reads calls as Hermes' models write them, when a completion has ended: for tests of what is made of the parts."""

from __future__ import annotations

import json
import re

from phalanx.engine.protocol.messages import Completion, Delta
from phalanx.serving.gateway.generation.parts import CallArguments, CallBegin, CallEnd, Part, Reasoning, Text

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


class FakeReader:
    def __init__(self) -> None:
        self._text = ""

    def feed(self, delta: Delta) -> list[Part]:
        self._text += delta.text
        return [Reasoning(delta.reasoning)] if delta.reasoning else []

    def finish(self, ending: Completion | None = None) -> list[Part]:
        parts: list[Part] = []
        place = 0
        for number, found in enumerate(_CALL.finditer(self._text)):
            parts.append(Text(self._text[place : found.start()]))
            place = found.end()
            call = json.loads(found[1])
            parts.append(CallBegin(number, f"call_{number}", call["name"]))
            parts.append(CallArguments(number, json.dumps(call["arguments"])))
            parts.append(CallEnd(number))
        return [*parts, Text(self._text[place:])]
