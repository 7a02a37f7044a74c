"""What the routes that compute an answer have in common: following a generation, usage, timings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import UNSET, UnsetType

from ....engine.protocol.logprobs import TokenLogprobs
from ....engine.protocol.messages import Accepted, Delta, Event, Finished
from ....engine.protocol.messages import Completion as Ending
from ..gateway import Gateway
from ..generation.generation import Generation
from ..http.exchange import Exchange
from ..http.sse import DONE, KEEP_ALIVE
from ..schemas.fields import StreamOptions
from ..schemas.responses import CompletionTokensDetails, FinishReason, PromptTokensDetails, TimingInfo, UsageInfo


class ChunkWriter(Protocol):
    """Makes the events of a stream; each method returns their bytes."""

    def write(self, number: int, event: Event) -> bytes:
        """The chunks of one event of the request `number`."""

    def end(self) -> bytes:
        """The chunks after the last event."""


async def stream(gateway: Gateway, exchange: Exchange, generation: Generation, writer: ChunkWriter) -> None:
    """Send the events of a generation as they come. The status is sent with the first of them, an error instead."""
    silence_s = gateway.config.keep_alive_s or None
    while not generation.finished:
        events = await generation.take(silence_s)
        data = b"".join([writer.write(number, event) for number, event in events])
        if not exchange.started:
            await exchange.start_stream()
        if not events:
            await exchange.write(KEEP_ALIVE)
        elif generation.finished:
            await exchange.write(data + writer.end() + DONE, last=True)
        elif data:
            await exchange.write(data)


@dataclass
class Answer:
    """One completion as it was collected."""

    text: str = ""
    reasoning: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    ending: Ending | None = None


@dataclass
class Collected:
    """All of a generation: answers by (index of the request, index of the completion), ends by request."""

    answers: dict[tuple[int, int], Answer]
    finished: dict[int, Finished]


async def collect(generation: Generation) -> Collected:
    """Wait for the whole answer. Raises as Generation.take does."""
    collected = Collected({}, {})
    for number, event in await generation.take_all():
        if isinstance(event, Delta):
            answer = collected.answers.setdefault((number, event.index), Answer())
            answer.text += event.text
            answer.reasoning += event.reasoning
            answer.token_ids += event.token_ids
            if event.logprobs is not None:
                answer.logprobs = [*(answer.logprobs or ()), *event.logprobs]
        elif isinstance(event, Finished):
            collected.finished[number] = event
            for ending in event.completions:
                collected.answers.setdefault((number, ending.index), Answer()).ending = ending
    return collected


class Counter:
    """Counts tokens of a stream, for the usage at its end and in each chunk."""

    def __init__(self, options: StreamOptions | None, reasoning: bool = False) -> None:
        """With `reasoning` the usage at the end says how many tokens were thinking."""
        self._reasoning = reasoning
        self._at_end = options is not None and bool(options.include_usage)
        self._always = options is not None and bool(options.continuous_usage_stats) and self._at_end
        self._prompt_tokens: dict[int, int] = {}
        self._tokens: dict[tuple[int, int], int] = {}
        self._finished: dict[int, Finished] = {}

    def count(self, number: int, event: Event) -> None:
        """Take an event into account."""
        if isinstance(event, Delta):
            if self._always:
                key = (number, event.index)
                self._tokens[key] = self._tokens.get(key, 0) + len(event.token_ids)
        elif isinstance(event, Accepted):
            self._prompt_tokens[number] = event.prompt_tokens
        elif isinstance(event, Finished):
            self._finished[number] = event
            self._prompt_tokens[number] = event.usage.prompt_tokens

    @property
    def always(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self._always

    def so_far(self, number: int, index: int) -> UsageInfo | UnsetType | None:
        """The usage for a chunk of one completion; null where only the last chunk has it, as in OpenAI's API."""
        if not self._at_end:
            return UNSET
        if not self._always:
            return None
        prompt, new = self._prompt_tokens.get(number, 0), self._tokens.get((number, index), 0)
        return UsageInfo(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)

    def at_end(self) -> UsageInfo | None:
        """The usage of everything, for the last chunk; None if nobody asked for it."""
        return usage(self._finished.values(), reasoning=self._reasoning) if self._at_end else None

    @property
    def finished(self) -> list[Finished]:
        """The ends, in the order of the requests."""
        return [self._finished[number] for number in sorted(self._finished)]


def usage(finished: Iterable[Finished], completion_tokens: int | None = None, reasoning: bool = False) -> UsageInfo:
    """The tokens of several requests together; with `reasoning` also those of thinking."""
    each = [event.usage for event in finished]
    prompt = sum(one.prompt_tokens for one in each)
    new = sum(one.completion_tokens for one in each) if completion_tokens is None else completion_tokens
    made = UsageInfo(
        prompt_tokens=prompt,
        completion_tokens=new,
        total_tokens=prompt + new,
        prompt_tokens_details=PromptTokensDetails(sum(one.cached_tokens for one in each)),
    )
    if reasoning:
        made.completion_tokens_details = CompletionTokensDetails(sum(one.reasoning_tokens for one in each))
    return made


def timings(finished: Iterable[Finished], wanted: bool | None) -> list[TimingInfo] | UnsetType:
    """How long each request took, if that was asked for: the parts add up to the total."""
    if not wanted:
        return UNSET
    return [
        TimingInfo(
            queue_s=event.timings.queued_s,
            prefill_s=event.timings.ttft_s - event.timings.queued_s,
            decode_s=event.timings.total_s - event.timings.ttft_s,
            total_s=event.timings.total_s,
        )
        for event in finished
    ]


def reason(ending: Ending | None, calls: int = 0) -> FinishReason:
    """How a completion with so many calls of tools ended, in OpenAI's words; "abort" if the engine gave it up."""
    if ending is None or ending.finish_reason not in ("stop", "length"):
        return "abort"
    if ending.finish_reason == "length":
        return "length"
    return "tool_calls" if calls else "stop"
