"""What a client has of one answer, so that another engine can go on with it where the one before ended."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ...protocol.messages import Accepted, Delta, Event, Resume, ResumedCompletion, Submit


class _Completion:
    def __init__(self, resumed: ResumedCompletion) -> None:
        self.token_ids = list(resumed.token_ids)
        self.characters = resumed.characters
        self.reasoning_characters = resumed.reasoning_characters


class Delivered:
    """Takes note of a request's events as they are handed on. Used by one thread at a time."""

    def __init__(self, submit: Submit, clock: Callable[[], float] = time.monotonic) -> None:
        self.accepted: Accepted | None = None
        """From the engine that accepted it first."""
        self.tokens = 0
        """Output tokens that were delivered, of all completions."""
        self._submit = submit
        self._clock = clock

        before = submit.resume or Resume(completions=[ResumedCompletion()] * submit.sampling.n)
        self._completions = [_Completion(each) for each in before.completions]
        self._sent_at = clock() - before.age_s
        self._ttft_s = before.ttft_s
        self.cached_tokens = before.cached_tokens
        """Prompt tokens that came from the prefix cache; None before the first Delta."""

    def add(self, event: Event) -> bool:
        """Take note of an event. Returns whether the client has yet to see it: not what it has seen already."""
        if isinstance(event, Accepted):
            first = self.accepted is None
            self.accepted = self.accepted or event
            return first
        if not isinstance(event, Delta):
            return True

        completion = self._completions[event.index]
        if event.position < len(completion.token_ids):
            return False
        completion.token_ids += event.token_ids
        completion.characters += len(event.text)
        completion.reasoning_characters += len(event.reasoning)
        self.tokens += len(event.token_ids)
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        if self._ttft_s is None:
            self._ttft_s = self._clock() - self._sent_at
        return True

    @property
    def age_s(self) -> float:
        """Seconds since the request was first sent."""
        return self._clock() - self._sent_at

    def resubmit(self, request_id: str) -> Submit:
        """Return the request that goes on after what was delivered; it is a new one if nothing is known of it."""
        if self.accepted is None:
            return msgspec.structs.replace(self._submit, id=request_id)
        completions = [
            ResumedCompletion(
                token_ids=list(each.token_ids),
                characters=each.characters,
                reasoning_characters=each.reasoning_characters,
            )
            for each in self._completions
        ]
        return msgspec.structs.replace(
            self._submit,
            id=request_id,
            # Without a seed of its own, its draws follow from the one that the first engine gave it.
            sampling=msgspec.structs.replace(self._submit.sampling, seed=self.accepted.seed),
            resume=Resume(
                completions=completions, age_s=self.age_s, ttft_s=self._ttft_s, cached_tokens=self.cached_tokens
            ),
        )
