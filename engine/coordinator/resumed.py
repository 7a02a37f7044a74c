"""What a request brings from the engine before this one: checked like all that comes from outside."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import InvalidRequest
from ..protocol.messages import Resume, ResumedCompletion


def resumed_outputs(
    resume: Resume, n: int, prompt_length: int, max_model_len: int, check_tokens: Callable[[str, list[int]], None]
) -> list[list[int]]:
    """The output tokens of each of `n` completions that another engine has delivered.

    `check_tokens` refuses ids outside the vocabulary, by the name of their field. Raises InvalidRequest.
    """
    outputs = [each.token_ids for each in resume.completions]
    if len(outputs) != n:
        raise InvalidRequest(f"resume has {len(outputs)} completions; it must have as many as n={n}")

    for tokens in outputs:
        check_tokens("resume.token_ids", tokens)
        if prompt_length + len(tokens) > max_model_len:
            raise InvalidRequest(
                f"the prompt's {prompt_length} tokens and {len(tokens)} of resume are more than "
                f"max_model_len={max_model_len}: the engine before this one had a larger one"
            )

    cached = resume.cached_tokens or 0
    counts = [cached, *(number for each in resume.completions for number in _characters(each))]
    if min(counts) < 0 or cached > prompt_length:
        raise InvalidRequest(
            f"resume counts {counts} cached tokens and characters; they must be at least 0, and of the prompt no more "
            f"than its {prompt_length} tokens may be cached"
        )

    times = [resume.age_s, resume.ttft_s or 0.0]
    if not all(0 <= seconds < math.inf for seconds in times):
        raise InvalidRequest(f"resume has age_s and ttft_s of {times}; they must be seconds of at least 0")
    return outputs


def _characters(completion: ResumedCompletion) -> tuple[int, int]:
    return completion.characters, completion.reasoning_characters
