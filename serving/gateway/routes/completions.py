"""/v1/completions."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from msgspec import UNSET

from ....engine.errors import EngineFault
from ....engine.protocol.messages import Delta, Event, Finished, ModelInfo, Submit, Tokenize, Tokenized
from ..gateway import Gateway, affinity_of, tokens_in
from ..http.exchange import Exchange
from ..http.sse import TextEvent
from ..http.sse import event as sse_event
from ..schemas.completions import CompletionRequest, Prompt, check_completion, prompts_of
from ..schemas.fields import check_store, check_stream, kept_tokens, timeout_of, to_sampling
from ..schemas.refused import REFUSED_COMPLETION
from ..schemas.responses import Completion, CompletionChoice
from ..schemas.structured import structured_errors, structured_of
from .answering import Answer, Collected, Counter, collect, reason, stream, timings, usage
from .logprobs import CompletionLogprobsWriter, prompt_logprobs

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class _Echo:
    """A prompt as it comes back."""

    text: str
    first_token_id: int
    first_token_bytes: bytes


async def completions(gateway: Gateway, exchange: Exchange) -> None:
    """Continue one or several prompts."""
    request = await exchange.read(CompletionRequest, REFUSED_COMPLETION)
    exchange.take_request_id(request.request_id)
    check_store(request)
    check_stream(request.stream, request.stream_options, request.prompt_logprobs)
    check_completion(request)
    prompts = prompts_of(request, gateway.config)
    name, info = gateway.model(request.model)
    kept = kept_tokens(request.truncate_prompt_tokens, info, _new_tokens(request))
    if kept is not None:
        prompts = [prompt if isinstance(prompt, str) else prompt[-kept:] for prompt in prompts]

    # Checked before anything is asked of an engine.
    submits = _to_submits(gateway, exchange, request, info, prompts, kept)
    tokens = sum(tokens_in(prompt) if isinstance(prompt, str) else len(prompt) for prompt in prompts)
    affinity = affinity_of(submits[0].cache_salt, request.prompt_cache_key or prompts[0])
    timeout_s = timeout_of(request.timeout, gateway.config)
    async with (
        structured_errors(request, submits[0].structured),
        gateway.generation(exchange, bool(request.stream), timeout_s) as generation,
    ):
        generation.admit(len(prompts), tokens)
        echoes: list[_Echo] = []
        if request.echo:
            tokenized = await asyncio.gather(*(_tokenized(gateway, request, prompt, kept) for prompt in prompts))
            echoes = [
                _echo(prompt if kept is None else None, answer)
                for prompt, answer in zip(prompts, tokenized, strict=True)
            ]
            # The same tokens for the answer as for the echo.
            submits = _to_submits(gateway, exchange, request, info, [answer.token_ids for answer in tokenized])
        await generation.start(submits, affinity)

        style = _Style(request, f"cmpl-{exchange.request_id}", name, echoes)
        if request.stream:
            await stream(gateway, exchange, generation, _Writer(style, len(prompts)))
        else:
            answer = style.whole(await collect(generation), len(prompts))
            await exchange.respond_json(answer)


def _to_submits(
    gateway: Gateway,
    exchange: Exchange,
    request: CompletionRequest,
    info: ModelInfo,
    prompts: list[Prompt] | list[list[int]],
    kept: int | None = None,
) -> list[Submit]:
    # Log-probabilities of an echoed prompt are the engine's prompt_logprobs.
    of_prompt = [request.prompt_logprobs, request.logprobs if request.echo else None]
    sampling = to_sampling(
        request,
        gateway.config,
        info,
        max_tokens=_new_tokens(request),
        logprobs=request.logprobs,
        prompt_logprobs=max((count for count in of_prompt if count is not None), default=None),
    )

    structured = structured_of(request)
    return [
        Submit(
            id=gateway.new_id(),
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else prompt,
            truncate_prompt_tokens=kept,
            add_special_tokens=request.add_special_tokens is not False,
            sampling=sampling,
            structured=structured,
            priority=request.priority or 0,
            cache_salt=exchange.salted(request.cache_salt),
            return_prompt_token_ids=bool(request.return_token_ids),
        )
        for prompt in prompts
    ]


def _new_tokens(request: CompletionRequest) -> int:
    """Most new tokens. No engine computes a prompt alone: one token is sampled then, and left out of the answer."""
    return max(1, _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens)


async def _tokenized(gateway: Gateway, request: CompletionRequest, prompt: Prompt, kept: int | None) -> Tokenized:
    is_text = isinstance(prompt, str)
    question = Tokenize(
        id=gateway.new_id(),
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else prompt,
        truncate_prompt_tokens=kept,
        add_special_tokens=is_text and request.add_special_tokens is not False,
    )
    answer = await gateway.ask(question)
    if not isinstance(answer, Tokenized):
        raise EngineFault(f"the engine answered a Tokenize with {type(answer).__name__}")
    return answer


def _echo(prompt: Prompt | None, answer: Tokenized) -> _Echo:
    """`prompt` is None if not all of it is kept."""
    text = prompt if isinstance(prompt, str) else b"".join(answer.token_bytes).decode(errors="replace")
    if not answer.token_ids:
        return _Echo(text, 0, b"")
    return _Echo(text, answer.token_ids[0], answer.token_bytes[0])


class _Style:
    """How one request's answers are written."""

    def __init__(self, request: CompletionRequest, name: str, model: str, echoes: list[_Echo]) -> None:
        self.request = request
        self.name = name
        self.model = model
        self.echoes = echoes
        self.created = int(time.time())
        self.n = request.n or 1
        self.prompt_alone = request.max_tokens == 0

    def logprobs_writer(self) -> CompletionLogprobsWriter:
        """What makes the log-probabilities of one completion."""
        return CompletionLogprobsWriter(bool(self.request.return_tokens_as_token_ids), bool(self.request.logprobs))

    def whole(self, collected: Collected, prompts: int) -> Completion:
        """The answers in one piece."""
        finished = [collected.finished[number] for number in range(prompts)]
        choices = [
            self._choice(number, index, collected.answers.get((number, index), Answer()), finished[number])
            for number in range(prompts)
            for index in range(self.n)
        ]
        return Completion(
            id=self.name,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage(finished, 0 if self.prompt_alone else None),
            timings=timings(finished, self.request.return_timings),
        )

    def _choice(self, number: int, index: int, answer: Answer, finished: Finished) -> CompletionChoice:
        request = self.request
        if self.prompt_alone:
            answer.text = ""
            answer.token_ids = []
            answer.logprobs = []
        choice = CompletionChoice(
            index=number * self.n + index,
            text=answer.text,
            finish_reason="length" if self.prompt_alone else reason(answer.ending),
            stop_reason=answer.ending.stop_reason if answer.ending and not self.prompt_alone else None,
        )
        if self.echoes:
            choice.text = self.echoes[number].text + choice.text
        if request.logprobs is not None:
            writer = self.logprobs_writer()
            if self.echoes:
                writer.first(self.echoes[number].first_token_id, self.echoes[number].first_token_bytes)
                writer.add(finished.prompt_logprobs or [])
            writer.add(answer.logprobs or [])
            choice.logprobs = writer.take()
        if request.return_token_ids:
            choice.token_ids = answer.token_ids
            choice.prompt_token_ids = finished.prompt_token_ids or []
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(finished.prompt_logprobs or [])
        return choice


class _Writer:
    """The chunks of streamed answers: the echo, what is new, how each ended, the usage."""

    def __init__(self, style: _Style, prompts: int) -> None:
        self._style = style
        self._counter = Counter(style.request.stream_options)
        self._logprobs = {}
        if style.request.logprobs is not None:
            choices = [(number, index) for number in range(prompts) for index in range(style.n)]
            self._logprobs = {each: style.logprobs_writer() for each in choices}
        self._begun: set[int] = set()
        self._text_events: dict[tuple[int, int], TextEvent] = {}
        # Chunks without text are sent only where they hold something else.
        self._every_token = bool(self._logprobs or style.request.return_token_ids) or self._counter.always

    def write(self, number: int, event: Event) -> bytes:
        self._counter.count(number, event)
        begun = b"" if number in self._begun else self._begin(number)
        if isinstance(event, Delta):
            return begun + self._delta(number, event)
        if isinstance(event, Finished):
            return begun + self._finish(number, event)
        return begun

    def end(self) -> bytes:
        usage_at_end = self._counter.at_end()
        request = self._style.request
        if usage_at_end is None and not request.return_timings:
            return b""
        if usage_at_end is not None and self._style.prompt_alone:
            usage_at_end = usage(self._counter.finished, 0)
        return sse_event(
            Completion(
                id=self._style.name,
                created=self._style.created,
                model=self._style.model,
                choices=[],
                usage=UNSET if usage_at_end is None else usage_at_end,
                timings=timings(self._counter.finished, request.return_timings),
            )
        )

    def _begin(self, number: int) -> bytes:
        self._begun.add(number)
        if not self._style.echoes:
            return b""
        text = self._style.echoes[number].text
        return b"".join(
            self._chunk(number, index, CompletionChoice(index=0, text=text)) for index in range(self._style.n)
        )

    def _delta(self, number: int, delta: Delta) -> bytes:
        style = self._style
        if style.prompt_alone:
            return b""
        if not self._every_token:
            return self._text(number, delta.index, delta.text) if delta.text else b""
        choice = CompletionChoice(index=0, text=delta.text)
        if self._logprobs:
            writer = self._logprobs[number, delta.index]
            writer.add(delta.logprobs or [])
            choice.logprobs = writer.take()
        if style.request.return_token_ids:
            choice.token_ids = delta.token_ids
        return self._chunk(number, delta.index, choice)

    def _text(self, number: int, index: int, text: str) -> bytes:
        made = self._text_events.get((number, index))
        if made is None:
            marked = CompletionChoice(index=0, text=TextEvent.MARK)
            made = self._text_events[number, index] = TextEvent(self._chunk(number, index, marked))
        return made.filled(text)

    def _finish(self, number: int, event: Finished) -> bytes:
        chunks = []
        for ending in event.completions:
            choice = CompletionChoice(
                index=0,
                text="",
                finish_reason="length" if self._style.prompt_alone else reason(ending),
                stop_reason=None if self._style.prompt_alone else ending.stop_reason,
            )
            if self._style.request.return_token_ids:
                choice.token_ids, choice.prompt_token_ids = [], event.prompt_token_ids or []
            chunks.append(self._chunk(number, ending.index, choice))
        return b"".join(chunks)

    def _chunk(self, number: int, index: int, choice: CompletionChoice) -> bytes:
        style = self._style
        choice.index = number * style.n + index
        return sse_event(
            Completion(
                id=style.name,
                created=style.created,
                model=style.model,
                choices=[choice],
                usage=self._counter.so_far(number, index),
            )
        )
