"""An engine in a process of its own, driven case by case, that is stopped while another one runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from phalanx.benchmarks.lab.peers.programs.program import Case, encode
from phalanx.engine.errors import EngineStopped

CLOSE_TIMEOUT_S = 30.0
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
"""What would keep an engine from instructions or cores that the machine has. No engine gets them."""
LOG_LINES = 15


class EngineProcess:
    """One of the programs of this folder, with every process that it started."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        """Starts and waits until the engine is ready. Raises EngineStopped, with the end of its log, if it fails."""
        self.name = name
        self._log = log
        environment = {name: value for name, value in os.environ.items() if name not in RESTRICTIONS}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.ready_s = float(ready["ready_s"])
        self.version = str(ready["version"])

    def run(self, case: Case) -> dict[str, Any]:
        """The outcome of a case. The process must not be stopped. Raises EngineStopped if it ends."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(case))
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._answer()

    def stop(self) -> None:
        """Suspend it with its children: some engines spin while they wait."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Undo stop()."""
        self._signal(signal.SIGCONT)

    def busy_cores(self, seconds: float) -> float:
        """Cores that it keeps busy over some seconds from now, with its children."""
        ticks = sum(map(_cpu_ticks, self._family()))
        time.sleep(seconds)
        used = sum(map(_cpu_ticks, self._family())) - ticks
        return round(used / os.sysconf("SC_CLK_TCK") / seconds, 2)

    def memory_bytes(self) -> int:
        """Bytes that are resident and its own (not shared with other processes), with its children."""
        return sum(map(_own_memory, self._family()))

    def close(self) -> None:
        """End it with its children. Closing twice is harmless."""
        self.go_on()
        family = self._family()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def _ended(self) -> EngineStopped:
        code = self._process.wait()
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])
        return EngineStopped(f"{self.name} ended with exit code {code}; the end of {self._log}:\n{tail}")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _family(self) -> list[int]:
        """Its process and all descendants, those in sessions of their own too."""
        if self._process.poll() is not None:
            return []
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (fields := _stat(int(entry.name))):
                children.setdefault(int(fields[1]), []).append(int(entry.name))
        family = [self._process.pid]
        for pid in family:  # grows meanwhile
            family += children.get(pid, [])
        return family


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on (field 3 of proc(5)); none if it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


def _own_memory(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
