"""Whether anything is left of what a test started, whatever else runs on the machine at the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from phalanx.benchmarks.lab.traces import Traces, temporary_folder

END_S = 5.0
"""Seconds within which processes must be gone."""


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[Traces]:
    """Fails if a process, shared memory or a file is there afterwards that was made within the block.

    What this process makes counts, and what processes make that are started within the block.
    """
    with temporary_folder() as folder:
        traces = Traces(folder)
        yield traces
        left = traces.left(END_S)
        assert left == [], left
