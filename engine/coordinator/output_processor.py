"""From sampled tokens to what a client reads: text as it becomes whole, stop strings held back, timings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..protocol.messages import Completion, Delta, Event, Finished, Submit, Timings, Usage
from ..scheduling.request import Request, SequenceUpdate
from .tokenizer import IncrementalDetokenizer, Tokenizer


class StopStrings:
    """Finds the first of several strings in a growing text, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self._too_early = 0  # characters held in which no stop string may end

    def feed(self, text: str, last: bool = False, too_early: bool = False) -> tuple[str, str | None]:
        """(text that may be shown, the stop string that was reached or None). With `last` nothing is held back.

        A stop string that ends in text which came `too_early` (before min_tokens) is text like any other.
        """
        if not self._stops:
            return text, None
        self._held += text
        if too_early:
            self._too_early = len(self._held)

        # The one whose text was complete first is the one a reader of the stream would have met.
        found = [(place + len(stop), place, stop) for stop in self._stops if (place := self._find(stop)) >= 0]
        if found:
            _, place, stop = min(found)
            shown, self._held = self._held[:place], ""
            return shown, stop

        keep = 0 if last else self._longest_beginning()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        self._too_early = max(0, self._too_early - len(shown))
        return shown, None

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._too_early - len(stop) + 1))

    def _longest_beginning(self) -> int:
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0


@dataclass
class _CompletionState:
    detokenizer: IncrementalDetokenizer | None
    stops: StopStrings
    completion: Completion | None = None
    tokens: int = 0


@dataclass
class _RequestState:
    client: bytes
    id: str
    submit: Submit
    completions: list[_CompletionState] = field(default_factory=list)


Emit = Callable[[bytes, Event], None]
StopFound = Callable[[str, int, str], None]


class OutputProcessor:
    """Owns the text of every running request. Used by one thread.

    `emit(client, event)` delivers; `stop_found(request_id, index, stop)` asks the scheduler to finish a sequence.
    """

    def __init__(self, tokenizer: Tokenizer | None, emit: Emit, stop_found: StopFound) -> None:
        self._tokenizer, self._emit, self._stop_found = tokenizer, emit, stop_found
        self._requests: dict[str, _RequestState] = {}

    def start(self, client: bytes, submit: Submit, request_id: str, prompt: Sequence[int]) -> None:
        """Expect updates for a request that was accepted, with these token ids of its prompt."""
        state = _RequestState(client, submit.id, submit)
        for _ in range(submit.sampling.n):
            decoder = None
            if self._tokenizer is not None:
                decoder = self._tokenizer.decoder(submit.sampling.skip_special_tokens, prompt)
            state.completions.append(_CompletionState(decoder, StopStrings(submit.sampling.stop)))
        self._requests[request_id] = state

    def forget(self, request_id: str) -> _RequestState | None:
        """No more updates will come (the request failed)."""
        return self._requests.pop(request_id, None)

    def update(self, update: SequenceUpdate) -> None:
        """Take in one step's news of one sequence, and emit what a client may see of it."""
        state = self._requests.get(update.request.id)
        if state is None:
            return
        index = update.sequence.index
        completion = state.completions[index]
        if completion.completion is None:
            self._advance(state, completion, update)
        if update.request_finished:
            del self._requests[update.request.id]
            self._emit(state.client, _finished(state, update.request))

    def _advance(self, state: _RequestState, completion: _CompletionState, update: SequenceUpdate) -> None:
        request, index = update.request, update.sequence.index
        text, stop, used = "", None, 0
        min_tokens = state.submit.sampling.min_tokens
        for token in update.token_ids:
            used += 1
            shown, stop = self._text(completion, token, request, completion.tokens + used < min_tokens)
            text += shown
            if stop is not None:
                break

        finished = update.finish_reason is not None
        if stop is None and finished:
            rest = completion.detokenizer.flush() if completion.detokenizer else ""
            shown, stop = completion.stops.feed(rest, last=True)
            text += shown

        if stop is not None:
            completion.completion = Completion(index, "stop", stop)
            if not finished:
                self._stop_found(request.id, index, stop)
        elif finished:
            completion.completion = Completion(index, str(update.finish_reason), update.stop_reason)

        completion.tokens += used
        if used or text:
            logprobs = update.logprobs[:used] if update.logprobs else None
            self._emit(state.client, Delta(state.id, index, text, update.token_ids[:used], logprobs))

    def _text(
        self, completion: _CompletionState, token: int, request: Request, too_early: bool
    ) -> tuple[str, str | None]:
        # The token that ends an answer is reported among the token ids but is no part of the text.
        if completion.detokenizer is None or token in request.eos_token_ids or token in request.stop_token_ids:
            return "", None
        return completion.stops.feed(completion.detokenizer.step(token), too_early=too_early)


def _finished(state: _RequestState, request: Request) -> Finished:
    completions = [
        completion.completion or Completion(index, "abort") for index, completion in enumerate(state.completions)
    ]
    usage = Usage(
        len(request.prompt), sum(completion.tokens for completion in state.completions), request.cached_tokens
    )
    return Finished(state.id, completions, usage, timings(request), request.prompt, request.prompt_logprobs)


def timings(request: Request) -> Timings:
    """How long a finished request waited and took; what never happened (an abort in the queue) counts until the end."""
    sequences, arrived = request.sequences, request.arrived_at or 0.0
    ended = max((sequence.finished_at or arrived for sequence in sequences), default=arrived)
    scheduled = min((s.first_scheduled_at for s in sequences if s.first_scheduled_at is not None), default=ended)
    first = min((s.first_token_at for s in sequences if s.first_token_at is not None), default=ended)

    spans = [
        (s.last_token_at - s.first_token_at, s.num_output - 1)
        for s in sequences
        if s.first_token_at is not None and s.last_token_at is not None and s.num_output > 1
    ]
    steps = sum(count for _, count in spans)
    tpot = 1000 * sum(span for span, _ in spans) / steps if steps else 0.0
    return Timings(scheduled - arrived, first - arrived, tpot, ended - arrived)
