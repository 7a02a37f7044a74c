"""Loading progress on rank 0's terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from .rank_info import RankInfo

if TYPE_CHECKING:
    from ...parallel.loading.checkpoint import Progress

_PERIOD_S = 0.1


def loading_progress(rank_info: RankInfo) -> Progress | None:
    """Return a callback that shows rank 0's loaded bytes on one line, cleared at the end; None without a terminal."""
    if rank_info.rank != 0 or not sys.stderr.isatty():
        return None
    shown_at = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if done < total and time.monotonic() - shown_at < _PERIOD_S:
            return
        shown_at = time.monotonic()
        line = f"loading weights: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * done // max(1, total)}%)"
        sys.stderr.write(f"\r\033[K{line}" if done < total else "\r\033[K")
        sys.stderr.flush()

    return show
