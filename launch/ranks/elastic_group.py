"""Supervises a client's own group: `python -m ...launch.group RUN_DIR` runs torch's elastic launcher over launch.rank.

The client holds the other end of standard input: when it closes, the group ends. See engine/client/group_process.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ...engine.client.group_process import GroupFailure
from ...engine.config import EngineConfig
from .process import RANK_STOP_TIMEOUT_S, exit_within

GRACE_S = 1.0  # beyond RANK_STOP_TIMEOUT_S, after which this process leaves and the ranks notice that it has


def supervise(folder: Path, config: EngineConfig) -> int:
    """Run the group until it ends. Returns 0, 1 if a rank failed (and failure.json says which), or 128 + signal."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.ranks,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **_stop_timeout(),
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    try:
        elastic_launch(launch, sys.executable)("-m", f"{__package__}.rank", str(folder))
    except ChildFailedError as error:
        (folder / "failure.json").write_bytes(msgspec.json.encode(first_failure(error)))
        return 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _stop_timeout() -> dict[str, Any]:
    """Seconds that the launcher gives ranks to stop. Not every torch takes it (2.11 does not, and gives them 30)."""
    known = "shutdown_timeout" in {field.name for field in fields(LaunchConfig)}
    return {"shutdown_timeout": int(RANK_STOP_TIMEOUT_S)} if known else {}


def first_failure(error: ChildFailedError) -> GroupFailure:
    """Which rank failed first, and how: its exception's type and message, or the signal that killed it."""
    rank, failure = error.get_first_failure()
    if isinstance(failure.message, dict):
        name, _, message = failure.message["message"].partition(": ")
        return GroupFailure(rank, name, message)
    if failure.exitcode < 0:
        return GroupFailure(rank, failure.signal_name(), f"process {failure.pid} was killed")
    return GroupFailure(rank, "SystemExit", f"process {failure.pid} ended with exit code {failure.exitcode}")


def end_with_client() -> threading.Event:
    """Wait, on a thread, for the end of standard input, then end the group. The event is set once that has happened."""
    client_gone = threading.Event()

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        client_gone.set()
        os.kill(os.getpid(), signal.SIGTERM)
        exit_within(RANK_STOP_TIMEOUT_S + GRACE_S, 128 + signal.SIGTERM)

    threading.Thread(target=watch, name="phalanx-client-watch", daemon=True).start()
    return client_gone


def _stop(number: int, frame: FrameType | None) -> None:
    raise SignalException("stopped before the ranks were started", signal.Signals(number))


def main() -> None:
    """The supervisor process."""
    folder = Path(sys.argv[1])
    # The ranks say what is wrong with them; the launcher's own warnings about ending them would only come on top.
    logging.disable(logging.CRITICAL)
    # Until the launcher puts its own handlers in place.
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=EngineConfig)
    client_gone = end_with_client()
    code = supervise(folder, config)
    if client_gone.is_set():  # and cannot do it
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
