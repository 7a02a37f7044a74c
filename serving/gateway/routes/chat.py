"""/v1/chat/completions."""

from __future__ import annotations

import time

from msgspec import UNSET

from ....engine.protocol.messages import Delta, Event, Finished, ModelInfo, Submit
from ..gateway import Gateway, affinity_of, tokens_in
from ..http.exchange import Exchange
from ..http.sse import TextEvent
from ..http.sse import event as sse_event
from ..schemas.chat import ChatRequest, check_chat, template_messages
from ..schemas.fields import check_store, check_stream, timeout_of, to_sampling
from ..schemas.refused import REFUSED_CHAT
from ..schemas.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
)
from ..schemas.structured import structured_errors, structured_of
from .answering import Answer, Collected, Counter, collect, reason, stream, timings, usage
from .logprobs import chat_logprobs, prompt_logprobs


async def chat_completions(gateway: Gateway, exchange: Exchange) -> None:
    """Continue a conversation."""
    request = await exchange.read(ChatRequest, REFUSED_CHAT)
    exchange.take_request_id(request.request_id)
    name, info = gateway.model(request.model)
    submit, messages = to_submit(gateway, exchange, request, info)
    style = _Style(request, f"chatcmpl-{exchange.request_id}", name, messages)

    tokens = sum(tokens_in(str(message.get("content", ""))) + 4 for message in messages)
    first = "\0".join(str(message.get("content", "")) for message in messages[:2])
    affinity = affinity_of(submit.cache_salt, request.prompt_cache_key or first)
    timeout_s = timeout_of(request.timeout, gateway.config)
    async with (
        structured_errors(request),
        gateway.generation(exchange, bool(request.stream), timeout_s) as generation,
    ):
        generation.admit(1, tokens)
        generation.start([submit], affinity)
        if request.stream:
            await stream(gateway, exchange, generation, _Writer(style))
        else:
            answer = style.whole(await collect(generation))
            await exchange.respond_json(answer)


def to_submit(
    gateway: Gateway, exchange: Exchange, request: ChatRequest, info: ModelInfo
) -> tuple[Submit, list[dict[str, object]]]:
    """The protocol's request, and its messages. Raises ApiError for what the server does not do."""
    check_chat(request, gateway.config)
    check_store(request)
    check_stream(request.stream, request.stream_options, request.prompt_logprobs)
    messages = template_messages(request.messages)
    newer = request.max_completion_tokens is not None
    sampling = to_sampling(
        request,
        gateway.config,
        info,
        max_tokens=request.max_completion_tokens if newer else request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=request.prompt_logprobs,
        max_tokens_field="max_completion_tokens" if newer else "max_tokens",
        logprobs_field="top_logprobs",
    )
    continues = bool(request.continue_final_message)
    generation_prompt = request.add_generation_prompt
    submit = Submit(
        id=gateway.new_id(),
        messages=messages,
        tools=request.tools,
        chat_template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=not continues if generation_prompt is None else generation_prompt,
        continue_final_message=continues,
        sampling=sampling,
        structured=structured_of(request),
        priority=request.priority or 0,
        cache_salt=exchange.salted(request.cache_salt),
        return_prompt_token_ids=bool(request.return_token_ids),
    )
    return submit, messages


class _Style:
    """How one request's answer is written."""

    def __init__(self, request: ChatRequest, name: str, model: str, messages: list[dict[str, object]]) -> None:
        self.request, self.name, self.model = request, name, model
        self.created = int(time.time())
        self.n = request.n or 1
        self.as_ids = bool(request.return_tokens_as_token_ids)
        # An answer without the beginning of a turn goes on with the last one, as in vLLM's server.
        last = messages[-1]
        opens_turn = request.add_generation_prompt is not False and not request.continue_final_message
        self.role = "assistant" if opens_turn else str(last["role"])
        self.echo = str(last["content"]) if request.echo and last["role"] == self.role else ""

    def whole(self, collected: Collected) -> ChatCompletion:
        """The answer in one piece."""
        finished = collected.finished[0]
        choices = [self._choice(index, collected.answers.get((0, index), Answer())) for index in range(self.n)]
        made = ChatCompletion(
            id=self.name,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage([finished]),
            service_tier="default" if self.request.service_tier else UNSET,
            timings=timings([finished], self.request.return_timings),
        )
        if self.request.prompt_logprobs is not None:
            made.prompt_logprobs = prompt_logprobs(finished.prompt_logprobs or [])
        if self.request.return_token_ids:
            made.prompt_token_ids = finished.prompt_token_ids or []
        return made

    def _choice(self, index: int, answer: Answer) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AnswerMessage(role=self.role, content=self.echo + answer.text),
            logprobs=chat_logprobs(answer.logprobs or [], self.as_ids) if self.request.logprobs else None,
            finish_reason=reason(answer.ending),
            stop_reason=answer.ending.stop_reason if answer.ending else None,
            token_ids=answer.token_ids if self.request.return_token_ids else UNSET,
        )


class _Writer:
    """The chunks of a streamed answer: the role, what is new, how it ended, the usage."""

    def __init__(self, style: _Style) -> None:
        self._style = style
        self._counter = Counter(style.request.stream_options)
        self._begun = False
        self._text_events: dict[int, TextEvent] = {}
        # Chunks without text are sent only where they hold something else.
        self._every_token = bool(style.request.logprobs or style.request.return_token_ids) or self._counter.always

    def write(self, number: int, event: Event) -> bytes:
        self._counter.count(number, event)
        begun = b"" if self._begun else self._begin()
        if isinstance(event, Delta):
            return begun + self._delta(event)
        if isinstance(event, Finished):
            return begun + b"".join(
                self._chunk(
                    ChatChunkChoice(
                        index=ending.index,
                        delta=ChatDelta(),
                        finish_reason=reason(ending),
                        stop_reason=ending.stop_reason,
                    )
                )
                for ending in event.completions
            )
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
        if not self._every_token:
            return self._text(delta.index, delta.text) if delta.text else b""
        choice = ChatChunkChoice(index=delta.index, delta=ChatDelta(content=delta.text))
        if style.request.logprobs:
            choice.logprobs = chat_logprobs(delta.logprobs or [], style.as_ids)
        if style.request.return_token_ids:
            choice.token_ids = delta.token_ids
        return self._chunk(choice)

    def _text(self, index: int, text: str) -> bytes:
        made = self._text_events.get(index)
        if made is None:
            marked = ChatChunkChoice(index=index, delta=ChatDelta(content=TextEvent.MARK))
            made = self._text_events[index] = TextEvent(self._chunk(marked))
        return made.filled(text)

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
