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

from ...engine.client.group_failure import (
    FAILURE_FILE,
    READY_FILE,
    STATE_FILE,
    GroupFailure,
    GroupState,
    read_failure,
    write_whole,
)
from ...engine.config import EngineConfig
from ...engine.execution.heartbeat import BEATS_FILE, make_beats_file
from ...engine.models.hub import resolve_model
from ...parallel.loading.kept_memory import identity_of_files
from .failure import failure_file
from .hang_watch import HangWatch, RankSights, Stall, collect_stacks, stacks_file
from .process import PARENT_POLL_S, RANK_STOP_TIMEOUT_S, Signalled, exit_within
from .rank_process import RankProcess, RankStarter
from .restarts import Restarts

GRACE_S = 1.0
"""Seconds beyond RANK_STOP_TIMEOUT_S after which this process leaves; the ranks notice that it has."""
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no process sends itself for a fault of its own; SIGKILL may also come from a system without memory."""
TICK_S = 0.1
"""Seconds between two looks at how the ranks are."""


def supervise(folder: Path, config: EngineConfig) -> int:
    """Run the group, and start it again when it dies, until it ends well or restarting does not help.

    Returns 0, 1 if a rank failed (and failure.json says which), or 128 + signal.
    """
    restarts = Restarts(config.max_restarts, config.restart_window_s)
    keeps = config.weights != "read" and config.device != "cuda" and config.max_restarts > 0
    starter = RankStarter(folder, config.ranks, keep_weights=keeps)
    model = resolve_model(config.model, weights=config.load_format != "dummy")
    try:
        while True:
            files = identity_of_files(model)
            failure = _run_once(folder, config, starter, restarts)
            if failure is None:
                return 0
            if isinstance(failure, GroupFailure):
                return 1
            time.sleep(failure)
            _clear(folder, config.ranks)
            if identity_of_files(model) != files:
                starter.forget_weights()
    except Signalled as stopped:
        return stopped.exit_code
    finally:
        starter.close()


def _run_once(
    folder: Path, config: EngineConfig, starter: RankStarter, restarts: Restarts
) -> GroupFailure | float | None:
    """Start the ranks and wait for the group's end.

    Returns None if it ended well, the seconds until it is to be started again, or the failure that ended it for good.
    """
    ranks: list[RankProcess] = []
    number: signal.Signals = signal.SIGTERM
    try:
        if not restarts.count:
            write_whole(folder / STATE_FILE, GroupState("starting"))
        make_beats_file(folder / BEATS_FILE, config.ranks)
        start_ranks(starter, config.ranks, ranks)
        failure = _watch(folder, config, ranks, restarts.count)
        if failure is None:
            return None

        write_whole(folder / FAILURE_FILE, failure)
        pause_s = restarts.pause_s(failure.error, (folder / READY_FILE).exists())
        if pause_s is None:
            return failure
        # The other ranks have nothing left to do that anybody waits for.
        number = signal.SIGKILL
        write_whole(folder / STATE_FILE, GroupState("restarting", str(failure), restarts.count))
        print(f"{failure}; the group is started again (restart {restarts.count})", file=sys.stderr, flush=True)
        return pause_s
    except Signalled as stopped:
        number = signal.Signals(stopped.exit_code - 128)
        raise
    finally:
        _stop(ranks, number)


def _watch(folder: Path, config: EngineConfig, ranks: list[RankProcess], restarts: int) -> GroupFailure | None:
    """Wait until all ranks have ended well, or one has not: then return its failure."""
    ended: queue.SimpleQueue[tuple[int, RankProcess]] = queue.SimpleQueue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=_wait_for, args=(rank, process, ended), daemon=True).start()

    pids = [process.pid for process in ranks]
    sights = RankSights(folder / BEATS_FILE, pids)
    hangs = HangWatch(config.step_timeout_s, config.timeout_s)
    left = len(ranks)
    ready = False
    oom_kills = count_oom_kills()
    try:
        while left:
            try:
                rank, process = ended.get(timeout=TICK_S)
            except queue.Empty:
                if not ready and (folder / READY_FILE).exists():
                    ready = True
                    write_whole(folder / STATE_FILE, GroupState("running", restarts=restarts))
                stall = hangs.look(sights.look())
                if stall is not None:
                    return _report(folder, stall, pids, restarts)
                continue
            if process.returncode:
                return first_failure(folder, rank, process, oom_kills)
            left -= 1
    finally:
        sights.close()
    return None


def _report(folder: Path, stall: Stall, pids: list[int], restarts: int) -> GroupFailure:
    """Tell the client and the log of a group that hangs."""
    write_whole(folder / STATE_FILE, GroupState("stalled", stall.why, restarts))
    print(f"{stall.why}; the ranks' stacks:\n{collect_stacks(folder, pids)}", file=sys.stderr, flush=True)
    return GroupFailure(stall.rank, "Hung", stall.why, stall.stopped)


def _clear(folder: Path, size: int) -> None:
    """Take away what ranks that have gone left in the folder, so that the next ones do not take it for their own."""
    of_ranks = [path(folder, rank) for rank in range(size) for path in (failure_file, stacks_file)]
    for path in (folder / "store", folder / READY_FILE, *of_ranks):
        path.unlink(missing_ok=True)


def start_ranks(starter: RankStarter, size: int, ranks: list[RankProcess]) -> None:
    """Start a process for each rank, and append it to `ranks` at once: those are to be ended whatever happens."""
    for rank in range(size):
        ranks.append(starter.start(rank))


def _wait_for(rank: int, process: RankProcess, ended: queue.SimpleQueue[tuple[int, RankProcess]]) -> None:
    process.wait()
    ended.put((rank, process))


def first_failure(folder: Path, rank: int, process: RankProcess, oom_kills: int | None = None) -> GroupFailure:
    """Return how the rank that ended first failed: as it recorded it, or by the signal or exit code that ended it.

    `oom_kills` is what count_oom_kills() returned when it was started.
    """
    recorded = read_failure(failure_file(folder, rank))
    if recorded is not None:
        return recorded
    if process.returncode is not None and process.returncode < 0:
        number = -process.returncode
        from_outside = number in OUTSIDE and oom_kills is not None and count_oom_kills() == oom_kills
        return GroupFailure(rank, _signal_name(number), f"process {process.pid} was killed", from_outside)
    return GroupFailure(rank, "SystemExit", f"process {process.pid} ended with exit code {process.returncode}")


def _signal_name(number: int) -> str:
    """Return the name of a signal, or its number: most real-time signals have no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def count_oom_kills() -> int | None:
    """Return how many processes this machine has killed for want of memory since it was started; None if not known."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return None


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


def end_with_client(client_gone: threading.Event) -> None:
    """Wait, on a thread, for the client's end, then set the event and end the group.

    The client's end is that of standard input, or of the process that started this one: a process that the client has
    forked may hold the other end of standard input for longer.
    """
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


def _ignore_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _signalled(number: int, frame: FrameType | None) -> None:
    _ignore_signals()  # a second one must not interrupt the ending of the ranks
    raise Signalled(number)


def _run(folder: Path, client_gone: threading.Event) -> int:
    try:
        end_with_client(client_gone)
        return supervise(folder, msgspec.json.decode((folder / "config.json").read_bytes(), type=EngineConfig))
    except FileNotFoundError:
        if folder.exists():
            raise
        return 128 + signal.SIGTERM  # the client was ended while it started this process, and has removed the folder


def main() -> None:
    """Run the supervisor process, and exit with the group's code."""
    folder = Path(sys.argv[1])
    # A program may block signals for threads of its own; here, and in the ranks, they end a process.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, _signalled)
    signal.signal(signal.SIGTERM, _signalled)
    client_gone = threading.Event()
    try:
        code = _run(folder, client_gone)
        _ignore_signals()
    except Signalled as stopped:
        code = stopped.exit_code
    if client_gone.is_set():  # else the client removes it
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
