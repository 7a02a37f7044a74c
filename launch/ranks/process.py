"""How a process of phalanx ends: on a signal, with its launcher, with its standard output, or at once."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

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


class OutputLost(BaseException):
    """Standard output cannot be written. Not an Exception: only the program's outermost level handles it."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written: {cause.strerror or cause}")
        self.unread = cause.errno == errno.EPIPE
        """Whether the reader has gone, as that of `... | head -1` has: such an end is quiet."""

    @property
    def exit_code(self) -> int:
        """As of a program that the signal for such a pipe ends, or 1."""
        return 128 + signal.SIGPIPE if self.unread else 1


class _Stream:
    """A text or byte stream that calls _failed() with the OSError of a write; everything else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        try:
            return int(self._stream.write(data))
        except OSError as error:
            self._failed(error)
        return len(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Standard error's own way: what it cannot say it says to nobody, and the program goes on."""


class _Output(_Stream):
    @property
    def buffer(self) -> _Output:
        return _Output(self._stream.buffer)

    def _failed(self, error: OSError) -> NoReturn:
        raise OutputLost(error) from None


def watch_streams() -> None:
    """Let a failing write to standard output raise OutputLost, and one to standard error be lost alone.

    A stream that is closed becomes the null device: otherwise the next file that is opened would get its number, and
    with it what libraries write there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    streams: Any = sys
    if not isinstance(streams.stdout, _Stream):
        streams.stdout = _Output(_or_null(streams.stdout))
        # A character that a terminal's encoding lacks (LC_ALL=C) is written as standard error writes it.
        if isinstance(output := streams.stdout._stream, io.TextIOWrapper):
            output.reconfigure(errors="backslashreplace")
    if not isinstance(streams.stderr, _Stream):
        streams.stderr = _Stream(_or_null(streams.stderr))


def drop_output() -> None:
    """Send what standard output still holds to the null device, so that the interpreter's end says nothing of it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _or_null(stream: Any) -> Any:
    return open(os.devnull, "w") if stream is None else stream
