"""One sequence's place in its grammar: which tokens may come next, and whether any may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Beginning:
    """Where in an answer its grammar begins; by default at its first token."""

    after: int | None = None
    """The id of a token, the end of thinking, up to which everything is allowed."""
    opens: int | None = None
    """The id of a token that may come first instead, the beginning of thinking: then `after` is awaited."""
    open: bool = False
    """Whether the prompt has opened it, so that `after` is awaited from the first token on."""


class Matcher:
    """Follows one completion. advance() and allowed() are called in turn, never at the same time.

    `finished`: the answer is complete, and nothing may follow. `failure`: why the answer cannot go on, in words.
    """

    def __init__(
        self,
        state: LLMatcher,
        vocab_size: int,
        end_token_ids: Sequence[int],
        library_ends: Sequence[int],
        beginning: Beginning | None = None,
    ) -> None:
        """`state` is this matcher's alone; `library_ends` are the tokens that it takes for ends itself.

        The request's own, `end_token_ids`, are allowed wherever the answer may end. Elsewhere they are what they are to
        the grammar: a special token is forbidden, and one of ordinary text, if the grammar allows it, ends the answer
        there as a stop string would.
        """
        self._state = state
        self._library_ends = np.array(library_ends, dtype=np.int64)
        self._words = -(-vocab_size // 32)
        self._spare = self._words * 32 - vocab_size
        self._ends = np.array(sorted(end_token_ids), dtype=np.int64)
        self._beginning = beginning or Beginning()
        self._waiting = self._beginning.open
        self._length = 0
        self.finished = False
        self.failure: str | None = None

    @property
    def active(self) -> bool:
        """Whether some tokens may be forbidden now."""
        return not self._waiting

    def advance(self, token_id: int) -> bool:
        """Take in the next token of the answer, no end token. Returns `finished`."""
        first = self._length == 0
        self._length += 1
        if self._waiting:
            self._waiting = token_id != self._beginning.after
        elif first and token_id == self._beginning.opens:
            self._waiting = True
        elif self.failure is None:
            if not self._state.consume_token(token_id):
                self._fail()
            elif self._state.is_stopped():
                self.finished = self._state.is_accepting()
        return self.finished

    def allowed(self) -> Words | None:
        """The tokens that may come next as bits, uint32 (ceil(vocabulary / 32),), the lowest first; None allows all.

        None too if the answer has failed, or cannot go on because it is complete: then `failure` or `finished` is set.
        """
        if self._waiting or self.finished or self.failure is not None:
            return None
        words: Words = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint32)[: self._words].copy()
        if self._state.is_error():
            self._fail()
            return None

        # The library has allowed the ends that it knows; the request has its own.
        _clear(words, self._library_ends)
        if self._spare:
            words[-1] &= np.uint32(0xFFFFFFFF >> self._spare)
        if self._state.is_accepting():
            if not words.any():
                self.finished = True
                return None
            _set(words, self._ends)
        if self._length == 0 and self._beginning.opens is not None:
            _set(words, np.array([self._beginning.opens]))
        return words

    def _fail(self) -> None:
        error = self._state.get_error()
        why = _STOPS.get(error.split()[0] if error else "NoExtension", error)
        self.failure = f"after {self._length} tokens of the answer {why}"


_STOPS = {
    "NoExtension": "its grammar allows no token",
    "NoExtensionBias": "its grammar allows no token",
    "ParserTooComplex": "its grammar is too ambiguous to be followed",
    "LexerTooComplex": "its grammar's regular expressions are too complex to be followed",
}


def _set(words: Words, token_ids: npt.NDArray[np.int64]) -> None:
    np.bitwise_or.at(words, token_ids >> 5, _bits(token_ids))


def _clear(words: Words, token_ids: npt.NDArray[np.int64]) -> None:
    np.bitwise_and.at(words, token_ids >> 5, ~_bits(token_ids))


def _bits(token_ids: npt.NDArray[np.int64]) -> Words:
    bits: Words = np.left_shift(np.uint32(1), (token_ids & 31).astype(np.uint32))
    return bits
