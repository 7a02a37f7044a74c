"""A scripted pool that says one text after the other: what a model would say in the turns of a conversation."""

from __future__ import annotations

import re

import msgspec
from phalanx.engine.protocol.messages import (
    Accepted,
    Completion,
    Delta,
    Finished,
    Submit,
    Timings,
    Usage,
)
from phalanx.serving.gateway.engine_pool import OnEvent
from phalanx.tests.serving.gateway.scripted_pool import MODEL, ScriptedPool, ScriptedTicket, prompt_ids

PIECE_CHARS = 3
_THINKING = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)


class AgentPool(ScriptedPool):
    """Answers with `answers`, the first one first; what is in <think> is split off, as the engine does.

    Each piece of a text is a Delta and counts as a token. An answer that ends with `CUT` has reached its max_tokens.
    """

    CUT = "\x00cut"

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.model = msgspec.structs.replace(MODEL, chat_template="{{ messages }} <tool_call> <think> </think>")
        self.answers = list(answers)
        self.cached_tokens = 0

    def _run(self, submit: Submit, on_event: OnEvent, ticket: ScriptedTicket) -> None:
        answer = self.answers.pop(0) if self.answers else "Hello world"
        cut = answer.endswith(self.CUT)
        answer = answer.removesuffix(self.CUT)
        thinking, text = "", answer
        if submit.split_reasoning:
            thinking, text = "".join(_THINKING.findall(answer)), _THINKING.sub("", answer)

        prompt = prompt_ids(submit)
        on_event(Accepted(id=submit.id, prompt_tokens=len(prompt), seed=1, max_tokens=1000))
        tokens = 0
        for piece in _pieces(thinking):
            on_event(Delta(submit.id, 0, "", [tokens], None, tokens, reasoning=piece))
            tokens += 1
        thought = tokens
        for piece in _pieces(text):
            if ticket.aborted.wait(self.token_s):
                break
            on_event(Delta(submit.id, 0, piece, [tokens], None, tokens))
            tokens += 1

        reason = "abort" if ticket.aborted.is_set() else "length" if cut else "stop"
        ending = Completion(0, reason, self.stop_reason, thinking=bool(thinking) and not text)
        usage = Usage(len(prompt), tokens, self.cached_tokens, thought)
        on_event(Finished(submit.id, [ending], usage, Timings(0.5, 1.5, 1.0, 4.0)))


def _pieces(text: str) -> list[str]:
    return [text[place : place + PIECE_CHARS] for place in range(0, len(text), PIECE_CHARS)]


def tool_call(name: str, arguments: str) -> str:
    """A call as Hermes' and Qwen's models write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
