"""What the faces of the API beside chat share: one way to the engine and back.

A face makes a ChatRequest of its own request, and writes its own answer from the parts of the completion.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from ....engine.errors import EngineFault, PhalanxError
from ....engine.protocol.logprobs import TokenLogprobs
from ....engine.protocol.messages import Accepted, Completion, Delta, Event, Finished, Submit, Tokenize, Tokenized
from ..gateway import Gateway, affinity_of, tokens_in
from ..generation.answer_reader import AnswerReader
from ..generation.generation import Generation
from ..generation.parts import Part
from ..http.errors import ApiError, from_engine, unavailable
from ..http.exchange import Exchange
from ..schemas.chat import ChatRequest
from ..schemas.fields import timeout_of
from ..schemas.responses import LogprobContent
from ..schemas.structured import structured_errors
from ..schemas.typed import rename
from .chat import readers, to_submit
from .logprobs import chat_logprobs

_log = logging.getLogger(__name__)


class Writer(Protocol):
    """Writes one answer, whole or as events, whose bytes `drain` gives."""

    keep_alive: bytes
    """What a stream says in silence."""

    def begin(self, accepted: Accepted) -> None:
        """The engine computes the answer."""

    def take(self, parts: list[Part], logprobs: list[LogprobContent]) -> None:
        """More of the answer; the log-probabilities are those of its text."""

    def end(self, finished: Finished, ending: Completion) -> None:
        """The answer has ended."""

    def fail(self, error: ApiError) -> None:
        """The answer cannot go on."""

    def drain(self) -> bytes:
        """The events since the last call."""


@dataclass(frozen=True)
class Turn:
    """One request on its way through the engine."""

    chat: ChatRequest
    submit: Submit
    name: str
    """The model, as answers name it."""
    reader: AnswerReader
    paths: Mapping[str, str]
    """Where the request has what chat's fields, and the protocol's, name."""
    prompt_tokens: int
    """About."""
    affinity: bytes


def prepare(gateway: Gateway, exchange: Exchange, chat: ChatRequest, paths: Mapping[str, str]) -> Turn:
    """What the engine gets. Raises ApiError with the path of the field that is wrong in the request itself."""
    name, info = gateway.model(chat.model)
    try:
        submit, messages = to_submit(gateway, exchange, chat, info)
        (reader,) = readers(chat, info, gateway, 1)
    except ApiError as error:
        rename(error, paths)
        raise

    tokens = sum(tokens_in(str(message.get("content", ""))) + 4 for message in messages)
    if submit.tools:
        tokens += tokens_in(str(submit.tools))
    first = "\0".join(str(message.get("content", "")) for message in messages[:2])
    affinity = affinity_of(submit.cache_salt, chat.prompt_cache_key or first)
    return Turn(chat, submit, name, reader, paths, tokens, affinity)


async def count_tokens(gateway: Gateway, turn: Turn) -> int:
    """Tokens of the prompt that the engine would compute for a turn. Raises ApiError."""
    submit = turn.submit
    question = Tokenize(
        id=gateway.new_id(),
        messages=submit.messages,
        tools=submit.tools,
        chat_template_kwargs=submit.chat_template_kwargs,
        add_generation_prompt=submit.add_generation_prompt,
        continue_final_message=submit.continue_final_message,
    )
    try:
        answer = await gateway.ask(question)
    except PhalanxError as error:
        raise explained(gateway, error, turn) from error
    if not isinstance(answer, Tokenized):
        raise EngineFault(f"the engine answered a Tokenize with {type(answer).__name__}")
    return len(answer.token_ids)


async def answer(gateway: Gateway, exchange: Exchange, turn: Turn, writer: Writer) -> None:
    """Have the answer written; streamed, if chat's request says so. Raises ApiError before anything was sent."""
    try:
        async with running(gateway, exchange, turn) as generation:
            if turn.chat.stream:
                await _stream(gateway, exchange, generation, turn, writer)
            else:
                await collect(generation, turn, writer)
    except (ApiError, PhalanxError) as error:
        made = explained(gateway, error, turn)
        if isinstance(error, PhalanxError) and made.status >= 500:
            _log.error("request %s failed: %s: %s", exchange.request_id, type(error).__name__, error)
        if not exchange.started:
            raise made from error
        writer.fail(made)
        await exchange.write(writer.drain(), last=True)


@contextlib.asynccontextmanager
async def running(
    gateway: Gateway, exchange: Exchange, turn: Turn, *, detached: bool = False
) -> AsyncIterator[Generation]:
    """The turn's generation, let in and sent, until the block ends. Raises ApiError or PhalanxError."""
    timeout_s = timeout_of(turn.chat.timeout, gateway.config)
    async with (
        structured_errors(turn.chat, turn.submit.structured, turn.chat.tools),
        gateway.generation(exchange, bool(turn.chat.stream), timeout_s, detached=detached) as generation,
    ):
        generation.admit(1, turn.prompt_tokens)
        await generation.start([turn.submit], turn.affinity)
        yield generation


async def collect(generation: Generation, turn: Turn, writer: Writer) -> None:
    """Wait for the whole answer. Raises as Generation.take does."""
    # That the engine has begun is told at once: who asks for a response in the background sees it.
    for _, event in await generation.take():
        _feed(event, turn, writer)
    if not generation.finished:
        for _, event in await generation.take_all():
            _feed(event, turn, writer)


def explained(gateway: Gateway, error: ApiError | PhalanxError, turn: Turn) -> ApiError:
    """The error as the request's own: its fields have the names that they have there."""
    if isinstance(error, ApiError):
        rename(error, turn.paths)
        return error
    made = from_engine(error, {name: name for name in _PROTOCOL_FIELDS})
    rename(made, turn.paths)
    if made.status == 429:
        made.headers["Retry-After"] = str(gateway.admission.retry_after())
    return made


_PROTOCOL_FIELDS = (
    "prompt", "messages", "tools", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs",
    "chat_template_kwargs", "priority", "cache_salt", "presence_penalty", "frequency_penalty", "response_format",
)  # fmt: skip


async def _stream(gateway: Gateway, exchange: Exchange, generation: Generation, turn: Turn, writer: Writer) -> None:
    """Send the events as they come. The status is sent with the first of them, an error instead."""
    silence_s = gateway.config.keep_alive_s or None
    while not generation.finished:
        events = await generation.take(silence_s)
        for _, event in events:
            _feed(event, turn, writer)
        data = writer.drain() if events else writer.keep_alive
        if not exchange.started:
            await exchange.start_stream()
        if generation.finished:
            await exchange.write(data, last=True)
        elif data:
            await exchange.write(data)


def _feed(event: Event, turn: Turn, writer: Writer) -> None:
    if isinstance(event, Accepted):
        writer.begin(event)
    elif isinstance(event, Delta):
        writer.take(turn.reader.feed(event), _text_logprobs(event) if turn.chat.logprobs else [])
    elif isinstance(event, Finished):
        (ending,) = event.completions
        if ending.finish_reason == "abort":
            raise unavailable("the engine gave this request up; try again", "aborted")
        writer.take(turn.reader.finish(), [])
        writer.end(event, ending)


def _text_logprobs(delta: Delta) -> list[LogprobContent]:
    """The log-probabilities of a Delta's text, without those of thinking and of tokens that have no text."""
    entries: list[TokenLogprobs] = delta.logprobs or []
    if not delta.text:
        return []
    if delta.reasoning:
        # Thinking comes first: the text's tokens are the last ones.
        left, first = len(delta.text.encode()), len(entries)
        while first and left > 0:
            first -= 1
            left -= len(entries[first].token_bytes)
        entries = entries[first:]
    return chat_logprobs(entries, as_ids=False).content or []
