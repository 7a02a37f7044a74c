"""Where in an answer its grammar begins, for a model that thinks first."""

from __future__ import annotations

from collections.abc import Sequence

from ..constraints.matcher import Beginning
from .tokenizer import Tokenizer

OPENS, ENDS = "<think>", "</think>"


def beginning_of(tokenizer: Tokenizer | None, prompt: Sequence[int]) -> Beginning:
    """The grammar of an answer to `prompt` begins after its thinking: where the prompt, or the first token, opens it.

    It begins at once if the prompt has closed the thinking, or if the tags are no tokens of the model.
    """
    opens, ends = (None if tokenizer is None else tokenizer.single_token(tag) for tag in (OPENS, ENDS))
    if opens is None or ends is None:
        return Beginning()
    for token in reversed(prompt):
        if token in (opens, ends):
            return Beginning(after=ends, open=True) if token == opens else Beginning()
    return Beginning(after=ends, opens=opens)
