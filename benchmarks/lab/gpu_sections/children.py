"""Groups of sections, each in a process of its own: what fails, hangs or breaks the device takes no other with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GRACE_S = 5.0
"""Seconds that a process may go on after its time, before it is killed."""
LOG_LINES = 12

Sections = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Job:
    """What a process is told."""

    kind: str
    family: str
    sections: dict[str, float]  # in order, with the seconds that each is expected to take
    until: float  # on the monotonic clock, which all processes of a machine share
    device: str
    tiny: bool
    interpret: bool
    ceilings: dict[str, float]


def run_group(program: list[str], job: Job, environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """The sections' results, as they come, from `program`, which is given the job as its last argument.

    A section without a result, since the process ended early or did not end in time, has {"error": why}.
    """
    missing = dict(job.sections)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*program, json.dumps(asdict(job))],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=dict(environment),
        )
        assert process.stdout is not None

        late = threading.Event()
        timer = threading.Timer(max(0.0, job.until + GRACE_S - time.monotonic()), _kill, [process, late])
        timer.start()

        try:
            for line in process.stdout:
                answer = json.loads(line)
                missing.pop(answer["section"], None)
                yield answer["section"], answer["result"]
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)

        log.seek(0)
        tail = "\n".join(log.read().splitlines()[-LOG_LINES:])

    why = "it did not end in time and was killed" if late.is_set() else f"its process ended with exit code {code}"
    for name in missing:
        yield name, {"error": f"{why}; the end of what it printed:\n{tail}"}


def _kill(process: subprocess.Popen[str], late: threading.Event | None = None) -> None:
    """Kill it with the processes that it started."""
    if process.poll() is None:
        if late is not None:
            late.set()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve_job(argument: str, open_group: Callable[[Job], AbstractContextManager[Sections]]) -> None:
    """The program of such a process: every section's result as a line of JSON; what it prints goes to the log."""
    job = Job(**json.loads(argument))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(section: str, result: Any) -> None:
        answers.write(json.dumps({"section": section, "result": result}) + "\n")

    left = list(job.sections)
    try:
        with open_group(job) as sections:
            for name in job.sections:
                answer(name, attempt(sections[name], job.sections[name], job.until))
                left.remove(name)
    except Exception as error:
        for name in left:
            answer(name, failure(error))
        if not left:
            raise


def attempt(section: Callable[[], Any], expected_s: float, until: float) -> Any:
    """Its result, with the seconds that it took; or how it failed; or that there was no time for it."""
    started = time.monotonic()
    if until - started < expected_s:
        return out_of_time(expected_s, until - started)
    try:
        result = section()
    except Exception as error:
        return failure(error)
    return {**result, "measured_in_s": round(time.monotonic() - started, 2)}


def out_of_time(expected_s: float, left_s: float) -> dict[str, str]:
    """Return what the report says of a section that was not begun."""
    return {"skipped": f"time budget: {max(0.0, left_s):.0f} s are left, it may take {expected_s:.0f} s; raise limit_s"}


def failure(error: Exception) -> dict[str, str]:
    """What an error says, and where it came from."""
    trace = "".join(traceback.format_exception(error)).splitlines()
    return {"error": f"{type(error).__name__}: {error}", "trace": "\n".join(trace[-LOG_LINES:])}


def this_program(script: str) -> list[str]:
    """The command that runs a script of this folder's parent as such a process."""
    return [sys.executable, str(Path(script).resolve()), "--job"]
