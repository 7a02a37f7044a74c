"""Rank processes of a client's own group, as its supervisor starts, signals and awaits them.

On Linux a fork server (fork.py) imports torch and the engine once, and every rank is a fork of it: N ranks import once,
and a rank that is started again imports nothing. Elsewhere, and where a fork is refused, each rank is a process of its
own from its start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from ...parallel.child_python import python_command
from ...parallel.loading.kept_memory import is_complete, make_kept_memory
from .rank_info import UNKNOWN_RANK, rank_environment

_log = logging.getLogger("phalanx")
START_S = 300.0
"""Longest time that the fork server may take to fork a rank, its imports included; one that is stopped never does."""
_END_S = 1.0
"""Seconds in which a killed process is gone, unless the system itself holds it up."""
MAX_MESSAGE_BYTES = 4096
"""The size of what the supervisor and the fork server tell each other."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """To the fork server: fork this rank. It answers Started or Refused.

    With it may come the descriptor of memory for the rank's weights, which the rank inherits.
    """

    rank: int


class Started(msgspec.Struct, frozen=True, tag=True):
    """A rank runs in process `pid`. Ended follows."""

    pid: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """This process cannot be forked, for this reason."""

    reason: str


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A rank's process has ended, with an exit code, or minus the number of a signal."""

    pid: int
    returncode: int


Event = Started | Refused | Ended
"""What the fork server tells the supervisor."""


class RankProcess(Protocol):
    """One rank's process: what the supervisor uses of a subprocess.Popen."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs, and until poll() or wait() saw it."""

    def poll(self) -> int | None:
        """The returncode, looked up now."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the returncode. Raises subprocess.TimeoutExpired after `timeout` seconds."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, unless it has ended."""

    def kill(self) -> None:
        """End it at once."""


class RankStarter:
    """Starts the ranks of one group, the first time and again after a rank's end. Used by one thread."""

    def __init__(self, folder: Path, size: int, *, fork: bool = True, keep_weights: bool = False) -> None:
        """`folder` is the group's private one, `size` the number of its ranks; without `fork` none is forked.

        With `keep_weights` each rank gets memory that outlives it, with what the rank before it has put there.
        """
        self._keeps = keep_weights
        self._memories: dict[int, int] = {}  # descriptors, by rank
        self._folder = folder
        self._size = size
        self._fork = fork and _has_process_handles()
        self._server: _ForkServer | None = None

    def __enter__(self) -> RankStarter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self, rank: int) -> RankProcess:
        """Start a rank's process, whose standard input is empty. The first start waits until the imports are done."""
        memory = self._memory_of(rank)
        if self._fork:
            started = self._living_server().start(rank, memory)
            if not isinstance(started, str):
                return started
            _log.warning("ranks are started one by one, which takes longer: %s", started)
            self._fork = False
        command = python_command(f"{__package__}.rank", str(self._folder))
        inherited = [] if memory is None else [memory]
        command += map(str, inherited)
        environment = rank_environment(rank, self._size)
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, pass_fds=inherited)

    def forget_weights(self) -> None:
        """Give up what the ranks have kept: the next ones begin with empty memory."""
        while self._memories:
            os.close(self._memories.popitem()[1])

    def close(self) -> None:
        """End the fork server, and give up what is kept.

        The ranks that it has forked, which should have ended before, end with it.
        """
        self.forget_weights()
        self._end_server()

    def _memory_of(self, rank: int) -> int | None:
        """The memory that a rank is to map, if the one before it has filled it, or else is to fill; None without."""
        memory = self._memories.get(rank)
        if memory is not None and not is_complete(memory):
            os.close(self._memories.pop(rank))
            memory = None
        if memory is None and self._keeps:
            try:
                memory = self._memories[rank] = make_kept_memory()
            except OSError as error:
                _log.warning("weights are not kept for a restart: %s", error)
                self._keeps = False
        return memory

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _living_server(self) -> _ForkServer:
        """The fork server, or a new one in the place of one that has ended."""
        if self._server is None or not self._server.alive:
            self._end_server()
            self._server = _ForkServer(self._folder, self._size)
        return self._server


def _has_process_handles() -> bool:
    """Whether a process can be signalled that is no child of this one, without taking a later one for it: on Linux,
    where no sandbox forbids it."""
    if sys.platform != "linux":
        return False
    try:
        handle = os.pidfd_open(os.getpid())
    except OSError as error:
        _log.debug("no rank is forked: %s", error)
        return False
    try:
        signal.pidfd_send_signal(handle, 0)
    except OSError as error:
        _log.debug("no rank is forked: %s", error)
        return False
    finally:
        os.close(handle)
    return True


class ForkedRank:
    """A RankProcess that the fork server has forked, and waits for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        # Unlike a number, it never means another process that came later.
        self._handle: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it has ended already, of which the fork server tells next
            self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """As RankProcess.poll."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As RankProcess.wait."""
        if not self._ended.wait(timeout):
            assert timeout is not None
            raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """As RankProcess.send_signal."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._handle is not None:
                signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """As RankProcess.kill."""
        self.send_signal(signal.SIGKILL)

    def set_ended(self, returncode: int) -> None:
        """Note how it has ended."""
        with self._lock:
            self.returncode = returncode
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None
        self._ended.set()

    def end_with_server(self) -> None:
        """End it, now that nobody waits for it any more, and note that it was killed."""
        if self._handle is not None:
            self.kill()
            select.select([self._handle], [], [], _END_S)
        self.set_ended(-signal.SIGKILL)


class _ForkServer:
    """The process that forks ranks, and a thread that hears of their ends."""

    def __init__(self, folder: Path, size: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                python_command(f"{__package__}.fork", str(folder)),
                env=rank_environment(UNKNOWN_RANK, size),
                stdin=theirs.fileno(),
            )
        self._ranks: dict[int, ForkedRank] = {}  # those that run, by their process id
        self._answers: queue.SimpleQueue[ForkedRank | str] = queue.SimpleQueue()
        self._gone = threading.Event()
        threading.Thread(target=self._listen, name="phalanx-fork-server", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it may still fork."""
        return not self._gone.is_set()

    def start(self, rank: int, memory: int | None) -> ForkedRank | str:
        """Fork a rank once the imports are done, and give it that memory. A text says why that cannot be."""
        try:
            socket.send_fds(self._channel, [msgspec.json.encode(Start(rank))], [] if memory is None else [memory])
        except OSError as error:
            return f"the process that forks them has ended ({error})"
        try:
            return self._answers.get(timeout=START_S)
        except queue.Empty:
            self.close()
            return f"the process that forks them has not answered for {START_S:g} s"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the system itself holds up
            self._process.wait(_END_S)
        self._gone.wait(2 * _END_S)
        self._channel.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # as the end of what there is to hear
            while message := self._channel.recv(MAX_MESSAGE_BYTES):
                self._take(msgspec.json.decode(message, type=Event))
        for rank in self._ranks.values():
            rank.end_with_server()
        self._gone.set()
        self._answers.put("the process that forks them has ended; its error stands above, if it had one")

    def _take(self, event: Event) -> None:
        match event:
            case Started(pid):
                rank = self._ranks[pid] = ForkedRank(pid)
                self._answers.put(rank)
            case Refused(reason):
                self._answers.put(reason)
            case Ended(pid, returncode):
                self._ranks.pop(pid).set_ended(returncode)
