"""What a rank reports when an error ends it: the rank that failed prints first, ranks that only lost a peer wait."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path

from ...engine.client.group_failure import GroupFailure, write_whole
from ...engine.errors import CheckpointError, ConfigError, InvalidRequest, PhalanxError
from .process import OutputLost, Signalled, die_on_signals, drop_output
from .rank_info import RankInfo

OTHERS_DELAY_S = 1.0
"""Every rank meets the same wrong setting: the others give rank 0 this long to report it, and are ended meanwhile."""
BYSTANDER_DELAY_S = 2.0
"""A rank whose peer has gone gives the launcher this long to end it, so that the peer's own error comes first."""


def report_failure(error: BaseException, rank_info: RankInfo, *, raised_by_client: bool = False) -> int:
    """Print what ended this rank, record it for the launcher's summary, and return the exit code.

    The code is 2 for what a user can put right (configuration, checkpoint, request), 128 + signal, else 1. With
    `raised_by_client` an error of ours is recorded only: the client that started the group raises it.
    """
    if isinstance(error, Signalled):
        return error.exit_code
    if isinstance(error, OutputLost):
        drop_output()
        if not error.unread:
            _print(f"error: {error}")
        return error.exit_code
    die_on_signals()

    if _saw_a_peer_go(error):
        time.sleep(BYSTANDER_DELAY_S)
        record_failure(error, rank_info)
        _print(f"{_name(rank_info)}: {error}")
        return 1

    if not isinstance(error, PhalanxError):
        _print(f"{_name(rank_info)} failed:\n{''.join(traceback.format_exception(error)).rstrip()}")
        record_failure(error, rank_info)
        return 1

    if rank_info.rank != 0:
        time.sleep(OTHERS_DELAY_S)
    # The message says it all: the launcher's summary needs no traceback of it.
    record_failure(error.with_traceback(None), rank_info)
    if not raised_by_client:
        _print(f"{_name(rank_info)}: {error}" if rank_info.rank else f"error: {error}")
    return 2 if isinstance(error, ConfigError | CheckpointError | InvalidRequest) else 1


def _saw_a_peer_go(error: BaseException) -> bool:
    # Without the collectives' module loaded there is no such error, and no reason to load torch.
    module = sys.modules.get(f"{__package__.split('.', maxsplit=1)[0]}.parallel.collectives.base")
    return module is not None and isinstance(error, module.CollectiveError)


def failure_file(folder: Path, rank: int) -> Path:
    """Return where a rank of a client's own group records its failure, in the group's folder."""
    return folder / f"failure-{rank}.json"


def record_failure(error: BaseException, rank_info: RankInfo) -> None:
    """Leave what ended this rank to whoever started it: the supervisor's file, or torchrun's."""
    if not rank_info.launched:
        return
    if rank_info.folder is not None:
        # A message may quote text that is no valid Unicode, which JSON cannot carry.
        message = str(error).encode(errors="backslashreplace").decode()
        failure = GroupFailure(rank_info.rank, type(error).__name__, message)
        # Whole or not at all: the supervisor reads it once this process has ended, however it does.
        write_whole(failure_file(rank_info.folder, rank_info.rank), failure)
        return

    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # The handler records the traceback of the exception that is being handled.
    try:
        raise error
    except BaseException as raised:
        get_error_handler().record_exception(raised)


def _name(rank_info: RankInfo) -> str:
    return f"rank {rank_info.rank} of {rank_info.size}"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
