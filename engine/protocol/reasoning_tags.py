"""The tags that models put around their thinking."""

from __future__ import annotations

REASONING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
"""Pairs of an opening and a closing tag. A model that has tokens for none is taken to write the first pair as text."""


def tags_in(chat_template: str | None) -> tuple[str, str] | None:
    """The first pair whose closing tag a chat template holds; None if it knows of no thinking."""
    return next((pair for pair in REASONING_TAGS if pair[1] in (chat_template or "")), None)
