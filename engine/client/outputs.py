"""What a finished request is to its caller, and how it is put together from the request's events."""

from __future__ import annotations

import msgspec

from ..protocol.logprobs import TokenLogprobs
from ..protocol.messages import Delta, Event, Failed, Finished, Timings, Usage
from .client import to_error


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One of the n completions of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    """The new tokens, an end-of-sequence or stop token included, whose text is not part of `text`."""
    finish_reason: str | None = None
    """"stop" (end-of-sequence, stop token or stop string), "length" or "abort"."""
    stop_reason: str | int | None = None
    """The stop string, or the id of the stop token if it is not the model's own end-of-sequence."""
    logprobs: list[TokenLogprobs] | None = None
    """Aligned with token_ids; None if not asked for."""


class RequestOutput(msgspec.Struct, kw_only=True):
    """A finished request."""

    id: str
    prompt_token_ids: list[int]
    """Empty for a request of the protocol that did not ask for them (Submit.return_prompt_token_ids)."""
    outputs: list[CompletionOutput]
    """One for each of the n completions, by index."""
    usage: Usage
    timings: Timings
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt tokens 1, 2, ...; None if not asked for."""


class OutputBuilder:
    """Puts the events of one request together, `n` completions of which are due."""

    def __init__(self, n: int) -> None:
        self._outputs = [CompletionOutput(index=index) for index in range(n)]

    def add(self, event: Event) -> RequestOutput | None:
        """Take in an event. Returns the whole output with the last event, else None; raises a Failed as its error."""
        if isinstance(event, Failed):
            raise to_error(event)

        if isinstance(event, Delta):
            output = self._outputs[event.index]
            output.text += event.text
            output.token_ids += event.token_ids
            if event.logprobs is not None:
                output.logprobs = (output.logprobs or []) + event.logprobs

        if isinstance(event, Finished):
            for completion in event.completions:
                self._outputs[completion.index].finish_reason = completion.finish_reason
                self._outputs[completion.index].stop_reason = completion.stop_reason

            return RequestOutput(
                id=event.id,
                prompt_token_ids=event.prompt_token_ids or [],
                outputs=self._outputs,
                usage=event.usage,
                timings=event.timings,
                prompt_logprobs=event.prompt_logprobs,
            )

        return None
