"""A launch.serve of its own to disturb: its ranks, how it is, and what it has open or leaves behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx.benchmarks.lab.agent_model import make_agent_model
from phalanx.benchmarks.lab.traces import Traces
from phalanx.engine.client.group_failure import GroupState, read_state
from phalanx.engine.coordinator.text.template_processes import PROCESSES
from phalanx.engine.errors import EngineStopped

READY_S = 180.0
"""Seconds within which a group must be ready again."""
END_S = 30.0
REQUEST_S = 60.0
TEMPLATES = "phalanx.engine.coordinator.text.sandbox"
SETTLE_S = 15.0
"""Seconds within which what has ended must be gone."""


class Server:
    """One in a process of its own, with a folder for all that it leaves on disk."""

    def __init__(self, model: Path, ranks: int, *settings: str) -> None:
        """Start it with more settings of launch.serve, and wait until it is ready. Raises EngineStopped."""
        self.count = ranks
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._temporary = self.folder / "tmp"
        self._temporary.mkdir()
        self._traces = Traces(self._temporary)
        self._log = (self.folder / "log").open("w+")
        agent = make_agent_model(self.folder / "model", model)
        command = [
            *(sys.executable, "-m", "phalanx.launch.serve", f"model={agent}", f"ranks={ranks}", "dtype=float32"),
            *("port=0", "poll_interval_s=0.1", "served_model_names=[m]", "log_level=error", "affinity_entries=1"),
            *("tokenizer_store=none", f"max_restarts={10**6}", *settings),
        ]
        self.process = psutil.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TMPDIR": str(self._temporary)},
        )
        self.url = self._url()
        self.http = httpx.Client(base_url=self.url, timeout=REQUEST_S, trust_env=False)

    def _url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "is ready at" in line:
                # What it prints later is read too, so that it never waits for it.
                threading.Thread(target=self.process.stdout.read, daemon=True).start()
                return str(line.split(" at ")[1].split()[0])
        raise EngineStopped(f"the server ended before it was ready: {self.log[-2000:]}")

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return (self.folder / "log").read_text(errors="replace")

    @property
    def state(self) -> GroupState:
        """What the supervisor of its ranks says."""
        folder = next(self._temporary.glob("phalanx-*"), None)
        return (read_state(folder) if folder is not None else None) or GroupState("starting")

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of its ranks, by number."""
        found = {}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error, KeyError, ValueError):
                if any("launch.ranks.rank" in part for part in child.cmdline()):
                    found[int(child.environ()["RANK"])] = child
        return found

    def readiness(self) -> tuple[bool, str]:
        """Whether it says that it takes requests, and the reason if it does not."""
        answer = self.http.get("/health/ready")
        return answer.status_code == 200, "" if answer.status_code == 200 else str(answer.json().get("reason"))

    def wait_until_ready(self) -> None:
        """Return once all ranks are there and it is ready. Raises EngineStopped after READY_S."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if self.state.phase == "running" and len(self.ranks()) == self.count and self.readiness()[0]:
                return
            time.sleep(0.05)
        raise EngineStopped(f"the server was not ready within {READY_S:g} s: {self.readiness()[1]}; {self.log[-2000:]}")

    def open_requests(self) -> list[str]:
        """What its metrics say is still there."""
        names = ("phalanx:open_requests", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
        found = []
        for line in self.http.get("/metrics").text.splitlines():
            if line.partition("{")[0] in names and float(line.rpartition(" ")[2]):
                found.append(line)
        return found

    def holds(self) -> dict[str, dict[str, int]]:
        """What its lasting processes have open: descriptors by kind, threads and mapped files, by process."""
        lasting = {"gateway": self.process}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                for name in ("own_group", "fork"):
                    if any(part.endswith(f"launch.ranks.{name}") for part in child.cmdline()):
                        lasting[name] = child
        found: dict[str, dict[str, int]] = {}
        for name, process in lasting.items():
            with contextlib.suppress(psutil.Error, OSError):
                found[name] = {**_descriptors(process.pid), "threads": process.num_threads()}
        found["server"] = programs(self._traces.processes())
        found["machine"] = {"shared segments": len(self._traces.shared_memory())}
        found["temporary folder"] = {"files": sum(1 for _ in self._temporary.rglob("*"))}
        return found

    def memory(self) -> dict[str, float]:
        """MiB of the gateway and of its lasting children that are resident."""
        everyone = {"gateway": self.process}
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                for name in ("own_group", "fork"):
                    if any(part.endswith(f"launch.ranks.{name}") for part in child.cmdline()):
                        everyone[name] = child
        return {name: round(each.memory_info().rss / 2**20, 1) for name, each in everyone.items()}

    def grown(self, before: dict[str, dict[str, int]]) -> list[str]:
        """What it has open beyond `before`, once that has had SETTLE_S to go."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            now = self.holds()
            more = [
                f"{number - before.get(where, {}).get(what, 0)} more {what} of {where}"
                for where, counts in now.items()
                for what, number in counts.items()
                if number > before.get(where, {}).get(what, 0)
            ]
            more += self.open_requests()
            if not more or time.monotonic() > deadline:
                return more
            time.sleep(0.5)

    def stop(self) -> list[str]:
        """End it. Returns what it leaves behind."""
        self.http.close()
        everyone = self._traces.processes()
        self.process.send_signal(signal.SIGTERM)
        psutil.wait_procs(everyone, timeout=END_S)
        left = self._traces.left(0.0)
        for each in self._traces.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self._log.close()
        return left

    def remove(self) -> None:
        """Take its folder away, log and all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def programs(processes: Sequence[psutil.Process]) -> dict[str, int]:
    """How many run each program, by the module or file that they began with.

    Those that render chat templates are started as they are needed and stay, up to PROCESSES, which is what counts.
    """
    found: Counter[str] = Counter()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            module = words[words.index("-m") + 1] if "-m" in words[:-1] else " ".join(words[:2])
            found[f"processes of {module}"] += 1
    templates = f"processes of {TEMPLATES}"
    found[templates] = max(PROCESSES, found[templates])
    return dict(found)


def _descriptors(pid: int) -> dict[str, int]:
    """Open descriptors of a process, by kind."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            kinds[target.partition(":")[0] if ":" in target else "file"] += 1
    return dict(kinds)


def percentile(values: list[float], share: float) -> float | None:
    """The value below which so much of them is; None of none."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2) if ordered else None


def summary(rows: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """Median and most of a column."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return {"median": percentile(values, 0.5), "most": round(max(values), 2) if values else None}
