"""Where in an answer its grammar begins, for a model that thinks first."""

from __future__ import annotations

from collections.abc import Sequence

from ..constraints.matcher import Beginning
from .text.reasoning import Phase
from .tokenizer import Tokenizer


def beginning_of(tokenizer: Tokenizer | None, prompt: Sequence[int], continues: bool) -> Beginning:
    """The grammar of an answer to `prompt` begins after its thinking: where the prompt, or the first token, opens it.

    It begins at once if the prompt has closed the thinking, or if the tags are no tokens of the model. The answer
    `continues` the prompt's last message, or is a message of its own.
    """
    tags = None if tokenizer is None else tokenizer.reasoning_tags
    if tokenizer is None or tags is None or tags.closing_id is None:
        return Beginning()
    phase = tokenizer.reasoning_phase(prompt, continues)
    if phase is Phase.ANSWER:
        return Beginning()
    thinking = phase is Phase.THINKING
    return Beginning(after=tags.closing_id, opens=None if thinking else tags.opening_id, open=thinking)
