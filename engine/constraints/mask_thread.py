"""Masks of a step, computed beside its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ..scheduling.step_plan import SlotSampling
from .matcher import Matcher


class MaskThread:
    """Computes the masks of one step at a time on a thread of its own, which the first one starts."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="phalanx-masks")

    def start(self, matchers: Sequence[Matcher | None]) -> Future[list[bytes]]:
        """The masks of these sequences' next tokens, as a plan's Masks have them; empty where there is no sequence."""
        return self._threads.submit(_masks, matchers)

    def close(self) -> None:
        """End the thread; nobody waits for it."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _masks(matchers: Sequence[Matcher | None]) -> list[bytes]:
    masks = []
    for matcher in matchers:
        words = None
        if matcher is not None:
            try:
                words = matcher.allowed()
            except Exception as error:  # of the library that follows the grammar: the answer fails, the step goes on
                matcher.failure = f"its grammar cannot be followed: {error!r}"
        masks.append(b"" if words is None else words.tobytes())
    return masks


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
