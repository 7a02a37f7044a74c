"""From sampled tokens to what a client reads: text as it becomes whole, stop strings held back, timings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..protocol.logprobs import TokenLogprobs
from ..protocol.messages import (
    Accepted,
    Completion,
    Delta,
    Event,
    Finished,
    ResumedCompletion,
    Submit,
    Timings,
    Usage,
)
from ..protocol.sampling_params import SamplingParams
from ..scheduling.request import Request, SequenceUpdate
from .text.reasoning import ReasoningSplitter
from .text.token_text import INCOMPLETE_BYTES, IncrementalDetokenizer
from .tokenizer import Tokenizer


class StopStrings:
    """Finds the first of several strings in a growing text, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        """With `include` the stop string that ends the text is shown too."""
        self._stops = stops
        self._include = include
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
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._find(stop)) >= 0]
        if found:
            end, start, stop = min(found)
            shown, self._held = self._held[: end if self._include else start], ""
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


class _Delivered:
    """Cuts off the beginning of a resumed completion, which the client has from an engine before this one."""

    def __init__(self, completion: ResumedCompletion) -> None:
        self._tokens = len(completion.token_ids)
        self._characters = completion.characters
        self._reasoning_characters = completion.reasoning_characters

    def rest_of(self, token_ids: list[int], text: str, reasoning: str) -> tuple[list[int], str, str]:
        """Return what the client has not of the next tokens, text and thinking.

        The tokens are taken in like all others; only telling them again is left out.
        """
        tokens = min(len(token_ids), self._tokens)
        characters = min(len(text), self._characters)
        reasoning_characters = min(len(reasoning), self._reasoning_characters)
        self._tokens -= tokens
        self._characters -= characters
        self._reasoning_characters -= reasoning_characters
        return token_ids[tokens:], text[characters:], reasoning[reasoning_characters:]


@dataclass(slots=True)
class _CompletionState:
    detokenizer: IncrementalDetokenizer | None
    stops: StopStrings
    splitter: ReasoningSplitter | None = None
    """None where thinking is text like any other."""
    completion: Completion | None = None
    tokens: int = 0
    """Tokens that went out."""
    decoded: int = 0
    """Characters that the detokenizer gave: those that went out, those in `ready`, and those that are held back."""
    sent: int = 0
    """Characters that went out."""
    ready: str = ""
    """Text that may go out, with the rest of its token's text."""
    held: deque[_HeldToken] = field(default_factory=deque)
    """Tokens that wait for their text."""
    delivered: _Delivered | None = None
    """What is not sent of a resumed completion; None of any other."""
    reasoning_tokens: int = 0
    """Tokens of thinking that went out."""

    @property
    def ends_within_thinking(self) -> bool:
        """Whether thinking is all that it has said so far."""
        return self.splitter is not None and self.splitter.ends_within_thinking(self.sent + len(self.ready))


@dataclass(slots=True)
class _HeldToken:
    token_id: int
    logprobs: TokenLogprobs | None
    end: int | None
    """Characters decoded once its text was whole; None before."""


@dataclass(slots=True)
class _RequestState:
    client: bytes
    id: str
    submit: Submit
    request: Request
    tells_cached: bool = True
    """Whether the next Delta is the first, which tells what came from the prefix cache."""
    completions: list[_CompletionState] = field(default_factory=list)


Emit = Callable[[bytes, Event], None]
StopFound = Callable[[str, int, str], None]


class OutputProcessor:
    """Owns the text of every running request. Used by one thread.

    A Delta's text is exactly that of its token ids: a token waits for the other tokens of an unfinished character, and
    while any of its text is held back for a stop string. The last Delta of a completion holds all that is left, cut at
    the stop string. Where a request splits thinking off, its tags are no text, and stop strings are looked for in the
    answer alone.

    `emit(client, event)` delivers; `stop_found(request_id, index, stop)` asks the scheduler to finish a sequence.
    """

    def __init__(self, tokenizer: Tokenizer | None, emit: Emit, stop_found: StopFound) -> None:
        self._tokenizer, self._emit, self._stop_found = tokenizer, emit, stop_found
        self._requests: dict[str, _RequestState] = {}

    def start(self, client: bytes, submit: Submit, request: Request) -> None:
        """Tell the client that its request was accepted, and expect updates for it. The scheduler has taken it on."""
        state = _RequestState(client, submit.id, submit, request)
        sampling = submit.sampling
        tokenizer, phase = self._tokenizer, None
        if tokenizer is not None and submit.split_reasoning:
            phase = tokenizer.reasoning_phase(request.prompt, submit.continue_final_message)
        delivered = [None] * sampling.n if submit.resume is None else [_Delivered(c) for c in submit.resume.completions]
        for each in delivered:
            decoder = None
            if tokenizer is not None:
                splits = phase is not None
                decoder = tokenizer.decoder(sampling.skip_special_tokens, request.prompt, shows_reasoning_tags=splits)
            stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
            splitter = None if tokenizer is None or phase is None else tokenizer.reasoning_splitter(phase)
            state.completions.append(_CompletionState(decoder, stops, splitter, delivered=each))

        self._requests[request.id] = state
        first = request.sequences[0]
        accepted = Accepted(
            id=submit.id,
            prompt_tokens=len(request.prompt),
            seed=request.seed,
            max_tokens=first.length_limit - first.prompt_length,
        )
        self._emit(client, accepted)

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
            self._emit(state.client, self._finished(state, update.request))

    def _advance(self, state: _RequestState, completion: _CompletionState, update: SequenceUpdate) -> None:
        request = update.request
        index = update.sequence.index
        stop = None
        min_tokens = state.submit.sampling.min_tokens
        entries: Sequence[TokenLogprobs | None] = update.logprobs or [None] * len(update.token_ids)
        for token, logprobs in zip(update.token_ids, entries, strict=True):
            too_early = min_tokens > 0 and completion.tokens + len(completion.held) + 1 < min_tokens
            stop = self._take(state, completion, token, logprobs, request, too_early)
            if stop is not None:
                break

        finished = update.finish_reason is not None
        if stop is None and finished:
            rest = completion.detokenizer.flush() if completion.detokenizer else ""
            stop = self._pass_on(state, completion, rest, last=True)

        if stop is not None:
            completion.completion = Completion(index, "stop", stop, thinking=completion.ends_within_thinking)
            if not finished:
                self._stop_found(request.id, index, stop)
        elif finished:
            sampling = state.submit.sampling
            named = self._named_stop(sampling, update.stop_reason)
            if named is not None and sampling.include_stop_str_in_output:
                completion.ready += named
            reason = update.stop_reason if named is None else named
            thinking = completion.ends_within_thinking
            completion.completion = Completion(index, str(update.finish_reason), reason, thinking)
        self._send_ready(state, completion, index)

    def _named_stop(self, sampling: SamplingParams, stop_reason: str | int | None) -> str | None:
        """The stop string that the token which ended an answer is, if the request named it by its text alone."""
        if self._tokenizer is None or not isinstance(stop_reason, int) or stop_reason in sampling.stop_token_ids:
            return None
        return next((text for text in sampling.stop if self._tokenizer.special_token_id(text) == stop_reason), None)

    def _take(
        self,
        state: _RequestState,
        completion: _CompletionState,
        token: int,
        logprobs: TokenLogprobs | None,
        request: Request,
        too_early: bool,
    ) -> str | None:
        """Take in a token. Returns the stop string that its text completes."""
        held = _HeldToken(token, None if logprobs is None else self._with_bytes(logprobs), None)
        completion.held.append(held)

        # The token that ends an answer is reported among the token ids but is no part of the text.
        detokenizer = completion.detokenizer
        if detokenizer is None or token in request.eos_token_ids or token in request.stop_token_ids:
            held.end = completion.decoded
            return None

        text = detokenizer.step(token)
        completion.decoded += len(text)
        if detokenizer.is_whole:
            whole = len(completion.held)
        else:
            # Bytes that are no UTF-8 are shown but for the last few, which may still begin a character.
            whole = len(completion.held) - INCOMPLETE_BYTES if text else 0
        for index in range(whole - 1, -1, -1):
            if completion.held[index].end is not None:
                break
            completion.held[index].end = completion.decoded

        return self._pass_on(state, completion, text, token, too_early)

    def _pass_on(
        self,
        state: _RequestState,
        completion: _CompletionState,
        text: str,
        token: int | None = None,
        too_early: bool = False,
        last: bool = False,
    ) -> str | None:
        """Add to the text that may go out. Returns the stop string that was reached."""
        if completion.splitter is not None:
            thinking, text = completion.splitter.feed(text, token, last)
            if state.submit.stop_in_reasoning:
                text = thinking + text
            else:
                completion.ready += thinking
        shown, stop = completion.stops.feed(text, last, too_early)
        completion.ready += shown
        return stop

    def _send_ready(self, state: _RequestState, completion: _CompletionState, index: int) -> None:
        """Send the tokens whose text is whole and may be shown; at the end all that is left.

        It runs for every token of every request, beside the step loop, which waits for the interpreter meanwhile.
        """
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        held = completion.held
        ended = completion.completion is not None
        splitter = completion.splitter
        ready = completion.ready
        end = completion.sent
        shown = end + len(ready)
        while held:
            first = held[0]
            if not ended and (first.end is None or first.end > shown):
                break
            if splitter is not None:
                completion.reasoning_tokens += splitter.is_thinking(end)
            if first.end is not None:
                end = first.end
            token_ids.append(first.token_id)
            if first.logprobs is not None:
                logprobs.append(first.logprobs)
            held.popleft()

        size = len(ready) if ended else end - completion.sent
        text = ready[:size]
        completion.ready = ready[size:]
        reasoning = ""
        if splitter is not None:
            reasoning, text = splitter.split(text, completion.sent)
        completion.sent += size
        completion.tokens += len(token_ids)

        # The client of a resumed request has the beginning, and its log-probabilities.
        if completion.delivered is not None:
            token_ids, text, reasoning = completion.delivered.rest_of(token_ids, text, reasoning)
        if token_ids or text or reasoning:
            position = completion.tokens - len(token_ids)
            cached = state.request.cached_tokens if state.tells_cached else 0
            state.tells_cached = False
            delta = Delta(state.id, index, text, token_ids, logprobs or None, position, reasoning, cached)
            self._emit(state.client, delta)

    def _with_bytes(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        if self._tokenizer is None:
            return logprobs
        known = self._tokenizer.token_bytes
        return TokenLogprobs(
            logprobs.token_id,
            logprobs.logprob,
            logprobs.rank,
            logprobs.top_token_ids,
            logprobs.top_logprobs,
            known[logprobs.token_id],
            [known[token] for token in logprobs.top_token_ids],
        )

    def _finished(self, state: _RequestState, request: Request) -> Finished:
        completions = [
            completion.completion or Completion(index, "abort", thinking=completion.ends_within_thinking)
            for index, completion in enumerate(state.completions)
        ]
        usage = Usage(
            len(request.prompt),
            sum(completion.tokens for completion in state.completions),
            request.cached_tokens,
            sum(completion.reasoning_tokens for completion in state.completions),
        )
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is not None:
            prompt_logprobs = [self._with_bytes(entry) for entry in prompt_logprobs]
        prompt = request.prompt if state.submit.return_prompt_token_ids else None
        return Finished(state.id, completions, usage, timings(request), prompt, prompt_logprobs)


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
