"""How an answer of /v1/chat/completions is written, in one piece or as a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable

from msgspec import UNSET

from ....engine.protocol.messages import Completion as Ending
from ....engine.protocol.messages import Delta, Event, Finished
from ..generation.answer_reader import AnswerReader
from ..generation.parts import CallArguments, CallBegin, Part, Reasoning, Text
from ..http.sse import TextEvent
from ..http.sse import event as sse_event
from ..schemas.chat import ChatRequest
from ..schemas.responses import (
    AnswerMessage,
    AnswerToolCall,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    FunctionDelta,
    ToolCallDelta,
)
from .answering import Answer, Collected, Counter, reason, timings, usage
from .logprobs import chat_logprobs, prompt_logprobs


class ChatStyle:
    """How one request's answer is written."""

    def __init__(
        self, request: ChatRequest, name: str, model: str, messages: list[dict[str, object]], reasoning: bool
    ) -> None:
        """`reasoning` says whether thinking was split off."""
        self.request = request
        self.name = name
        self.model = model
        self.reasoning = reasoning
        self.created = int(time.time())
        self.n = request.n or 1
        self.as_ids = bool(request.return_tokens_as_token_ids)
        # An answer without the beginning of a turn goes on with the last one, as in vLLM's server.
        last = messages[-1]
        opens_turn = request.add_generation_prompt is not False and not request.continue_final_message
        self.role = "assistant" if opens_turn else str(last["role"])
        self.echo = str(last["content"]) if request.echo and last["role"] == self.role else ""

    def whole(self, collected: Collected, readers: list[AnswerReader]) -> ChatCompletion:
        """The answer in one piece."""
        finished = collected.finished[0]
        choices = [
            self._choice(index, collected.answers.get((0, index), Answer()), reader)
            for index, reader in enumerate(readers)
        ]
        made = ChatCompletion(
            id=self.name,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage([finished], reasoning=self.reasoning),
            service_tier="default" if self.request.service_tier else UNSET,
            timings=timings([finished], self.request.return_timings),
        )
        if self.request.prompt_logprobs is not None:
            made.prompt_logprobs = prompt_logprobs(finished.prompt_logprobs or [])
        if self.request.return_token_ids:
            made.prompt_token_ids = finished.prompt_token_ids or []
        return made

    def _choice(self, index: int, answer: Answer, reader: AnswerReader) -> ChatChoice:
        parts = reader.whole(answer.reasoning, answer.text)
        made = ChatChoice(
            index=index,
            message=self._message(parts),
            logprobs=chat_logprobs(answer.logprobs or [], self.as_ids) if self.request.logprobs else None,
            finish_reason=reason(answer.ending, reader.calls),
            stop_reason=answer.ending.stop_reason if answer.ending else None,
            token_ids=answer.token_ids if self.request.return_token_ids else UNSET,
        )
        if answer.ending is not None and answer.ending.thinking:
            made.ended_in_reasoning = True
        return made

    def _message(self, parts: list[Part]) -> AnswerMessage:
        texts, thoughts = [self.echo], []
        calls: list[AnswerToolCall] = []
        arguments: dict[int, list[str]] = {}
        for part in parts:
            if isinstance(part, Text):
                texts.append(part.text)
            elif isinstance(part, Reasoning):
                thoughts.append(part.text)
            elif isinstance(part, CallBegin):
                calls.append(AnswerToolCall(id=part.id, function=CalledFunction(name=part.name, arguments="")))
            elif isinstance(part, CallArguments):
                arguments.setdefault(part.call, []).append(part.text)
        for number, pieces in arguments.items():
            calls[number].function.arguments = "".join(pieces)

        text = "".join(texts)
        made = AnswerMessage(role=self.role, content=text if text or not (calls or thoughts) else None)
        if calls:
            made.tool_calls = calls
        if thoughts:
            made.reasoning = made.reasoning_content = "".join(thoughts)
        return made


class ChatWriter:
    """The chunks of a streamed answer: the role, what is new, how it ended, the usage."""

    def __init__(self, style: ChatStyle, readers: list[AnswerReader]) -> None:
        self._style = style
        self._readers = readers
        self._counter = Counter(style.request.stream_options, style.reasoning)
        self._begun = False
        self._text_events: dict[tuple[int, type[Part]], TextEvent] = {}
        # Chunks without text are sent only where they hold something else.
        self._every_token = bool(style.request.logprobs or style.request.return_token_ids) or self._counter.always

    def write(self, number: int, event: Event) -> bytes:
        self._counter.count(number, event)
        begun = b"" if self._begun else self._begin()
        if isinstance(event, Delta):
            return begun + self._delta(event)
        if isinstance(event, Finished):
            return begun + b"".join(map(self._end_of, event.completions))
        return begun

    def end(self) -> bytes:
        style, usage_at_end = self._style, self._counter.at_end()
        finished = self._counter.finished
        wants_ids = bool(style.request.return_token_ids)
        if usage_at_end is None and not style.request.return_timings and not wants_ids:
            return b""
        return sse_event(
            ChatChunk(
                id=style.name,
                created=style.created,
                model=style.model,
                choices=[],
                usage=UNSET if usage_at_end is None else usage_at_end,
                timings=timings(finished, style.request.return_timings),
                prompt_token_ids=(finished[0].prompt_token_ids or []) if wants_ids and finished else UNSET,
            )
        )

    def _begin(self) -> bytes:
        self._begun = True
        style = self._style
        roles = [ChatChunkChoice(index=index, delta=ChatDelta(role=style.role, content="")) for index in range(style.n)]
        echoes = [
            ChatChunkChoice(index=index, delta=ChatDelta(content=style.echo)) for index in range(style.n) if style.echo
        ]
        return b"".join(map(self._chunk, roles + echoes))

    def _delta(self, delta: Delta) -> bytes:
        style = self._style
        parts = self._readers[delta.index].feed(delta)
        if not self._every_token:
            return self._written(delta.index, parts)

        # The first chunk of a delta has what there is of its tokens, also if it has nothing else yet.
        deltas = [made for part in parts if (made := _chat_delta(part)) is not None] or [ChatDelta(content="")]
        choices = [ChatChunkChoice(index=delta.index, delta=each) for each in deltas]
        if style.request.logprobs:
            choices[0].logprobs = chat_logprobs(delta.logprobs or [], style.as_ids)
        if style.request.return_token_ids:
            choices[0].token_ids = delta.token_ids
        return b"".join(map(self._chunk, choices))

    def _end_of(self, ending: Ending) -> bytes:
        reader = self._readers[ending.index]
        rest = self._written(ending.index, reader.finish())
        choice = ChatChunkChoice(
            index=ending.index,
            delta=ChatDelta(),
            finish_reason=reason(ending, reader.calls),
            stop_reason=ending.stop_reason,
        )
        if ending.thinking:
            choice.ended_in_reasoning = True
        return rest + self._chunk(choice)

    def _written(self, index: int, parts: Iterable[Part]) -> bytes:
        return b"".join([self._part(index, part) for part in parts])

    def _part(self, index: int, part: Part) -> bytes:
        if not isinstance(part, Text | Reasoning):
            made = _chat_delta(part)
            return b"" if made is None else self._chunk(ChatChunkChoice(index=index, delta=made))

        # While usage is in every chunk none is like another.
        if self._counter.always:
            return self._chunk(ChatChunkChoice(index=index, delta=_text_delta(type(part), part.text)))
        known = self._text_events.get((index, type(part)))
        if known is None:
            marked = ChatChunkChoice(index=index, delta=_text_delta(type(part), TextEvent.MARK))
            known = self._text_events[index, type(part)] = TextEvent(self._chunk(marked))
        return known.filled(part.text)

    def _chunk(self, choice: ChatChunkChoice) -> bytes:
        style = self._style
        return sse_event(
            ChatChunk(
                id=style.name,
                created=style.created,
                model=style.model,
                choices=[choice],
                usage=self._counter.so_far(0, choice.index),
            )
        )


def _text_delta(kind: type[Part], text: str) -> ChatDelta:
    return ChatDelta(content=text) if kind is Text else ChatDelta(reasoning=text, reasoning_content=text)


def _chat_delta(part: Part) -> ChatDelta | None:
    """What a part adds to the message; None for the end of a call, which has no chunk."""
    if isinstance(part, Text | Reasoning):
        return _text_delta(type(part), part.text)
    if isinstance(part, CallBegin):
        function = FunctionDelta(name=part.name, arguments="")
        return ChatDelta(tool_calls=[ToolCallDelta(index=part.call, id=part.id, type="function", function=function)])
    if isinstance(part, CallArguments):
        return ChatDelta(tool_calls=[ToolCallDelta(index=part.call, function=FunctionDelta(arguments=part.text))])
    return None
