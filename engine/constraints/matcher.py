"""One sequence's place in its grammar: which tokens may come next, and whether any may."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = npt.NDArray[np.uint32]

MASK_CPU_S = 0.25
"""Seconds of a processor's time that one mask may take; the answer whose mask takes more fails."""
ALONE_S = 0.01
"""Seconds of it after which an answer gets a lexer of its own: while one is used, all that share it wait."""
ADVANCE_S = 0.0005
"""Seconds of it after which taking in a token is left to the thread that makes the next mask."""


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
    """Follows one completion: advance() takes in a token, make_mask() finds out which may be the next.

    They are called in turn, never at the same time: advance() by the step loop, make_mask() by any thread.

    `mask` has a bit for each token of the vocabulary that may come next, the lowest first in each byte; it is empty
    where all may, and None until it is made. `finished`: the answer is complete, and nothing may follow. `failure`: why
    the answer cannot go on, in words.
    """

    def __init__(
        self,
        state: LLMatcher,
        vocab_size: int,
        end_token_ids: Sequence[int],
        library_ends: Sequence[int],
        beginning: Beginning | None = None,
        leave: Callable[[bool], LLMatcher] | None = None,
    ) -> None:
        """`library_ends` are the tokens that `state` takes for ends itself.

        `state` may share its lexer with other matchers. Then `leave` returns it, at its beginning, with a lexer of its
        own; what is given says whether the shared one is spent.

        The request's own, `end_token_ids`, are allowed wherever the answer may end. Elsewhere they are what they are to
        the grammar: a special token is forbidden, and one of ordinary text, if the grammar allows it, ends the answer
        there as a stop string would.
        """
        self._state = state
        self._leave = leave
        self._taken: list[int] = []  # tokens that the state has taken in, for one of its own
        self._leaving = self._spent = False
        self._library_ends = np.array(library_ends, dtype=np.int64)
        self._words = -(-vocab_size // 32)
        self._spare = self._words * 32 - vocab_size
        self._ends = np.array(sorted(end_token_ids), dtype=np.int64)
        self._beginning = beginning or Beginning()
        self._waiting = self._beginning.open
        self._length = 0
        self._owed: list[int] = []  # more tokens that make_mask() is to take in
        self._defers = False
        self.slow = False
        """Whether the last mask was made too slowly to be waited for: set by who makes it."""
        self.late = False
        """Whether a step had to do without the mask that is being made."""
        self.mask: bytes | None = b"" if self._waiting else None
        self.finished = False
        self.failure: str | None = None
        self.is_fault = False
        """Whether the engine is to blame for the failure, and not the grammar."""

    @property
    def active(self) -> bool:
        """Whether some tokens may be forbidden now."""
        return not self._waiting

    @property
    def ready(self) -> bool:
        """Whether the mask is there, or will be by the time that a step planned now samples."""
        return self.mask is not None or not (self.slow or self.late)

    def defer(self) -> None:
        """Leave the tokens to come to make_mask(): there are many of them."""
        self._defers = True

    def advance(self, token_id: int) -> bool:
        """Take in the next token of the answer, no end token. Returns `finished`.

        Where that takes long it is done by make_mask(), and so is the finding that the answer is complete.
        """
        first = self._length == 0
        self._length += 1
        if self._waiting:
            self._waiting = token_id != self._beginning.after
        elif first and token_id == self._beginning.opens:
            self._waiting = True
        elif self._defers:
            self._owed.append(token_id)
        else:
            self._take_in([token_id])
        self.late = False
        self.mask = b"" if self._waiting or self.finished or self.failure is not None else None
        return self.finished

    def make_mask(self) -> None:
        """Set `mask`, or `finished` or `failure` and an empty one. Does not hold the GIL while it computes.

        Sets nothing but `slow` where making it takes long: then it is to be called again.
        """
        if self._leaving and not self.slow:
            self.slow = True
            return
        if self._leaving:
            self._get_own_state()
        before, tokens = time.thread_time(), max(1, len(self._owed))
        words = self._allowed()
        if self._leaving and words is None:
            self.slow = True
            return

        spent = (time.thread_time() - before) / tokens
        if spent > MASK_CPU_S:
            self.fail(f"its grammar took {spent:.2f} s for one token; it may take {MASK_CPU_S} s")
            return
        if spent > ALONE_S and self._leave is not None:
            self._leaving = self._defers = True
        self.mask = b"" if words is None else words.tobytes()

    def fail(self, why: str, is_fault: bool = False) -> None:
        """Note that the answer cannot go on; `is_fault` if that is the engine's fault."""
        self.failure = f"after {self._length} tokens of the answer {why}"
        self.is_fault = is_fault
        self.mask = b""

    def _get_own_state(self) -> None:
        """Go on with a lexer that no other answer uses, from the beginning: rare, and slow."""
        assert self._leave is not None
        self._state = self._leave(self._spent)
        self._leave = None
        self._leaving = False
        self._owed = self._taken + self._owed
        self._taken = []

    def _take_in(self, token_ids: list[int]) -> None:
        if self.failure is not None or not token_ids:
            return
        self._taken += token_ids
        before = time.thread_time()
        if not self._state.consume_tokens(token_ids):
            self._fail()
        elif self._state.is_stopped():
            self.finished = self._state.is_accepting()
        self._defers = self._leaving or time.thread_time() - before > ADVANCE_S * len(token_ids)

    def allowed(self) -> Words | None:
        """The tokens that may come next as bits, uint32 (ceil(vocabulary / 32),), the lowest first; None allows all.

        None too if the answer has failed, or cannot go on because it is complete: then `failure` or `finished` is set.
        """
        words = self._allowed()
        if words is None and self._leaving:
            self._get_own_state()
            words = self._allowed()
        return words

    def _allowed(self) -> Words | None:
        """As allowed(); None too if it must be called again with a state of its own, as `_leaving` says."""
        owed, self._owed = self._owed, []
        self._take_in(owed)
        if self._waiting or self.finished or self.failure is not None or (self._leaving and self._spent):
            return None

        # The library's vocabulary is as large as the model's: the compiler has seen to that.
        words: Words = np.zeros(self._words, dtype=np.uint32)
        self._state.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
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
        error = self._state.get_error().partition("\n")[0]
        if error.lower().startswith("parser error"):
            self.fail(_STOPS["ParserTooComplex"])
        elif not error.startswith("lexer error"):
            self.fail(_STOPS.get(error.split()[0] if error else "NoExtension", error))
        elif self._leave is None:
            self.fail(_STOPS["LexerTooComplex"])
        else:
            self._leaving = self._spent = self._defers = True


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
