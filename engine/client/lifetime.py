"""When an engine ends that nobody has closed: its owner was dropped, or the interpreter ends.

Closing joins threads and waits for processes, which the garbage collector must not do: it may run on any thread, under
any lock. So it only queues what is to be closed, and a thread of this module closes it.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable

_log = logging.getLogger(__name__)

_open: set[Lifetime] = set()
_dropped: queue.SimpleQueue[Lifetime] = queue.SimpleQueue()  # its put() may be interrupted by another put()
_starting = threading.Lock()
_reaper: threading.Thread | None = None
_forked = False


class Lifetime:
    """Calls `close` once: in end(), after `owner` was dropped, or at the interpreter's end, whichever is first.

    In a process forked from the one that made it, it does nothing: threads do not survive a fork, and ranks are the
    parent's.
    """

    def __init__(self, owner: object, close: Callable[[], None]) -> None:
        """`close` must not refer to `owner`, which would then never be dropped."""
        self._close = close
        self._process = os.getpid()
        self._ending = threading.Lock()
        self._finalizer = weakref.finalize(owner, _dropped.put, self)
        self._finalizer.atexit = False
        _start_reaper()
        _open.add(self)

    def end(self) -> None:
        """Close, unless that has been done."""
        with self._ending:
            self._finalizer.detach()
            _open.discard(self)
            close, self._close = self._close, _nothing
        if os.getpid() == self._process:
            close()


def _nothing() -> None:
    return


def _start_reaper() -> None:
    global _reaper
    with _starting:
        if _reaper is None:
            _reaper = threading.Thread(target=_reap, name="phalanx-reaper", daemon=True)
            _reaper.start()
            atexit.register(_end_all)


def _reap() -> None:
    while True:
        _end(_dropped.get())


def _end_all() -> None:
    """End every engine before the interpreter does: its C++ threads may not outlive it."""
    for lifetime in list(_open):
        _end(lifetime)


def _end(lifetime: Lifetime) -> None:
    try:
        lifetime.end()
    except Exception:
        _log.exception("an engine that nobody had closed could not be closed")


def is_forked() -> bool:
    """Whether this process was forked from one that had this module already, and maybe an engine."""
    return _forked


def _forget_threads() -> None:
    """After a fork there is no reaper in the child, and nothing of the parent's for it to end."""
    global _reaper, _starting, _forked
    _forked = True
    _reaper = None
    _starting = threading.Lock()
    _open.clear()


os.register_at_fork(after_in_child=_forget_threads)
