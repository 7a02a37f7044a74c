"""What callers pass for a prompt: any iterable of them, with numbers of any library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from phalanx import InvalidRequest
from phalanx.engine.client.requests import as_prompts, make_submit, spread_sampling


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        ((text for text in "ab"), ["a", "b"]),
        ({"a"}, ["a"]),
        ({"a": 1}.keys(), ["a"]),
        ((token for token in (1, 2)), [[1, 2]]),
        ([iter((1, 2)), (token for token in (3,))], [[1, 2], [3]]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2]), "a", (3,)], [[1, 2], "a", [3]]),
        ([], []),
    ],
)
def test_prompts_of_every_kind_are_text_or_lists_of_integers(given: Any, taken: list[Any]) -> None:
    assert as_prompts(given) == taken
    assert all(type(token) is int for prompt in as_prompts([*taken]) if isinstance(prompt, list) for token in prompt)


@pytest.mark.parametrize("given", [5, None, 1.5, [None], [{"a": 1}], [b"bytes"], ["a", 5.0], b"a", {"a": 1}])
def test_what_is_no_prompt_is_named(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt=.* must be text or a list of token ids"):
        as_prompts(given)


@pytest.mark.parametrize("given", [{5, 6}, [{5, 6}], [frozenset({5})]])
def test_token_ids_without_an_order_are_refused(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt=.* is a set, which has no order"):
        as_prompts(given)


@pytest.mark.parametrize("sampling", [5, {"temperature": 0}, [{"temperature": 0}], "greedy"])
def test_what_are_no_sampling_parameters_is_named(sampling: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling=.* must be SamplingParams"):
        spread_sampling(sampling, 1)


@pytest.mark.parametrize("kind", [tuple, iter])
def test_a_conversation_may_come_in_any_iterable(kind: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert make_submit("a", messages=kind(messages)).messages == messages


def test_one_prompt_of_a_stream_may_be_an_array() -> None:
    assert make_submit("a", prompt=np.array([7, 8])).token_ids == [7, 8]
