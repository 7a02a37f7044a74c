"""Forks the ranks of a client's own group: `python -m phalanx.launch.ranks.fork RUN_DIR`, the fork server.

Its standard input is a socket of the supervisor's (rank_process.py), with which it begins and ends. It imports what
every rank imports, which takes most of a rank's start, and computes nothing: no thread runs, no lock is held and no GPU
is touched when it forks. A rank watches this process as it would watch the supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import NoReturn

import msgspec

from .rank_info import UNKNOWN_RANK, name_rank
from .rank_process import MAX_MESSAGE_BYTES, Ended, Event, Refused, Start, Started

_log = logging.getLogger("phalanx")
_STOPS = (signal.SIGINT, signal.SIGTERM)
_BLAS_THREADS = "OPENBLAS_NUM_THREADS"
_ARGUMENTS, _ENVIRONMENT = 48, 50
"""The numbers of arg_start and env_start among the fields of /proc/PID/stat (proc(5)); their ends follow them."""


def preload() -> None:
    """Import what a rank imports before it knows its model."""
    # numpy's BLAS starts its threads when it is imported; a rank has no use for them.
    own = _BLAS_THREADS not in os.environ
    if own:
        os.environ[_BLAS_THREADS] = "1"
    gc.disable()  # what is imported stays, and looking through it again and again takes a tenth of the time

    import tokenizers  # noqa: F401

    from ...engine import engine  # noqa: F401
    from . import progress, rank, session  # noqa: F401

    gc.freeze()  # nor is it looked through, and so copied, in each rank
    gc.enable()
    if own:
        del os.environ[_BLAS_THREADS]


def why_not_forkable() -> str | None:
    """Why a fork of this process could not work as a rank; None if it can."""
    import torch

    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"the process that was to be forked has {threads} threads after its imports"
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "the process that was to be forked has initialised CUDA"
    return None


class ForkServer:
    """Forks a rank for each Start that comes, and tells how each has ended, until the supervisor has gone."""

    def __init__(self, channel: socket.socket, folder: Path) -> None:
        self._channel = channel
        self._folder = folder
        self._wakeup, wakes = socket.socketpair()
        for end in (self._wakeup, wakes):
            end.setblocking(False)
        self._wakes = wakes
        signal.signal(signal.SIGCHLD, _wake)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)

    def run(self) -> None:
        """Serve the supervisor until its end of the channel closes."""
        while True:
            ready, _, _ = select.select([self._channel, self._wakeup], [], [])
            if self._wakeup in ready:
                self._wakeup.recv(MAX_MESSAGE_BYTES)
                self._reap()
            if self._channel in ready:
                try:
                    message, memories, _, _ = socket.recv_fds(
                        self._channel, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                    )
                except ConnectionResetError:  # it has ended before it read everything
                    return
                if not message:
                    return
                self._fork(msgspec.json.decode(message, type=Start).rank, memories[0] if memories else None)
                for memory in memories:
                    os.close(memory)

    def _tell(self, event: Event) -> None:
        # A supervisor that has ended, as by Ctrl-C while the ranks start, is met by run() next.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.send(msgspec.json.encode(event))

    def _fork(self, rank: int, kept_memory: int | None) -> None:
        reason = why_not_forkable()
        if reason is not None:
            self._tell(Refused(reason))
            return

        server = os.getpid()
        # A signal to the rank waits until the rank decides what it does.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        pid = os.fork()
        if pid == 0:
            self._become(rank, server, kept_memory)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        self._tell(Started(pid))

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._tell(Ended(pid, os.waitstatus_to_exitcode(status)))

    def _become(self, rank: int, server: int, kept_memory: int | None) -> NoReturn:
        """Be this rank, until its end."""
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, *_STOPS):
                signal.signal(number, signal.SIG_DFL)
            self._leave_channels()
            _name_process(rank, self._folder)

            from .rank import run

            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            run(self._folder, parent=server, kept_memory=kept_memory)
        except BaseException:
            traceback.print_exc()
        finally:
            # Whatever happened, no rank goes on as a second fork server.
            os._exit(1)

    def _leave_channels(self) -> None:
        """Close what is the server's, and have no standard input, as a rank that was started by itself."""
        self._wakeup.close()
        self._wakes.close()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, self._channel.detach())
        os.close(nothing)


def _wake(number: int, frame: FrameType | None) -> None:
    """A child's end wakes the selector through the wakeup socket; without a handler there is no wakeup."""


def _name_process(rank: int, folder: Path) -> None:
    """Let this process, its environment and its line in a list of processes name the rank.

    Linux shows others the memory in which a process found its arguments and environment when it began
    (/proc/PID/cmdline and environ): what a fork writes there is seen of it.
    """
    size = int(os.environ["WORLD_SIZE"])
    name = name_rank(rank, size)
    replace_in_environment(name_rank(UNKNOWN_RANK, size), name)
    os.environ.update(name)

    module = f"{__package__}.rank"
    replace_in_arguments(f"{__package__}.fork", module)
    sys.argv = [module, str(folder)]


def replace_in_arguments(old: str, new: str) -> None:
    """Show the argument `new`, of as many bytes, in place of `old`."""
    if len(new.encode()) != len(old.encode()):
        raise ValueError(f"{new!r} must have as many bytes as {old!r}")
    _replace(_ARGUMENTS, old.encode(), new.encode())


def replace_in_environment(old: dict[str, str], new: dict[str, str]) -> None:
    """Show the variables `new`, no longer than `old`, in place of these, which are the last ones in this order.

    Only what other processes see changes, and what C code reads that this process has not set again.
    """
    before, after = (
        b"\0".join(f"{name}={value}".encode() for name, value in variables.items()) for variables in (old, new)
    )
    if len(after) > len(before):
        raise ValueError(f"{new!r} must have no more bytes than {old!r}")
    _replace(_ENVIRONMENT, before, after.ljust(len(before), b"\0"))


def _replace(field: int, old: bytes, new: bytes) -> None:
    """Overwrite the last `old` of the process's own text by `new`, of the same length; it may be missing."""
    try:
        # The second field, a name in parentheses, may hold anything.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[field - 3]), int(fields[field - 2])
    except (OSError, IndexError, ValueError) as error:
        _log.debug("the process shows its old name: %s", error)
        return
    offset = ctypes.string_at(start, end - start).rfind(b"\0" + old + b"\0") + 1 if start else 0
    if offset > 0:
        ctypes.memmove(start + offset, new, len(new))


def main() -> None:
    """Run the fork server, and exit once the supervisor has gone."""
    folder = Path(sys.argv[1])
    # The supervisor ends the ranks that a signal to all its processes reaches as well.
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=0) as channel:
        preload()
        ForkServer(channel, folder).run()
    os._exit(0)


if __name__ == "__main__":
    main()
