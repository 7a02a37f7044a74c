"""What every fuzzing target must keep: a bound of time. The driver bounds memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

LIMIT_S = 1.0
"""Seconds of CPU that one input may take."""
INSTRUMENTED = 1.0
"""How many times slower code may be while a fuzzer counts what it covers; the driver raises it."""
MESSAGE_CHARACTERS = 3000


class TooSlowError(AssertionError):
    """An input took longer than it may."""


@contextmanager
def in_time(limit_s: float = LIMIT_S) -> Iterator[None]:
    """Raise TooSlowError if the block takes more than so many seconds of this process's CPU time."""
    began = time.process_time()
    yield
    seconds = time.process_time() - began
    if seconds > limit_s * INSTRUMENTED:
        raise TooSlowError(f"one input took {seconds:.2f} s of CPU; it may take {limit_s * INSTRUMENTED:g}")


def check_message(error: BaseException) -> None:
    """Fail if an error's message could not be shown, or is as long as what it is about."""
    message = str(error)
    assert message
    assert len(message) < MESSAGE_CHARACTERS, len(message)
    message.encode()
