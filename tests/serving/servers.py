"""Starts launch.gateway and launch.serve as a person would, and reads what they print."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
from phalanx.tests.launch.programs import TIMEOUT_S, start


class RunningServer:
    """A server in a process of its own; everything that it prints is collected on a thread."""

    def __init__(self, program: str, *arguments: object) -> None:
        self.process = start(program, *arguments)
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> str:
        """The first line that holds `text`."""
        with self._news:
            found = self._news.wait_for(lambda: self._find(text) or not self._reader.is_alive(), TIMEOUT_S)
            line = self._find(text)
        assert line is not None, f"{text!r} was not printed ({found}); printed was:\n{self.text}"
        return line

    @property
    def url(self) -> str:
        """Where it answers, once it has said so."""
        return self.wait_for("is ready at").split(" at ")[1].split()[0]

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "".join(self.lines)

    @property
    def has_torch(self) -> bool:
        """Whether its process has torch loaded."""
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code

    def _find(self, text: str) -> str | None:
        return next((line for line in self.lines if text in line), None)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()


@contextlib.contextmanager
def running(program: str, *arguments: object) -> Iterator[RunningServer]:
    """A server that is ended with the block."""
    server = RunningServer(program, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGTERM)
            try:
                server.process.wait(30)
            except subprocess.TimeoutExpired:
                server.process.kill()
        server.wait()


def wait_until_it_listens(server: RunningServer) -> str:
    """The address of a server that listens, though its engine may still load."""
    for _ in range(int(TIMEOUT_S / 0.05)):
        assert server.process.poll() is None, server.text
        for each in psutil.Process(server.process.pid).net_connections("inet"):
            if each.status == psutil.CONN_LISTEN:
                return f"http://127.0.0.1:{each.laddr.port}"
        threading.Event().wait(0.05)
    raise AssertionError(server.text)
