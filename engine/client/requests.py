"""What a caller gives to a request and what the caller gets: prompts become Submits, events become RequestOutputs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ...parallel.loading.json_files import shown
from ..errors import InvalidRequest
from ..protocol.logprobs import TokenLogprobs
from ..protocol.messages import MESSAGE_BYTES, Delta, Event, Failed, Finished, Submit, Timings, Usage
from ..protocol.sampling_params import SamplingParams, plain
from ..protocol.structured import StructuredOutput
from .client import to_error

Prompt = str | list[int]
Messages = list[dict[str, Any]]


def as_prompts(prompts: Any) -> list[Prompt]:
    """Return one prompt or several as a list of prompts: a sequence of integers is one prompt of token ids.

    Any iterable does, arrays of numpy and tensors of torch too. Raises InvalidRequest naming a prompt that is neither
    text nor token ids.
    """
    prompts = plain(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not _is_iterable(prompts):
        raise InvalidRequest(f"prompt={shown(prompts)} must be text or a list of token ids")
    rest = iter(prompts)
    first = [plain(prompt) for prompt in itertools.islice(rest, 1)]
    if first and isinstance(first[0], int):
        return [as_prompt(prompts if isinstance(prompts, set | frozenset) else itertools.chain(first, rest))]
    return [as_prompt(prompt) for prompt in itertools.chain(first, rest)]


def as_prompt(prompt: Any) -> Prompt:
    """Return a prompt as text or a list of token ids; raises InvalidRequest, naming it, for anything else.

    Token ids may come in any iterable that has an order, if it ends before there are more than a message holds.
    """
    prompt = plain(prompt)
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, set | frozenset):
        raise InvalidRequest(f"prompt={shown(prompt)} is a set, which has no order: give token ids as a list")
    if not _is_iterable(prompt):
        raise InvalidRequest(f"prompt={shown(prompt)} must be text or a list of token ids")
    token_ids = [plain(token) for token in itertools.islice(prompt, MESSAGE_BYTES + 1)]
    if len(token_ids) > MESSAGE_BYTES:
        raise InvalidRequest(f"a prompt has more than {MESSAGE_BYTES} token ids, the most that a request may hold")
    return token_ids


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | bytearray | memoryview | Mapping)


def as_messages(messages: Any) -> Any:
    """Return a conversation in lists, dictionaries and values of Python, from any iterable, mapping, array or scalar.

    What is none of these stays as it is: the coordinator refuses it. Raises InvalidRequest for endless nesting.
    """
    if isinstance(messages, Mapping) or not _is_iterable(messages):
        return messages
    try:
        return [_plain_within(message) for message in messages]
    except RecursionError:
        raise InvalidRequest("messages are nested too deep, or hold themselves") from None


def _plain_within(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {plain(key): _plain_within(each) for key, each in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_plain_within(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_within({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return plain(value)


def spread_sampling(
    sampling: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams | None]:
    """The parameters of each of `prompts` prompts, from one for all or one for each. None stands for the defaults.

    Raises InvalidRequest if their number differs from that of the prompts, or if they are no SamplingParams.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    each: list[Any] = list(sampling) if _is_iterable(sampling) else [sampling]
    for params in each:
        if not isinstance(params, SamplingParams | None):
            raise InvalidRequest(
                f"sampling={shown(params)} must be SamplingParams; SamplingParams.from_dict makes them"
            )
    if len(each) != prompts:
        raise InvalidRequest(
            f"{len(each)} sampling parameters were given for {prompts} prompts: give one for all, or one for each"
        )
    return each


def spread_structured(
    structured: StructuredOutput | Sequence[StructuredOutput | None] | None, prompts: int
) -> list[StructuredOutput | None]:
    """What the answers to each of `prompts` prompts must match, from one for all or one for each.

    Raises InvalidRequest as spread_sampling does.
    """
    if structured is None or isinstance(structured, StructuredOutput):
        return [structured] * prompts
    each: list[Any] = list(structured) if _is_iterable(structured) else [structured]
    for one in each:
        if not isinstance(one, StructuredOutput | None):
            raise InvalidRequest(f"structured={shown(one)} must be a StructuredOutput")
    if len(each) != prompts:
        raise InvalidRequest(
            f"{len(each)} structured outputs were given for {prompts} prompts: give one for all, or one for each"
        )
    return each


def make_submit(
    request_id: str,
    *,
    prompt: Prompt | None = None,
    messages: Messages | None = None,
    sampling: SamplingParams | None = None,
    structured: StructuredOutput | None = None,
) -> Submit:
    """The protocol's request for a prompt (text or token ids) or a conversation. The coordinator checks it.

    Raises InvalidRequest for what is no prompt, no SamplingParams or no StructuredOutput.
    """
    [params] = spread_sampling(sampling, 1)
    [form] = spread_structured(structured, 1)
    prompt = plain(prompt)
    return Submit(
        id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=None if prompt is None or isinstance(prompt, str) else as_prompt(prompt),  # type: ignore[arg-type]
        messages=as_messages(messages),
        sampling=params or SamplingParams(),
        structured=form,
        return_prompt_token_ids=True,
    )


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
