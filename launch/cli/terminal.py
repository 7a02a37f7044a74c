"""The terminal of a chat: a line editor, and Ctrl-C as a key rather than as a signal.

Under torchrun a signal of the terminal would end torchrun, and never reach the ranks, which have sessions of their own.
So Ctrl-C makes no signal while a chat runs: the line editor and the streaming answer watch for the key itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..ranks.process import before_exit

INTERRUPT = b"\x03"
# Indices into what termios.tcgetattr returns.
_LFLAG = 3
_CC = 6
_DISABLED = b"\x00"


class Terminal:
    """Standard input as a terminal whose Ctrl-C is a key. Make it in the main thread; restore() undoes it."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._original = termios.tcgetattr(self._fd)
        before_exit(self.restore)
        self._mode = self._changed(_without_interrupt)
        self._set(self._mode)
        self._edit = _gnu_readline()

    def restore(self) -> None:
        """Put the terminal back as it was."""
        self._set(self._original)

    def read_line(self, prompt: str) -> str | None:
        """Read one line, without its end; "" after Ctrl-C, which drops what was typed. None at Ctrl-D."""
        self._set(self._mode)
        if not self._edit:
            return self._read_line_plainly(prompt)
        try:
            return input(prompt)
        except EOFError:
            return None

    @contextlib.contextmanager
    def on_interrupt(self, action: Callable[[], None]) -> Iterator[None]:
        """While inside, Ctrl-C calls `action`, on another thread; other keys are dropped."""
        self._set(self._changed(_key_by_key))
        wake, stop = os.pipe()
        thread = threading.Thread(target=self._watch, args=(wake, action), name="phalanx-keys", daemon=True)
        thread.start()
        try:
            yield
        finally:
            os.close(stop)
            thread.join()
            os.close(wake)
            self._set(self._mode)

    def _watch(self, wake: int, action: Callable[[], None]) -> None:
        while True:
            ready, _, _ = select.select([self._fd, wake], [], [])
            if wake in ready:
                return
            keys = os.read(self._fd, 1024)
            if not keys:  # the terminal has gone
                return
            if INTERRUPT in keys:
                action()

    def _read_line_plainly(self, prompt: str) -> str | None:
        print(prompt, end="", flush=True)
        line = os.read(self._fd, 65536)
        if line.endswith(INTERRUPT):
            print()
            return ""
        return line.decode(errors="replace").rstrip("\r\n") if line else None

    def _changed(self, change: Callable[[list[Any]], None]) -> list[Any]:
        mode = [*self._original[:_CC], list(self._original[_CC])]
        _without_interrupt(mode)
        change(mode)
        return mode

    def _set(self, mode: list[Any]) -> None:
        with contextlib.suppress(termios.error):  # a terminal that has gone needs no mode
            termios.tcsetattr(self._fd, termios.TCSADRAIN, mode)


def _without_interrupt(mode: list[Any]) -> None:
    mode[_CC][termios.VINTR] = _DISABLED
    mode[_CC][termios.VEOL] = INTERRUPT  # without readline the kernel edits the line: it is complete at Ctrl-C


def _key_by_key(mode: list[Any]) -> None:
    mode[_LFLAG] &= ~(termios.ICANON | termios.ECHO)
    mode[_CC][termios.VMIN] = 1
    mode[_CC][termios.VTIME] = 0


def _gnu_readline() -> bool:
    """Use GNU readline for input(), if this Python has it: history, and editing with the arrow keys."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or ""):
        return False
    readline.parse_and_bind(r'"\C-c": "\C-e\C-u\C-m"')  # drop the line, and return an empty one
    return True
