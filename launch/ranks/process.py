"""How a process of phalanx ends: on a signal, with its launcher, or at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_TIMEOUT_S = 4.0
"""A clean stop that takes longer is cut short, so that everything has ended within 5 s of a signal."""
RANK_STOP_TIMEOUT_S = 1.5
"""The same for a rank that serves clients: its client may have waited before it passed the signal on."""
PARENT_POLL_S = 0.25

_before_exit: list[Callable[[], None]] = []


class Signalled(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception: only the program's outermost level handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def before_exit(action: Callable[[], None]) -> None:
    """Run `action` also when the process is ended by exit_now (the terminal's modes outlive a process)."""
    _before_exit.append(action)


def exit_now(code: int) -> NoReturn:
    """End the process from any thread, whatever its other threads do."""
    for action in _before_exit:
        action()
    os._exit(code)


def exit_within(seconds: float, code: int) -> None:
    """End the process with `code` after `seconds`, unless it has ended by then."""
    timer = threading.Timer(seconds, exit_now, (code,))
    timer.daemon = True
    timer.start()


def stop_on_signals(on_first: Callable[[int], None] | None = None, within_s: float = STOP_TIMEOUT_S) -> list[int]:
    """Let the first SIGINT or SIGTERM call `on_first` (by default it raises Signalled), and allow `within_s` seconds.

    A second one ends the process at once. `on_first` runs in the signal handler: it may take no lock, for the thread it
    interrupts may hold it. The time runs from the signal, also while the main thread waits in C, as for a rank that
    does not come: no handler of Python's is called there. Returns a list in which the signal is once it has come.
    """
    seen: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def limit() -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):  # other signals wake too
            [number] = os.read(reader, 1)
        time.sleep(within_s)
        exit_now(128 + number)

    threading.Thread(target=limit, name="phalanx-stop-limit", daemon=True).start()

    def handle(number: int, frame: FrameType | None) -> None:
        if seen:
            exit_now(128 + number)
        seen.append(number)
        with contextlib.suppress(BlockingIOError):  # full of what the limit has yet to read
            os.write(writer, bytes([number]))  # starting a thread here would take locks
        if on_first is None:
            raise Signalled(number)
        on_first(number)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return seen


def die_on_signals() -> None:
    """Let SIGINT and SIGTERM end the process at once: for ranks that hold nothing anybody waits for."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with_parent(parent: int | None = None) -> None:
    """Watch, on a thread, the process that started this one; once it has gone, however it went, end this one too.

    `parent` is its process id, where that is known from before this process began.
    """
    if parent is None:
        parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        exit_now(1)

    threading.Thread(target=watch, name="phalanx-parent-watch", daemon=True).start()
