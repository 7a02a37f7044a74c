"""Supervises a client's own group of ranks on this host: `python -m phalanx.launch.ranks.own_group RUN_DIR`.

No port is opened to bring the ranks together: they meet through files in RUN_DIR, which only their user may enter
(parallel/collectives/file_store.py). The client holds the other end of standard input: when it closes, the group ends.
See engine/client/group_process.py. This process imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec

from ...engine.client.group_failure import GroupFailure, read_failure
from ...engine.config import EngineConfig
from .failure import failure_file
from .process import PARENT_POLL_S, RANK_STOP_TIMEOUT_S, Signalled, exit_within
from .rank_process import RankProcess, RankStarter

GRACE_S = 1.0
"""Seconds beyond RANK_STOP_TIMEOUT_S after which this process leaves; the ranks notice that it has."""


def supervise(folder: Path, config: EngineConfig) -> int:
    """Run the group until it ends. Returns 0, 1 if a rank failed (and failure.json says which), or 128 + signal."""
    ended: queue.SimpleQueue[tuple[int, RankProcess]] = queue.SimpleQueue()
    ranks: list[RankProcess] = []
    number = signal.SIGTERM
    starter = RankStarter(folder, config.ranks)
    try:
        for rank in range(config.ranks):
            process = starter.start(rank)
            ranks.append(process)
            threading.Thread(target=_wait_for, args=(rank, process, ended), daemon=True).start()

        for _ in ranks:
            rank, process = ended.get()
            if process.returncode:
                failure = first_failure(folder, rank, process)
                (folder / "failure.json").write_bytes(msgspec.json.encode(failure))
                return 1
    except Signalled as stopped:
        number = signal.Signals(stopped.exit_code - 128)
        return stopped.exit_code
    finally:
        _stop(ranks, number)
        starter.close()
    return 0


def _wait_for(rank: int, process: RankProcess, ended: queue.SimpleQueue[tuple[int, RankProcess]]) -> None:
    process.wait()
    ended.put((rank, process))


def first_failure(folder: Path, rank: int, process: RankProcess) -> GroupFailure:
    """Return how the rank that ended first failed: as it recorded it, or by the signal or exit code that ended it."""
    recorded = read_failure(failure_file(folder, rank))
    if recorded is not None:
        return recorded
    if process.returncode is not None and process.returncode < 0:
        return GroupFailure(rank, signal.Signals(-process.returncode).name, f"process {process.pid} was killed")
    return GroupFailure(rank, "SystemExit", f"process {process.pid} ended with exit code {process.returncode}")


def _stop(ranks: list[RankProcess], number: signal.Signals) -> None:
    """End the ranks that still run: by a signal, and where that does not help within RANK_STOP_TIMEOUT_S, at once."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)
    deadline = time.monotonic() + RANK_STOP_TIMEOUT_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that the system itself holds up
                process.wait(GRACE_S)


def end_with_client() -> threading.Event:
    """Wait, on a thread, for the client's end, then end the group. The event is set once that has happened.

    The client's end is that of standard input, or of the process that started this one: a process that the client has
    forked may hold the other end of standard input for longer.
    """
    client_gone = threading.Event()
    parent = os.getppid()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.getppid() == parent:
                readable, _, _ = select.select([0], [], [], PARENT_POLL_S)
                if readable and not os.read(0, 4096):
                    break
        client_gone.set()
        os.kill(os.getpid(), signal.SIGTERM)
        exit_within(RANK_STOP_TIMEOUT_S + GRACE_S, 128 + signal.SIGTERM)

    threading.Thread(target=watch, name="phalanx-client-watch", daemon=True).start()
    return client_gone


def _signalled(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the ending of the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Signalled(number)


def main() -> None:
    """Run the supervisor process, and exit with the group's code."""
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGINT, _signalled)
    signal.signal(signal.SIGTERM, _signalled)
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=EngineConfig)
        client_gone = end_with_client()
        code = supervise(folder, config)
    except Signalled as stopped:
        sys.exit(stopped.exit_code)
    if client_gone.is_set():  # else the client removes it
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
