"""From the parts of an answer to the items of a response, and to the events that tell of them in order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from .....engine.protocol.messages import Accepted, Completion, Finished, Usage
from ...generation.parts import CallArguments, CallBegin, Part, Reasoning, Text
from ...http.error_shapes import responses_event
from ...http.errors import ApiError
from ...http.sse import KEEP_ALIVE
from ...schemas.responses import LogprobContent
from ...schemas.responses_api.answer import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputCall,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
    SummaryText,
)
from ...schemas.sealed import seal

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class Style:
    """How thinking and streams are written."""

    stream: bool
    """Whether events are made at all."""
    summary: bool
    """Thinking is the summary of its item; without, its content."""
    sealed: bool
    """Reasoning items have encrypted_content."""


class ResponseWriter:
    """Fills a response while its parts come. `drain` gives the events since the last call, encoded.

    Text that begins with white space waits for something to see: between thinking and a call there is often a line
    break alone, which is no message.
    """

    keep_alive = KEEP_ALIVE

    def __init__(
        self, response: ResponseObject, style: Style, namespaces: Mapping[str, tuple[str, str]] | None = None
    ) -> None:
        """`namespaces` has the namespace and the name of each function that the model knows by a joined name."""
        self.response = response
        self._style = style
        self._namespaces = namespaces or {}
        self._events: list[bytes] = []
        self._sequence = 0
        self._item: OutputMessage | OutputReasoning | OutputCall | None = None
        self._pieces: list[str] = []
        self._logprobs: list[LogprobContent] = []
        self._held = ""
        self._held_logprobs: list[LogprobContent] = []
        self._waiting: list[LogprobContent] = []

    def begin(self, accepted: Accepted) -> None:
        """The engine computes the answer."""
        self.response.status = "in_progress"
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)

    def take(self, parts: list[Part], logprobs: list[LogprobContent]) -> None:
        """More of the answer. `logprobs` are those of its text."""
        # Text may be held back in which a call may begin: its log-probabilities wait for it, those of a call are not
        # returned.
        waiting, self._waiting = self._waiting + logprobs, []
        last = max((index for index, part in enumerate(parts) if isinstance(part, Text)), default=-1)
        for index, part in enumerate(parts):
            if isinstance(part, Text):
                self._text(part.text, waiting if index == last else [])
            elif isinstance(part, Reasoning):
                self._thinking(part.text)
            elif isinstance(part, CallBegin):
                self._call(part)
            elif isinstance(part, CallArguments):
                self._arguments(part.text)
            else:
                self._close("completed" if part.whole else "incomplete")
        if not parts and not isinstance(self._item, OutputCall):
            self._waiting = waiting

    def end(self, finished: Finished, ending: Completion) -> None:
        """The answer has ended."""
        response = self.response
        cut = ending.finish_reason == "length"
        if self._held and not response.output and self._item is None:
            self._message()  # white space is the whole answer
            self._say(self._held, self._held_logprobs)
        if not response.output and self._item is None:
            self._message()
        self._close("incomplete" if cut else "completed")

        response.usage = usage_of(finished.usage)
        if cut:
            response.status = "incomplete"
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
            self._emit("response.incomplete", response=response)
        else:
            response.status = "completed"
            response.completed_at = int(time.time())
            self._emit("response.completed", response=response)

    def fail(self, error: ApiError) -> None:
        """The answer cannot go on."""
        self._close("incomplete")
        response = self.response
        response.status = "failed"
        response.error = ResponseFailure(code=_failure_code(error.status), message=error.info.message)
        if self._style.stream:
            event = responses_event(error, self._sequence)
            self._events.append(b"event: error\ndata: " + _encode(event) + b"\n\n")
            self._sequence += 1
        self._emit("response.failed", response=response)

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._close("incomplete")
        self.response.status = "cancelled"

    def drain(self) -> bytes:
        """The events since the last call."""
        events, self._events = b"".join(self._events), []
        return events

    def _text(self, text: str, logprobs: list[LogprobContent]) -> None:
        if not isinstance(self._item, OutputMessage):
            self._held += text
            self._held_logprobs += logprobs
            if not self._held.strip():
                return
            text = self._held
            logprobs = self._held_logprobs
            self._close("completed")
            self._message()
        self._say(text, logprobs)

    def _message(self) -> None:
        item = OutputMessage(id=_new_id("msg"), status="in_progress", content=[])
        self._open(item)
        self._emit("response.content_part.added", **self._location(content_index=0), part=OutputText(text=""))

    def _say(self, text: str, logprobs: list[LogprobContent]) -> None:
        self._held = ""
        self._held_logprobs = []
        self._pieces.append(text)
        self._logprobs += logprobs
        self._emit("response.output_text.delta", **self._location(content_index=0), delta=text, logprobs=logprobs)

    def _thinking(self, text: str) -> None:
        if not isinstance(self._item, OutputReasoning):
            self._close("completed")
            self._open(OutputReasoning(id=_new_id("rs"), status="in_progress"))
            if self._style.summary:
                part = SummaryText(text="")
                self._emit("response.reasoning_summary_part.added", **self._location(summary_index=0), part=part)
            else:
                self._emit(
                    "response.content_part.added", **self._location(content_index=0), part=ReasoningText(text="")
                )
        self._pieces.append(text)
        if self._style.summary:
            self._emit("response.reasoning_summary_text.delta", **self._location(summary_index=0), delta=text)
        else:
            self._emit("response.reasoning_text.delta", **self._location(content_index=0), delta=text)

    def _call(self, call: CallBegin) -> None:
        self._close("completed")
        namespace, name = self._namespaces.get(call.name, (UNSET, call.name))
        item = OutputCall(id=_new_id("fc"), status="in_progress", call_id=call.id, name=name, arguments="")
        item.namespace = namespace
        self._open(item)

    def _arguments(self, text: str) -> None:
        if text and isinstance(self._item, OutputCall):
            self._pieces.append(text)
            self._emit("response.function_call_arguments.delta", **self._location(), delta=text)

    def _open(self, item: OutputMessage | OutputReasoning | OutputCall) -> None:
        self._item = item
        self._pieces = []
        self._logprobs = []
        self._emit("response.output_item.added", output_index=len(self.response.output), item=item)

    def _close(self, status: ItemStatus) -> None:
        """End the open item, if there is one, and put it into the output."""
        item, text = self._item, "".join(self._pieces)
        self._held = ""
        self._held_logprobs = []
        if item is None:
            return
        if isinstance(item, OutputMessage):
            part = OutputText(text=text, logprobs=self._logprobs)
            location = self._location(content_index=0)
            self._emit("response.output_text.done", **location, text=text, logprobs=self._logprobs)
            self._emit("response.content_part.done", **location, part=part)
            item.content = [part]
        elif isinstance(item, OutputReasoning):
            self._close_thinking(item, text)
        else:
            item.arguments = text
            self._emit("response.function_call_arguments.done", **self._location(), arguments=text, name=item.name)

        item.status = status
        self._emit("response.output_item.done", output_index=len(self.response.output), item=item)
        self.response.output.append(item)
        self._item = None

    def _close_thinking(self, item: OutputReasoning, text: str) -> None:
        if self._style.summary:
            summary, location = SummaryText(text=text), self._location(summary_index=0)
            self._emit("response.reasoning_summary_text.done", **location, text=text)
            self._emit("response.reasoning_summary_part.done", **location, part=summary)
            item.summary = [summary]
        else:
            part, location = ReasoningText(text=text), self._location(content_index=0)
            self._emit("response.reasoning_text.done", **location, text=text)
            self._emit("response.content_part.done", **location, part=part)
            item.content = [part]
        if self._style.sealed:
            item.encrypted_content = seal(text)

    def _location(self, **index: int) -> dict[str, Any]:
        item = self._item
        return {"item_id": item.id if item else UNSET, "output_index": len(self.response.output), **index}

    def _emit(self, type: str, **fields: Any) -> None:
        if not self._style.stream:
            return
        event = ResponseEvent(type=type, sequence_number=self._sequence, **fields)
        self._sequence += 1
        self._events.append(b"event: " + type.encode() + b"\ndata: " + _encode(event) + b"\n\n")


def usage_of(usage: Usage) -> ResponseUsage:
    """The tokens of a response."""
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.reasoning_tokens),
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _failure_code(status: int) -> Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]:
    if status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if status < 500 else "server_error"


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
