"""When an engine ends that nobody has closed: its owner was dropped, or the interpreter ends.

Closing joins threads and waits for processes, which the garbage collector must not do: it may run on any thread, under
any lock. So it only queues what is to be closed, and a thread of this module closes it. A signal handler may interrupt
a call that holds a lock, too: then it does the same.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_log = logging.getLogger(__name__)

_open: set[Lifetime] = set()
_dropped: queue.SimpleQueue[Lifetime | None] = queue.SimpleQueue()  # its put() may be interrupted by another put()
_locking: set[CodeType] = set()
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
        """Close, unless that has been done. Within a signal handler that interrupts a call, it is closed after that."""
        if interrupts_call():
            _dropped.put(self)
            return
        with self._ending:
            self._finalizer.detach()
            _open.discard(self)
            close, self._close = self._close, _nothing
        if os.getpid() == self._process:
            close()


def takes_locks(method: F) -> F:
    """Decorate a method that takes locks in its caller's thread."""
    _locking.add(method.__code__)
    return method


def interrupts_call(of: object = None) -> bool:
    """Whether this is called, by a signal handler, within a method that takes locks: of the object `of`, or of any.

    Such a lock may be held, and the handler would wait for it for ever.
    """
    if threading.get_ident() != threading.main_thread().ident:  # handlers run there alone
        return False
    frame = sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code in _locking and (of is None or frame.f_locals.get("self") is of):
            return True
        frame = frame.f_back
    return False


def _nothing() -> None:
    return


def _start_reaper() -> None:
    global _reaper
    with _starting:
        if _reaper is None:
            reaper = threading.Thread(target=_reap, name="phalanx-reaper", daemon=True)
            reaper.start()
            _reaper = reaper
            atexit.register(_end_all)


def _reap() -> None:
    while (lifetime := _dropped.get()) is not None:
        _end(lifetime)


def _end_all() -> None:
    """End every engine before the interpreter does: its C++ threads may not outlive it."""
    for lifetime in list(_open):
        _end(lifetime)
    if _reaper is not None:  # it may be closing one
        _dropped.put(None)
        _reaper.join()


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
