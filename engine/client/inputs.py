"""From what a caller asks for to the requests of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InvalidRequest
from ..protocol.messages import Submit
from ..protocol.sampling_params import SamplingParams

Prompt = str | list[int]
Messages = list[dict[str, Any]]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list: a list of integers is one prompt of token ids.

    Raises InvalidRequest naming a prompt that is neither text nor a list.
    """
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    for prompt in prompts:
        if not isinstance(prompt, str | list):
            raise InvalidRequest(f"prompt={prompt!r} must be text or a list of token ids")
    return list(prompts)  # type: ignore[arg-type]


def spread_sampling(
    sampling: SamplingParams | Sequence[SamplingParams] | None, prompts: int
) -> list[SamplingParams | None]:
    """The parameters of each of `prompts` prompts, from one for all or one for each. None stands for the defaults.

    Raises InvalidRequest if their number differs from that of the prompts.
    """
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * prompts
    each: list[SamplingParams | None] = list(sampling)
    if len(each) != prompts:
        raise InvalidRequest(
            f"{len(each)} sampling parameters were given for {prompts} prompts: give one for all, or one for each"
        )
    return each


def make_submit(
    request_id: str,
    *,
    prompt: Prompt | None = None,
    messages: Messages | None = None,
    sampling: SamplingParams | None = None,
) -> Submit:
    """The protocol's request for a prompt (text or token ids) or a conversation. The coordinator checks it."""
    return Submit(
        id=request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else prompt,
        messages=messages,
        sampling=sampling or SamplingParams(),
    )
