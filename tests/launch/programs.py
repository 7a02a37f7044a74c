"""Starts our programs as a person would, on pipes or in a terminal of their own."""

from __future__ import annotations

import atexit
import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import psutil

ALONE: tuple[str, ...] = ()
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TIMEOUT_S = 120.0
STOP_S = 5.0


@cache
def _leavings() -> str:
    """A folder that goes with this process, for what torchrun keeps."""
    folder = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """The variables of a program that is started now. Its TMPDIR is this process's, if that has one."""
    mine = os.environ if "TMPDIR" in os.environ else {**os.environ, "TMPDIR": _leavings()}
    return {**mine, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}


def command(program: str, *arguments: object, launcher: tuple[str, ...] = ALONE) -> list[str]:
    """The command line of phalanx.launch.PROGRAM."""
    return [sys.executable, *launcher, "-m", f"phalanx.launch.{program}", *(str(each) for each in arguments)]


def run(
    program: str, *arguments: object, launcher: tuple[str, ...] = ALONE, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return subprocess.run(
        command(program, *arguments, launcher=launcher),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment(),
        cwd=cwd,
        check=False,
    )


def start(program: str, *arguments: object, launcher: tuple[str, ...] = ALONE) -> subprocess.Popen[str]:
    """Start a program whose output is read line by line."""
    return subprocess.Popen(
        command(program, *arguments, launcher=launcher),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def rank_processes(pid: int | None = None) -> list[psutil.Process]:
    """The ranks below a process, this one if none is given, by their numbers; without those that end meanwhile."""
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("launch.ranks.rank" in part for part in child.cmdline()):
                found[int(child.environ()["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def end_within_5_s(process: subprocess.Popen[str], everyone: list[psutil.Process]) -> str:
    """What else the program printed, once it and its whole family have ended. Fails if that takes longer."""
    deadline = time.monotonic() + STOP_S
    output = process.communicate(timeout=STOP_S)[0]
    below = [each for each in everyone if each.pid != process.pid]
    alive = psutil.wait_procs(below, timeout=max(0.0, deadline - time.monotonic()))[1]
    assert alive == []
    return output


class InTerminal:
    """A program in a pseudo-terminal of its own, which is its controlling terminal."""

    def __init__(self, argv: list[str]) -> None:
        variables = environment()
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, variables)
        self.text = ""
        self._seen = 0

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._fd, text.encode())

    def expect(self, wanted: str, timeout_s: float = TIMEOUT_S) -> str:
        """Read until `wanted` is shown; what was shown up to it, since the last expect."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.text[self._seen :]:
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{wanted!r} was not shown; shown was:\n{self.text[self._seen :]}")
        end = self.text.index(wanted, self._seen) + len(wanted)
        shown, self._seen = self.text[self._seen : end], end
        return shown

    def more(self, within_s: float) -> bool:
        """Wait until anything more is shown; False if nothing is."""
        return self._read(within_s)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the program did not end; shown was:\n{self.text}")

    def modes(self) -> list[object]:
        """The terminal's modes."""
        import termios

        return termios.tcgetattr(self._fd)

    def _read(self, timeout_s: float) -> bool:
        if timeout_s <= 0 or not select.select([self._fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other side was closed
            return False
        self.text += data.decode(errors="replace")
        return bool(data)
