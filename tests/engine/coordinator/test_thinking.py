"""Where the grammar of an answer begins, by what its prompt says of thinking."""

from __future__ import annotations

from typing import cast

import pytest
from phalanx.engine.constraints.matcher import Beginning
from phalanx.engine.coordinator.thinking import beginning_of
from phalanx.engine.coordinator.tokenizer import Tokenizer

OPENS, ENDS = 7, 8


class _Thinks:
    def single_token(self, text: str) -> int | None:
        return {"<think>": OPENS, "</think>": ENDS}.get(text)


class _DoesNotThink:
    def single_token(self, text: str) -> int | None:
        return None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([1, OPENS, 2], Beginning(after=ENDS, open=True)),
        ([1, OPENS, 2, ENDS, 3], Beginning()),
        ([1, ENDS, OPENS], Beginning(after=ENDS, open=True)),
        ([1, 2], Beginning(after=ENDS, opens=OPENS)),
    ],
)
def test_the_prompts_last_tag_decides(prompt: list[int], expected: Beginning) -> None:
    assert beginning_of(cast(Tokenizer, _Thinks()), prompt) == expected


def test_without_the_tags_a_grammar_begins_at_once() -> None:
    assert beginning_of(cast(Tokenizer, _DoesNotThink()), [OPENS]) == Beginning()
    assert beginning_of(None, [OPENS]) == Beginning()
