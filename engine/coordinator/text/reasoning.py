"""Thinking apart from the answer: which characters of a completion are thinking, which are tags, which the answer."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...protocol.reasoning_tags import REASONING_TAGS, tags_in

BLANKS_LIMIT = 64
"""Characters of white space after which an answer can no longer begin with thinking."""
TAIL_TOKENS = 64
"""Last tokens of a prompt in which tags of several tokens are looked for."""
CONTINUED_TOKENS = 16384
"""The same of a prompt whose last message goes on."""


class Phase(enum.Enum):
    """Where a completion is."""

    START = enum.auto()
    """Thinking may begin: so far there is white space at most."""
    THINKING = enum.auto()
    ANSWER = enum.auto()


@dataclass(frozen=True)
class ReasoningTags:
    """What a model's thinking is enclosed in. With ids each tag is that one token; without, it is a text."""

    opening: str
    closing: str
    opening_id: int | None = None
    closing_id: int | None = None

    @property
    def ids(self) -> frozenset[int]:
        """The tags' token ids; none of tags that are texts."""
        return frozenset(token for token in (self.opening_id, self.closing_id) if token is not None)


def find_tags(added_tokens: Mapping[str, int], chat_template: str | None) -> ReasoningTags:
    """The tags of a model: those that are tokens of their own, or else those that its chat template names."""
    for opening, closing in REASONING_TAGS:
        if opening in added_tokens and closing in added_tokens:
            return ReasoningTags(opening, closing, added_tokens[opening], added_tokens[closing])
    return ReasoningTags(*(tags_in(chat_template) or REASONING_TAGS[0]))


def phase_after(
    prompt: Sequence[int],
    tags: ReasoningTags,
    special: frozenset[int],
    decode: Callable[[Sequence[int]], str],
    continues: bool = False,
) -> Phase:
    """Where the answer to a prompt begins.

    A prompt that ends with an opening tag is answered with thinking, one that ends with a closing tag with the answer;
    white space may follow the tag. Where the answer `continues` a message, any text may follow it. Tags before that
    belong to earlier messages: the model may still open its own.

    `special` are the tokenizer's control tokens, which end the search; `decode` gives the text of tokens.
    """
    if not tags.ids:
        return _phase_after_text(
            decode(_tail(prompt, special, CONTINUED_TOKENS if continues else TAIL_TOKENS)), tags, continues
        )

    for token in reversed(prompt):
        if token == tags.opening_id:
            return Phase.THINKING
        if token == tags.closing_id:
            return Phase.ANSWER
        if token in special or not (continues or not decode([token]).strip()):
            break
    return Phase.START


def _tail(prompt: Sequence[int], special: frozenset[int], most: int) -> Sequence[int]:
    """What follows the last control token of a prompt, of it the last `most` tokens."""
    begin = max(0, len(prompt) - most)
    for index in range(len(prompt) - 1, begin - 1, -1):
        if prompt[index] in special:
            return prompt[index + 1 :]
    return prompt[begin:]


def _phase_after_text(text: str, tags: ReasoningTags, continues: bool) -> Phase:
    opened, closed = text.rfind(tags.opening), text.rfind(tags.closing)
    last = max(opened, closed)
    tag = tags.opening if opened > closed else tags.closing
    if last < 0 or not (continues or not text[last + len(tag) :].strip()):
        return Phase.START
    return Phase.THINKING if opened > closed else Phase.ANSWER


class ReasoningSplitter:
    """Follows one completion, token by token. Characters are counted from its first one, tags included.

    Thinking is what is between the tags. It comes first and once: white space before the opening tag belongs to the
    tag, and tags in the answer are text.
    """

    def __init__(self, tags: ReasoningTags, phase: Phase) -> None:
        self._tags = tags
        self._phase = phase
        self._begun_thinking = phase is Phase.THINKING
        self._held = ""  # text of which it is not known yet what it is
        self._passed = 0  # characters before it

        # Thinking is from the first of these places to the second, the answer from the third.
        self._thinking_at = 0
        self._closing_at: int | None = None if phase is Phase.THINKING else 0
        self._answer_at: int | None = None if phase is not Phase.ANSWER else 0

    def feed(self, text: str, token_id: int | None = None, last: bool = False) -> tuple[str, str]:
        """(tags and thinking, answer) that are known for what they are, in this order; `token_id` completed `text`.

        With `last` nothing is held back.
        """
        if self._phase is Phase.ANSWER:
            self._passed += len(text)
            return "", text

        self._held += text
        before = ""
        if self._phase is Phase.START:
            before = self._start(token_id, last)
        if self._phase is Phase.THINKING:
            before += self._think(token_id, last)
        answer = self._pass(len(self._held)) if self._answer_at is not None else ""
        return before, answer

    def ends_within_thinking(self, size: int) -> bool:
        """Whether the completion's first `size` characters have thinking that has not ended."""
        return self._begun_thinking and (self._answer_at is None or size < self._answer_at)

    def is_thinking(self, offset: int) -> bool:
        """Whether a token whose text begins at this offset belongs to the thinking, its tags included."""
        return self._begun_thinking and (self._answer_at is None or offset < self._answer_at)

    def split(self, text: str, begin: int) -> tuple[str, str]:
        """(thinking, answer) of a text that begins at this place, without the tags. All of it was passed by feed()."""
        if self._answer_at is not None and begin >= self._answer_at:
            return "", text
        first = max(0, self._thinking_at - begin)
        end = len(text) if self._closing_at is None else max(0, self._closing_at - begin)
        answer = "" if self._answer_at is None else text[self._answer_at - begin :]
        return text[first:end], answer

    def _start(self, token_id: int | None, last: bool) -> str:
        opening = self._tags.opening
        text = self._held.lstrip()
        blanks = len(self._held) - len(text)
        if blanks > BLANKS_LIMIT:
            opened = may_open = False
        elif self._tags.opening_id is None:
            opened, may_open = text.startswith(opening), opening.startswith(text)
        else:
            opened, may_open = token_id == self._tags.opening_id and text in (opening, ""), not text

        if opened:
            self._phase = Phase.THINKING
            self._begun_thinking = True
            tag = self._pass(blanks + (len(opening) if text else 0))
            self._thinking_at = self._passed
            self._closing_at = None
            return tag
        if last or not may_open:
            self._phase = Phase.ANSWER
            self._answer_at = 0
        return ""

    def _think(self, token_id: int | None, last: bool) -> str:
        closing = self._tags.closing
        start = -1
        if self._tags.closing_id is None:
            start = self._held.find(closing)
        elif token_id == self._tags.closing_id:
            # Where the decoder shows the token as another text, or not at all, the tag has no characters.
            start = self._held.rfind(closing)
            start, closing = (start, closing) if start >= 0 else (len(self._held), "")

        if start >= 0:
            self._closing_at = self._passed + start
            self._answer_at = self._closing_at + len(closing)
            self._phase = Phase.ANSWER
            return self._pass(start + len(closing))
        keep = 0 if last or self._tags.closing_id is not None else _longest_beginning(self._held, closing)
        return self._pass(len(self._held) - keep)

    def _pass(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._passed += size
        return text


def _longest_beginning(text: str, tag: str) -> int:
    """Characters at the end of a text that a tag may begin with."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
