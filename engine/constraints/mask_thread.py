"""Masks of constrained rows, made on threads of their own beside the steps."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..errors import EngineFault
from ..scheduling.step_plan import SlotSampling
from .bounded import give_way
from .matcher import Matcher

SLOW_NICENESS = 10
"""How much the slow ones' threads give way: where each core has a thread of the kernels, they take from the steps."""
PATIENCE_S = 0.002
"""Seconds that a step waits for a mask when all else that it needs is there."""
POLL_S = 0.0005
FAST_THREADS, SLOW_THREADS = 2, 1
"""Threads for the masks that a step waits for, so that one that turns out to be slow holds up no other, and for those
that are known to be slow."""


class MaskThreads:
    """Makes the masks of constrained rows on threads of its own, beside the steps that do not need them.

    A mask is begun when the token before it is known. A step that wants to sample takes those that are there, and waits
    for the others a short time at most: a row whose mask is late gives no token in that step. A sequence whose masks
    are slow is not planned before its mask is there (see Matcher.ready).
    """

    def __init__(self, made_late: Callable[[], None] = lambda: None) -> None:
        """`made_late` is called, on any thread, when a mask is there that steps have done without."""
        self._made_late = made_late
        self._made = threading.Condition()
        self._fast: queue.SimpleQueue[Matcher | None] = queue.SimpleQueue()
        self._slow: queue.SimpleQueue[Matcher | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []  # those that run
        self._begun_at = 0.0
        self._window_s = 0.0  # how long after their beginning masks were wanted, lately

    def begin(self, matchers: Iterable[Matcher]) -> None:
        """Make the masks of these matchers, each of which has taken in a token."""
        for matcher in matchers:
            why_not = self._start()
            if why_not is not None:
                matcher.fail(why_not, is_fault=True)
                continue
            self._begun_at = time.perf_counter()
            (self._slow if matcher.slow else self._fast).put(matcher)

    def collect(self, matchers: Sequence[Matcher | None], computed: Callable[[], bool] = lambda: True) -> list[bool]:
        """Wait for the masks of a step's rows. Returns which are there; so is that of a row without a matcher.

        `computed` tells whether the forward pass is done: until then waiting costs nobody anything.
        """
        awaited = [matcher for matcher in matchers if matcher is not None and matcher.mask is None]
        deadline: float | None = None
        with self._made:
            while True:
                while awaited and awaited[-1].mask is not None:
                    awaited.pop()
                now = time.perf_counter()
                if deadline is None and (not awaited or computed()):
                    deadline = now + PATIENCE_S
                    self._window_s += 0.2 * (now - self._begun_at - self._window_s)
                left = POLL_S if deadline is None else deadline - now
                if not awaited or left <= 0:
                    break
                self._made.wait(left)

        # Who makes a mask sets it, and then looks whether it is late: one of the two sees the other.
        for matcher in awaited:
            matcher.late = True
        return [matcher is None or matcher.mask is not None for matcher in matchers]

    def close(self) -> None:
        """End the threads; nobody waits for them."""
        for lane in (self._fast, self._slow):
            for _ in self._threads:
                lane.put(None)

    def _start(self) -> str | None:
        """Start the threads that do not run yet, the slow lane's first. Returns why there are too few; None if not."""
        lanes = [self._slow] * SLOW_THREADS + [self._fast] * FAST_THREADS
        try:
            for lane in lanes[len(self._threads) :]:
                thread = threading.Thread(target=self._run, args=(lane,), name="phalanx-masks", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:  # this user, or this container, has as many as it may
            if len(self._threads) <= SLOW_THREADS:
                return f"the engine can start no thread for its grammar ({error})"
        return None

    def _run(self, lane: queue.SimpleQueue[Matcher | None]) -> None:
        if lane is self._slow:
            give_way(SLOW_NICENESS)
        while (matcher := lane.get()) is not None:
            was_slow = matcher.slow
            started = time.perf_counter()
            try:
                matcher.make_mask()
            except BaseException as error:  # a panic of the library is no Exception
                matcher.fail(f"its grammar cannot be followed: {error!r}", isinstance(error, EngineFault))
            if matcher.mask is None:
                self._slow.put(matcher)
                continue
            matcher.slow = time.perf_counter() - started > max(PATIENCE_S, self._window_s / 2)
            with self._made:
                self._made.notify_all()
            if was_slow or matcher.slow or matcher.late:
                self._made_late()


def no_token_left(sampling: SlotSampling, mask: bytes, output: Sequence[int]) -> str | None:
    """Why none of the tokens that a mask allows may be sampled after `output`; None if some may."""
    allowed = set(np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")).tolist())
    forbidding = {
        "allowed_token_ids": allowed - set(sampling.allowed_token_ids) if sampling.allowed_token_ids else set(),
        "min_tokens": allowed & set(sampling.end_token_ids) if len(output) < sampling.min_tokens else set(),
        "bad_words": {
            word[-1]
            for word in sampling.bad_words
            if word[-1] in allowed and list(word[:-1]) == list(output[len(output) - len(word) + 1 :])
        },
    }
    if allowed - set().union(*forbidding.values()):
        return None
    names = [name for name, tokens in forbidding.items() if tokens]
    forbids = f"; {' and '.join(names)} forbids what it allows" if names else ""
    return f"after {len(output)} tokens of the answer its grammar leaves no token to choose{forbids}"
