"""Ranks that torchrun started watch one another: torchrun sees when a process ends, but not when one hangs.

Each looks at the heartbeats of all, and when the group does not get on each says who is to blame, writes its own stacks
and ends, so that torchrun starts the ranks again. Ranks of one host share the memory of their heartbeats; of several
hosts, each sends its own to the store by which they met, and fetches the others'.
"""

from __future__ import annotations

import datetime
import faulthandler
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ....engine.config import EngineConfig
from ....engine.errors import EngineStopped
from ....engine.execution.heartbeat import BEAT_BYTES, Heartbeat
from ....parallel.collectives.rendezvous import all_gather_ints, boot
from ....parallel.collectives.shared_memory import SharedMemoryUnavailable, open_segment
from ....parallel.group import Group
from ..failure import record_failure
from ..hang_watch import STACKS_S, HangWatch, RankSights, Stall
from ..process import exit_now
from ..rank_info import RankInfo

_log = logging.getLogger("phalanx")
TICK_S = 0.2
"""Seconds between two looks."""
FETCH_S = 0.5
"""Seconds between two exchanges of heartbeats between hosts."""
STORE_TIMEOUT_S = 10.0


def watch_peers(config: EngineConfig, group: Group, rank_info: RankInfo) -> Heartbeat | None:
    """Begin to watch the group's ranks, on a thread. All call it once they have joined. Returns this rank's heartbeat.

    None, with a warning, where heartbeats cannot be exchanged.
    """
    rows = all_gather_ints(group.host, [boot(), _process_space(), os.getpid(), secrets.randbits(60)])
    mine = rows[group.rank]
    pids = [row[2] if row[:2] == mine[:2] else None for row in rows]
    nbytes = BEAT_BYTES * group.size
    try:
        if group.size == group.local_size > 1:
            memory = open_segment(group.host, nbytes)
            os.pwrite(memory, bytes(BEAT_BYTES), group.rank * BEAT_BYTES)
            group.host.barrier()
        else:
            memory = os.memfd_create("phalanx-beats")
            os.ftruncate(memory, nbytes)
        beats = Path(f"/proc/self/fd/{memory}")
        heartbeat = Heartbeat(beats, group.rank)
        if group.size > group.local_size:
            _Exchange(memory, group, f"phalanx/beats/{rows[0][3]}").start()
        _Watch(config, RankSights(beats, pids, group.rank), pids, rank_info).start()
    except (SharedMemoryUnavailable, AttributeError, OSError, RuntimeError) as error:
        _log.warning("ranks that hang are not noticed before timeout_s=%g: %s", config.timeout_s, error)
        return None
    return heartbeat


def _process_space() -> int:
    """What tells process ids of one container from those of another."""
    return os.stat("/proc/self/ns/pid").st_ino


class _Watch(threading.Thread):
    """Ends this process when the group does not get on."""

    def __init__(
        self, config: EngineConfig, sights: RankSights, pids: Sequence[int | None], rank_info: RankInfo
    ) -> None:
        super().__init__(name="phalanx-peer-watch", daemon=True)
        self._hangs = HangWatch(config.step_timeout_s, config.timeout_s)
        self._sights = sights
        self._pids = pids
        self._rank_info = rank_info

    def run(self) -> None:
        while True:
            time.sleep(TICK_S)
            sight = self._sights.look()
            stall = self._hangs.look(sight)
            if stall is not None:
                self._end(stall, sight.stopped)

    def _end(self, stall: Stall, stopped: Sequence[int]) -> None:
        name = f"rank {self._rank_info.rank} of {self._rank_info.size}"
        print(f"{name}: {stall.why}; the stacks of {name}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        record_failure(EngineStopped(stall.why), self._rank_info)
        time.sleep(STACKS_S)  # in which the others write theirs: torchrun ends them once this one has ended
        # A stopped process takes no notice of torchrun's SIGTERM, and torchrun would wait for it.
        for rank in stopped:
            pid = self._pids[rank]
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        exit_now(1)


class _Exchange(threading.Thread):
    """Sends this rank's heartbeat to the ranks' store, and writes the others' to this process's memory."""

    def __init__(self, memory: int, group: Group, prefix: str) -> None:
        """Raises RuntimeError if the store cannot be reached."""
        super().__init__(name="phalanx-beats", daemon=True)
        self._memory = memory
        self._group = group
        from torch._C import _distributed_c10d

        # A connection of its own: another's may be waiting in it for a rank that does not come.
        store = _distributed_c10d.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=STORE_TIMEOUT_S),
            wait_for_workers=False,
        )
        self._store: Any = _distributed_c10d.PrefixStore(prefix, store)

    def run(self) -> None:
        try:
            while True:
                self._exchange()
                time.sleep(FETCH_S)
        except RuntimeError as error:
            # The store has gone, or the way to it: what the others do is not seen any more, and counts as no progress.
            _log.warning("heartbeats of other hosts are not heard any more: %s", error)

    def _exchange(self) -> None:
        for rank in range(self._group.size):
            at = rank * BEAT_BYTES
            if rank == self._group.rank:
                self._store.set(str(rank), os.pread(self._memory, BEAT_BYTES, at))
            elif self._store.check([str(rank)]):
                record = self._store.get(str(rank))
                if len(record) == BEAT_BYTES:
                    os.pwrite(self._memory, record, at)
