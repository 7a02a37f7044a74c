"""The processes in which chat templates are rendered (sandbox.py): started when needed, ended by what takes long."""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import threading
import time
from typing import Any

import msgspec

from ....parallel.child_python import python_command
from ...errors import CapacityExceeded, EngineFault, InvalidRequest

CPU_LIMIT_S = 2.0
"""Seconds of a core that a template may take; a usual one takes milliseconds."""
WALL_LIMIT_S = 20.0
"""Seconds by the clock that it may take, on a machine that is busy with other things."""
PROCESSES = 4
"""Processes at most: one serves thousands of requests a second, the others those who would wait for a slow one."""
PATIENCE_S = 0.2
"""Seconds that a request waits for a process before another is started, which takes half as long."""
BUSY_LIMIT_S = 60.0
"""Seconds that a request waits for others' templates at most."""

REQUEST, REPLY = struct.Struct("<Q"), struct.Struct("<?Q")
"""What comes before a request, [source, variables] as msgpack: its bytes. What comes before a reply, UTF-8: whether it
is the rendered text, or else what went wrong, and its bytes."""


class RenderError(Exception):
    """A template took too long, made too much, or failed; the message says which."""


class _GoneError(Exception):
    """The process had ended before it took the request."""


class TemplateProcesses:
    """Renders templates. Used by any number of threads; close() when it is not used any more.

    One that is dropped without close() closes its sockets with it, and the processes end by that.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[_Process] = []
        self._count = 0
        self._closed = False

    def prepare(self) -> None:
        """Start a process, which the first request would wait for otherwise. Raises EngineFault if that fails."""
        self._give_back(self._take())

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """The text of a template.

        Raises RenderError, InvalidRequest for variables that no message can hold, EngineFault if no process can be
        started, and CapacityExceeded if all are busy for long.
        """
        try:
            request = msgspec.msgpack.encode([source, variables])
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: {error}") from error
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidRequest(f"the messages hold a value that a chat template cannot get: {error}") from error

        while True:
            process = self._take()
            try:
                right, text = process.render(request)
            except _GoneError:
                self._drop(process)
            except BaseException:
                self._drop(process)
                raise
            else:
                self._give_back(process)
                if right:
                    return text
                raise RenderError(text)

    def close(self) -> None:
        """End the processes: those at work when they are done."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            self._drop(process)

    def _take(self) -> _Process:
        """A process that is idle, or a new one."""
        with self._changed:
            if self._count:
                self._changed.wait_for(lambda: self._idle, PATIENCE_S)
            if not self._changed.wait_for(lambda: self._idle or self._count < PROCESSES, BUSY_LIMIT_S):
                raise CapacityExceeded(
                    f"other conversations have kept the chat template busy for {BUSY_LIMIT_S:g} s; try again later"
                )
            if self._idle:
                return self._idle.pop()
            self._count += 1
        try:
            return _Process()
        except BaseException as error:
            self._left()
            raise EngineFault(f"the process that renders chat templates cannot be started: {error}") from error

    def _give_back(self, process: _Process) -> None:
        with self._changed:
            if not self._closed:
                self._idle.append(process)
                self._changed.notify()
                return
        self._drop(process)

    def _drop(self, process: _Process) -> None:
        process.end()
        self._left()

    def _left(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify()


class _Process:
    """One process, used by one thread at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            # In a session of its own, so that Ctrl-C in a terminal is not its to handle.
            self._process = subprocess.Popen(
                python_command(f"{__package__}.sandbox"),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._fresh = True

    def render(self, request: bytes) -> tuple[bool, str]:
        """(whether it is the text, the text or what went wrong).

        Raises RenderError or EngineFault, after which it must be ended, and _GoneError if it had ended before.
        """
        deadline = time.monotonic() + WALL_LIMIT_S
        try:
            self._send(request, deadline)
            header = self._receive(REPLY.size, deadline)
            right, size = REPLY.unpack(header)
            text = self._receive(size, deadline).decode()
        except TimeoutError:
            raise RenderError(f"it took longer than {WALL_LIMIT_S:g} s") from None
        except (OSError, EOFError):
            raise self._why_it_ended() from None
        self._fresh = False
        return right, text

    def end(self) -> None:
        """End it at once."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _send(self, request: bytes, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._socket.sendall(REQUEST.pack(len(request)) + request)
        except (BrokenPipeError, ConnectionResetError):
            if self._fresh:
                raise
            raise _GoneError from None

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            piece = self._socket.recv(min(size - len(received), 1 << 20))
            if not piece:
                raise EOFError
            received += piece
        return bytes(received)

    def _why_it_ended(self) -> Exception:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return RenderError("the process that renders it has closed its socket")
        if code == -signal.SIGPROF:
            return RenderError(f"it took longer than {CPU_LIMIT_S:g} s")
        if self._fresh and code > 0:
            return EngineFault(
                f"the process that renders chat templates ended with exit code {code}; standard error says why"
            )
        return RenderError(f"the process that renders it ended with exit code {code}")
