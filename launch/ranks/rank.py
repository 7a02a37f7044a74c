"""One rank of an engine group that serves clients over ZeroMQ.

`python -m phalanx.launch.ranks.rank RUN_DIR` is one of a client's own group, as rank_process.py starts it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from ...engine.client.group_failure import READY_FILE
from ...engine.config import EngineConfig
from ...engine.execution.heartbeat import BEATS_FILE, Heartbeat
from .failure import report_failure
from .hang_watch import STACKS_SIGNAL, stacks_file
from .process import RANK_STOP_TIMEOUT_S, Signalled, die_on_signals, end_with_parent, exit_now, stop_on_signals
from .rank_info import RankInfo, read_rank_info


def serve_rank(
    config: EngineConfig,
    rank_info: RankInfo,
    address: str,
    secret: bytes | None = None,
    kept_memory: int | None = None,
) -> int:
    """Join the group and work until a client or a signal ends it; rank 0 serves clients at `address`.

    Over tcp:// clients need the `secret` (engine/protocol/secret.py). `kept_memory` is the supervisor's, in which the
    weights outlive this process. Returns the exit code.
    """
    from ...engine.engine import Engine, run_rank
    from ...parallel.collectives.base import CollectiveError
    from .progress import loading_progress
    from .session import bind, join

    stopped_by: list[int] = []

    def on_ready(engine: Engine) -> None:
        coordinator = engine.coordinator
        if coordinator is not None:
            if rank_info.folder is not None:
                (rank_info.folder / READY_FILE).touch()

            def stop(number: int) -> None:
                stopped_by.append(number)
                coordinator.stop(hand_over=True)

            stop_on_signals(stop, RANK_STOP_TIMEOUT_S)

    heartbeat = _heartbeat(rank_info)
    if heartbeat is not None:
        heartbeat.phase("joining")
    binding = bind(config, rank_info)
    group = join(config, rank_info)
    if heartbeat is None and rank_info.launched:
        from .torchrun.peer_watch import watch_peers

        heartbeat = watch_peers(config, group, rank_info)
    try:
        progress = loading_progress(rank_info)
        run_rank(config, group, address, binding, progress, on_ready, secret, heartbeat, kept_memory)
    except CollectiveError:
        # The signal reached the other ranks too, which left at once: losing them is no failure of rank 0.
        if not stopped_by:
            raise
    else:
        group.close()
    return 128 + stopped_by[0] if stopped_by else 0


def _heartbeat(rank_info: RankInfo) -> Heartbeat | None:
    """Return what the supervisor of a group in a folder looks at, and write stacks there when it asks for them."""
    folder = rank_info.folder
    if folder is None:
        return None
    # Open for as long as the process: the handler writes to the descriptor, whatever the interpreter does meanwhile.
    stacks = os.open(stacks_file(folder, rank_info.rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
    return Heartbeat(folder / BEATS_FILE, rank_info.rank)


def run(folder: Path, parent: int | None = None, kept_memory: int | None = None) -> NoReturn:
    """Run the rank that the environment names, of the group in `folder` that own_group.py supervises, and exit.

    `parent` is the process that forked this one, if one did (fork.py). `kept_memory` is as serve_rank() has it.
    """
    rank_info = read_rank_info(folder)
    end_with_parent(parent)
    if rank_info.rank == 0:
        stop_on_signals(within_s=RANK_STOP_TIMEOUT_S)
    else:
        die_on_signals()
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=EngineConfig)
        code = serve_rank(config, rank_info, f"ipc://{folder}/engine", kept_memory=kept_memory)
    except (Exception, Signalled) as error:
        code = report_failure(error, rank_info, raised_by_client=True)
    # To tear down torch and its threads takes a second that nobody has any use for, and may hang.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as it is where the descriptor is closed
            stream.flush()
    exit_now(code)


if __name__ == "__main__":
    run(Path(sys.argv[1]), kept_memory=int(sys.argv[2]) if len(sys.argv) > 2 else None)
