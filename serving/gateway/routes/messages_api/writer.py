"""From the parts of an answer to the content blocks of a message, and to the events that tell of them in order."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .....engine.protocol.messages import Accepted, Completion, Finished
from ...generation.parts import CallArguments, CallBegin, Part, Reasoning, Text
from ...http.error_shapes import anthropic_body
from ...http.errors import ApiError
from ...http.json_body import json_object
from ...schemas.messages_api.answer import (
    INVALID_JSON,
    AnswerBlock,
    AnswerText,
    AnswerThinking,
    AnswerToolUse,
    EventDelta,
    MessageAnswer,
    MessageEvent,
    MessageUsage,
    StopReason,
    ThinkingTokens,
)
from ...schemas.responses import LogprobContent
from ...schemas.sealed import seal, signature

EventType = Literal[
    "message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
    "message_stop", "ping",
]  # fmt: skip

_NOTHING = f'{{"{INVALID_JSON}": ""}}'
_encode = msgspec.json.Encoder().encode


def _encoded(event: MessageEvent) -> bytes:
    return b"event: " + event.type.encode() + b"\ndata: " + _encode(event) + b"\n\n"


class MessageWriter:
    """Fills a message while its parts come. `drain` gives the events since the last call, encoded.

    Text that begins with white space waits for something to see: between thinking and a call there is often a line
    break alone, and Anthropic's API takes no block of white space back.
    """

    keep_alive = _encoded(MessageEvent(type="ping"))

    def __init__(
        self, message: MessageAnswer, *, stream: bool, omit_thinking: bool, request_id: str | None = None
    ) -> None:
        """Without `stream` there are no events. With `omit_thinking` it is in its block's signature alone."""
        self.message = message
        self._request_id = request_id
        self._stream = stream
        self._omit = omit_thinking
        self._events: list[bytes] = []
        self._block: AnswerBlock | None = None
        self._pieces: list[str] = []
        self._held = ""

    def begin(self, accepted: Accepted) -> None:
        """The engine computes the answer."""
        self.message.usage.input_tokens = accepted.prompt_tokens
        self._emit("message_start", message=self.message)

    def take(self, parts: list[Part], logprobs: list[LogprobContent]) -> None:
        """More of the answer; there is no place for log-probabilities."""
        for part in parts:
            if isinstance(part, Text):
                self._text(part.text)
            elif isinstance(part, Reasoning):
                self._thinking(part.text)
            elif isinstance(part, CallBegin):
                self._close()
                self._open(AnswerToolUse(id=part.id, name=part.name, input={}))
            elif isinstance(part, CallArguments):
                if part.text:
                    self._piece(part.text, EventDelta(type="input_json_delta", partial_json=part.text))
            else:
                if not part.whole and not self._pieces:
                    # Nothing at all would be read as a call without arguments.
                    self._piece(_NOTHING, EventDelta(type="input_json_delta", partial_json=_NOTHING))
                self._close()

    def end(self, finished: Finished, ending: Completion) -> None:
        """The answer has ended."""
        message = self.message
        usage = finished.usage
        if self._held and self._block is None and not message.content:
            self._say(self._held)  # white space is the whole answer
        self._close()
        message.usage = MessageUsage(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens_details=ThinkingTokens(thinking_tokens=usage.reasoning_tokens),
        )
        message.stop_reason = _stop_reason(ending, message)
        if message.stop_reason == "stop_sequence":
            message.stop_sequence = str(ending.stop_reason)
        delta = EventDelta(
            stop_reason=message.stop_reason, stop_sequence=message.stop_sequence, stop_details=None, container=None
        )
        self._emit("message_delta", delta=delta, usage=message.usage)
        self._emit("message_stop")

    def fail(self, error: ApiError) -> None:
        """The answer cannot go on."""
        self._events.append(b"event: error\ndata: " + _encode(anthropic_body(error, self._request_id)) + b"\n\n")

    def drain(self) -> bytes:
        """The events since the last call."""
        events, self._events = b"".join(self._events), []
        return events

    def _text(self, text: str) -> None:
        if not isinstance(self._block, AnswerText):
            self._held += text
            if self._held.strip():
                self._say(self._held)
            return
        self._piece(text, EventDelta(type="text_delta", text=text))

    def _say(self, text: str) -> None:
        """Begin a block of text."""
        self._close()
        self._open(AnswerText(text=""))
        self._piece(text, EventDelta(type="text_delta", text=text))

    def _thinking(self, text: str) -> None:
        if not isinstance(self._block, AnswerThinking):
            self._close()
            self._open(AnswerThinking(thinking="", signature=""))
        if self._omit:
            self._pieces.append(text)
        else:
            self._piece(text, EventDelta(type="thinking_delta", thinking=text))

    def _piece(self, text: str, delta: EventDelta) -> None:
        self._pieces.append(text)
        self._emit("content_block_delta", index=len(self.message.content), delta=delta)

    def _open(self, block: AnswerBlock) -> None:
        first = not self.message.content
        self._block = block
        self._pieces = []
        self._emit("content_block_start", index=len(self.message.content), content_block=block)
        if first:
            self._emit("ping")

    def _close(self) -> None:
        """End the open block, if there is one, and put it into the message."""
        block, text = self._block, "".join(self._pieces)
        self._held = ""
        if block is None:
            return
        index = len(self.message.content)
        if isinstance(block, AnswerText):
            block.text = text
        elif isinstance(block, AnswerThinking):
            block.thinking = "" if self._omit else text
            block.signature = seal(text) if self._omit else signature(text)
            delta = EventDelta(type="signature_delta", signature=block.signature)
            self._emit("content_block_delta", index=index, delta=delta)
        else:
            block.input = _arguments(text)
        self._emit("content_block_stop", index=index)
        self.message.content.append(block)
        self._block = None

    def _emit(self, type: EventType, **fields: Any) -> None:
        if self._stream:
            self._events.append(_encoded(MessageEvent(type=type, **fields)))


def _stop_reason(ending: Completion, message: MessageAnswer) -> StopReason:
    if ending.finish_reason == "length":
        return "max_tokens"
    if any(isinstance(block, AnswerToolUse) for block in message.content):
        return "tool_use"
    return "stop_sequence" if isinstance(ending.stop_reason, str) else "end_turn"


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments. Those that were cut off are kept as text under the name that Anthropic gives to them."""
    value = json_object(text or "{}", long_numbers=True)
    return {INVALID_JSON: text} if value is None else value
