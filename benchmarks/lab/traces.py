"""What the processes of one run have and leave behind, told apart from what other programs do on the machine meanwhile.

A run gives what it starts a temporary folder of its own (TMPDIR). Processes inherit it, so they are found by it whoever
their parent is by now. Shared memory is the run's if one of its processes has it open, and also if it has one of our
names and no process of anybody else has it open.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SHARED_MEMORY = "/dev/shm"
OUR_NAMES = "phalanx"
"""How names of our shared memory begin (parallel/collectives/shared_memory.py)."""
TORCHRUNS_FOLDERS = "torchelastic_"
"""How names of folders begin that torchrun keeps on purpose."""


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """The folder in which this process, and those that it starts within the block, put what is temporary.

    Its path is short: sockets are made in it, whose paths have at most 107 bytes.
    """
    directory, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="run-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = directory
            if variable is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = variable


class Traces:
    """What this process, and processes with a temporary folder of their own, have from now on."""

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` is their TMPDIR."""
        self._folder = folder
        self._before = _names()
        self._seen: set[str] = set()

    def processes(self) -> list[psutil.Process]:
        """Those that run with the folder; not this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TMPDIR") == str(self._folder) and process.pid != os.getpid():
                    found.append(process)
        return found

    def shared_memory(self) -> set[str]:
        """Names in /dev/shm that were not there at first, and that the run's processes, or dead ones, have made.

        What they hold when this is called counts later on too, when nobody may hold it any more.
        """
        new = _names() - self._before
        if not new:
            return set()
        own = {os.getpid()} | {process.pid for process in self.processes()}
        others: set[str] = set()
        for pid in psutil.pids():
            (self._seen if pid in own else others).update(_held(pid))
        found = {name for name in new if name in self._seen or (name.startswith(OUR_NAMES) and name not in others)}
        # What has gone meanwhile had a name only while somebody opened it.
        return found & _names()

    def listening(self) -> set[int]:
        """TCP ports at which the run's processes wait for connections."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                connections = process.net_connections("tcp")
                found |= {each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN}
        return found

    def files(self) -> list[Path]:
        """What is in the folder, apart from what torchrun keeps."""
        paths = self._folder.iterdir() if self._folder is not None else ()
        return [path for path in paths if not path.name.startswith(TORCHRUNS_FOLDERS)]

    def left(self, within_s: float) -> list[str]:
        """What is there although the run has ended: processes after so many seconds, and then memory and files."""
        deadline = time.monotonic() + within_s
        while (processes := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = []
        for process in processes:
            with contextlib.suppress(psutil.Error):
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:100]}")
        found += [f"{SHARED_MEMORY}/{name}" for name in sorted(self.shared_memory())]
        return found + [str(path) for path in self.files()]


def _names() -> set[str]:
    """Names in /dev/shm of what belongs to this user."""
    found = set()
    for entry in os.scandir(SHARED_MEMORY):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                found.add(entry.name)
    return found


def _held(pid: int) -> set[str]:
    """Names in /dev/shm of what a process has open or mapped; none if it has ended, or is another user's."""
    paths = []
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                paths.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    with contextlib.suppress(OSError):
        # Its sixth field is the path (proc(5)).
        fields = (line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
        paths += [each[5] for each in fields if len(each) == 6]
    start = f"{SHARED_MEMORY}/"
    return {path.removeprefix(start).partition("/")[0] for path in paths if path.startswith(start)}
