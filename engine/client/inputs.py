"""From what a caller asks for to the requests of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InvalidRequest
from ..protocol.messages import Submit
from ..protocol.sampling_params import SamplingParams, plain

Prompt = str | list[int]
Messages = list[dict[str, Any]]


def as_prompts(prompts: Any) -> list[Prompt]:
    """Return one prompt or several as a list of prompts: a sequence of integers is one prompt of token ids.

    Any iterable does, arrays of numpy and tensors of torch too. Raises InvalidRequest naming a prompt that is neither
    text nor token ids.
    """
    if isinstance(prompts, str):
        return [prompts]
    try:
        each = [plain(prompt) for prompt in plain(prompts)]
    except TypeError:
        raise InvalidRequest(f"prompt={prompts!r} must be text or a list of token ids") from None
    if each and isinstance(each[0], int):
        return [each]
    return [as_prompt(prompt) for prompt in each]


def as_prompt(prompt: Any) -> Prompt:
    """Return a prompt as text or a list of token ids; raises InvalidRequest, naming it, for anything else."""
    prompt = plain(prompt)
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list | tuple | range):
        raise InvalidRequest(f"prompt={prompt!r} must be text or a list of token ids")
    return [plain(token) for token in prompt]


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
        token_ids=None if prompt is None or isinstance(prompt, str) else as_prompt(prompt),  # type: ignore[arg-type]
        messages=messages,
        sampling=sampling or SamplingParams(),
        return_prompt_token_ids=True,
    )
