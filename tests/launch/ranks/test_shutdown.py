"""However a program ends, nothing of it is left: no rank, no shared memory, no folder; and its exit code says how."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from phalanx.engine.client.client import Client
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.tests.launch.broken_rank import FAULT
from phalanx.tests.launch.programs import (
    ALONE,
    TIMEOUT_S,
    TORCHRUN,
    end_within_5_s,
    family,
    run,
    start,
)
from phalanx.tests.left_behind import nothing_left_behind

pytestmark = pytest.mark.slow

ENDLESS = ("prompt=Go on", "sampling.max_tokens=30000", "sampling.ignore_eos=true", "sampling.temperature=1")
LAUNCHES = {"in process": (ALONE, 1), "own group": (ALONE, 2), "torchrun": (TORCHRUN, None)}


def start_generating(
    model: Path,
    launcher: tuple[str, ...],
    ranks: int | None,
    *options: str,
) -> subprocess.Popen[str]:
    """A generate that has begun to compute and would go on for long."""
    count = [] if ranks is None else [f"ranks={ranks}"]
    process = start("generate", f"model={model}", *ENDLESS, *count, *options, launcher=launcher)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("generation_config"):  # the last line of the report: the engine is ready
            time.sleep(0.5)
            return process
    raise AssertionError(f"generate ended early, with exit code {process.wait()}")


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_rank_within_5_s_with_the_right_exit_code(
    tiny: Path, launch: str, number: signal.Signals
) -> None:
    launcher, ranks = LAUNCHES[launch]
    with nothing_left_behind():
        process = start_generating(tiny, launcher, ranks)
        everyone = family(process.pid)
        process.send_signal(number)
        output = end_within_5_s(process, everyone)
    # torchrun ends with 1 and its own words, whatever the signal.
    assert process.returncode == (1 if launcher else 128 + number)
    assert launcher or "Traceback" not in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [2, 3, 5])  # generate, supervisor, fork server, two ranks
def test_a_signal_while_the_group_is_starting_ends_it_too(tiny: Path, number: signal.Signals, processes: int) -> None:
    with nothing_left_behind():
        process = start("generate", f"model={tiny}", *ENDLESS, "ranks=2")
        deadline = time.monotonic() + TIMEOUT_S
        while len(family(process.pid)) < processes and time.monotonic() < deadline:
            time.sleep(0.01)
        everyone = family(process.pid)
        assert len(everyone) >= processes
        process.send_signal(number)
        end_within_5_s(process, everyone)
    assert process.returncode == 128 + number


@pytest.mark.parametrize("launch", LAUNCHES)
def test_no_rank_outlives_a_program_that_was_killed(tiny: Path, launch: str) -> None:
    launcher, ranks = LAUNCHES[launch]
    with nothing_left_behind():
        process = start_generating(tiny, launcher, ranks)
        everyone = family(process.pid)
        process.kill()
        end_within_5_s(process, everyone)


def test_no_rank_outlives_a_supervisor_that_was_killed(tiny: Path) -> None:
    with nothing_left_behind():
        process = start_generating(tiny, ALONE, 2)
        everyone = family(process.pid)
        supervisor = next(each for each in everyone if "phalanx.launch.ranks.own_group" in each.cmdline())
        supervisor.kill()
        output = end_within_5_s(process, everyone)
    assert process.returncode == 1
    assert "error: the engine's group ended by itself" in output


def test_no_rank_outlives_a_fork_server_that_was_killed(tiny: Path) -> None:
    with nothing_left_behind():
        process = start_generating(tiny, ALONE, 2, "max_restarts=0")
        everyone = family(process.pid)
        server = next(each for each in everyone if "phalanx.launch.ranks.fork" in each.cmdline())
        server.kill()
        output = end_within_5_s(process, everyone)
    assert process.returncode == 1
    assert "failed: SIGKILL: process" in output


def test_a_killed_rank_ends_its_group_and_is_named(tiny: Path) -> None:
    with nothing_left_behind():
        process = start_generating(tiny, ALONE, 2, "max_restarts=0")
        everyone = family(process.pid)
        rank_1 = next(each for each in everyone if each.environ().get("RANK") == "1")
        rank_1.kill()
        output = end_within_5_s(process, everyone)
    assert process.returncode == 1
    assert "error: rank 1 failed: SIGKILL" in output
    assert "Traceback" not in output


def test_a_rank_that_raises_speaks_first_and_torchrun_names_it(tiny: Path) -> None:
    with nothing_left_behind():
        ended = subprocess.run(
            [sys.executable, *TORCHRUN, "-m", "phalanx.tests.launch.broken_rank", f"model={tiny}", *ENDLESS],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert ended.returncode == 1
    said = ended.stderr
    own_words, summary = said.index("rank 1 of 2 failed:\nTraceback"), said.index("Root Cause")
    assert own_words < said.index(f"ZeroDivisionError: {FAULT}") < summary
    assert FAULT in said[said.index("rank      : 1", summary) :]
    assert "rank 0 of 2 failed" not in said


@pytest.mark.parametrize("launcher", [ALONE, TORCHRUN], ids=["own group", "torchrun"])
def test_a_damaged_checkpoint_is_reported_once_with_its_file(
    tiny: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    weights = damaged / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    count = () if launcher else ("ranks=2",)
    with nothing_left_behind():
        ended = run("generate", f"model={damaged}", "prompt=x", *count, launcher=launcher)
    assert ended.returncode == (1 if launcher else 2)
    assert ended.stderr.count("\nerror: ") + ended.stderr.startswith("error: ") == 1
    assert "model.safetensors" in ended.stderr
    assert launcher or "Traceback" not in ended.stderr


def test_a_worker_group_serves_a_client_and_ends_on_sigterm(tiny: Path, tmp_path: Path) -> None:
    socket = tmp_path / "engine"
    with nothing_left_behind():
        process = start("worker", f"model={tiny}", f"address=ipc://{socket}", launcher=TORCHRUN)
        client = Client(ZmqConnection(f"ipc://{socket}"))
        assert client.status(TIMEOUT_S).ranks == 2
        client.close()
        everyone = family(process.pid)
        process.terminate()
        end_within_5_s(process, everyone)
