"""Torch's own threads, where they are in the way of the kernels' threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let the calling thread use torch without torch's own threads. Other threads of the process are not affected.

    After each operation torch's threads spin for milliseconds on the cores that phalanx's kernels compute on.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # That also changed the default of threads that have not used torch yet: another thread puts it back.
    others = threading.Thread(target=torch.set_num_threads, args=(before,))
    others.start()
    others.join()
    try:
        yield
    finally:
        torch.set_num_threads(before)
