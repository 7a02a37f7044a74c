"""Tells a group that hangs from one that is slow: by whether any rank gets on, not by whether processes exist.

A rank gets on when it enters another phase of a step (engine/execution/heartbeat.py), or another collective: the CPU
ranks of one host raise a flag in shared memory at each of their sums. Ranks wait for one another at every sum, so while
one gets on the group does not hang, however slow it is.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...engine.execution.heartbeat import FLAG_BYTES, FLAGS_AT, RESTING, STARTING, Beat, BeatsReader

SLACK = 10.0
"""A step may take so many times what its tokens took at the slowest rate seen."""
LOOK_S = 1.0
"""Most seconds that count between two looks: when this process itself is held up, so are the ranks."""
START_SHARE, MEETING_SHARE = 0.9, 1.5
"""Shares of timeout_s after which a group that does not get on with its start hangs: once it has met, and before."""
FORGET = 0.999
"""What is left of the slowest rate seen at each look at which the group has got on."""
PROCESSES_S = 0.5
"""Seconds between two looks at the processes' states."""
STACKS_SIGNAL = signal.SIGUSR1
"""At which a rank writes the stacks of its Python threads to its stacks_file()."""
STACKS_S = 0.5
"""Seconds that ranks have for it."""


@dataclass(frozen=True)
class Stall:
    """A group that does not get on."""

    rank: int
    """The one that the others wait for, as far as can be told."""
    why: str
    stopped: bool = False
    """Whether its process is stopped, so that somebody has stopped it."""


@dataclass(frozen=True)
class Sight:
    """One look at the ranks."""

    beats: Sequence[Beat]
    flags: Sequence[int]
    """Counts of each rank's collectives, modulo 2**32; none if they cannot be seen."""
    stopped: Sequence[int]
    """Ranks whose processes are stopped, as by SIGSTOP."""
    starved_s: Sequence[float]
    """Seconds since its start for which each rank's main thread was ready to run and had no core."""


class HangWatch:
    """Judges one look after the other."""

    def __init__(self, step_timeout_s: float, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """A group hangs after `step_timeout_s` without getting on, or longer where it was seen to take longer.

        No more than `timeout_s`, within which ranks give up waiting for one another, and which they have for each phase
        of their start. Where collectives cannot be seen a step is one piece: one of more tokens than any before has as
        long.
        """
        self._step_timeout_s = step_timeout_s
        self._timeout_s = max(step_timeout_s, timeout_s)
        self._clock = clock
        self._looked_at = clock()
        self._last: Sight | None = None
        self._still_s = 0.0  # seconds without getting on, those in which this process was held up left out
        self._stopped_s = 0.0
        self._starved_s: Sequence[float] = ()  # as of when it last got on
        self._slowest = 0.0  # most seconds without getting on, for each token of the step; forgotten slowly
        self._most_tokens = 0  # of a step that has ended

    def look(self, sight: Sight) -> Stall | None:
        """Take in how the ranks are. Returns whom to blame once they do not get on any more."""
        now = self._clock()
        passed = min(LOOK_S, now - self._looked_at)
        self._looked_at = now
        self._stopped_s = self._stopped_s + passed if sight.stopped else 0.0

        last = self._last
        resting = all(beat.phase in RESTING for beat in sight.beats)
        if last is None or resting or (sight.beats, sight.flags) != (last.beats, last.flags):
            self._got_on(last, sight)
        else:
            self._still_s += passed

        starved_s = max(now - before for now, before in zip(sight.starved_s, self._starved_s, strict=True))
        waited_s = self._still_s - max(0.0, starved_s)
        if self._stopped_s > self._step_timeout_s or waited_s > self._allowed_s(sight):
            return _blame(sight, max(self._still_s, self._stopped_s))
        return None

    def _got_on(self, last: Sight | None, sight: Sight) -> None:
        # How long a start takes says nothing of steps.
        if last is not None and not _starts(last):
            tokens = _tokens(last)
            self._slowest = max(FORGET * self._slowest, self._still_s / max(1, tokens))
            if max(beat.step for beat in sight.beats) > max(beat.step for beat in last.beats):
                self._most_tokens = max(self._most_tokens, tokens)
        self._last = sight
        self._still_s = 0.0
        self._starved_s = sight.starved_s

    def _allowed_s(self, sight: Sight) -> float:
        tokens = _tokens(sight)
        if _starts(sight):
            # Those that have met tell by their sums who is behind: a little before the others give up waiting. Until
            # then whoever waits knows best for whom.
            return (START_SHARE if sight.flags else MEETING_SHARE) * self._timeout_s
        if not sight.flags and tokens > self._most_tokens:
            return self._timeout_s
        return min(self._timeout_s, max(self._step_timeout_s, SLACK * self._slowest * tokens))


def _starts(sight: Sight) -> bool:
    return any(beat.phase in STARTING for beat in sight.beats)


def _tokens(sight: Sight) -> int:
    return max(beat.tokens for beat in sight.beats)


def _blame(sight: Sight, seconds: float) -> Stall:
    """Name the rank that is furthest behind: one that is stopped, or else in an earlier step, or before more sums."""
    beats = sight.beats
    ranks = list(range(len(beats)))
    if sight.stopped:
        ranks = list(sight.stopped)
    starting = [rank for rank in ranks if beats[rank].phase in STARTING]
    if starting:
        # The others wait for the one that has come least far.
        first = min(STARTING.index(beats[rank].phase) for rank in starting)
        ranks = [rank for rank in starting if STARTING.index(beats[rank].phase) == first]
    least = min(beats[rank].step for rank in ranks)
    ranks = [rank for rank in ranks if beats[rank].step == least]
    if sight.flags:
        first = sight.flags[ranks[0]]
        # Flags count on beyond 32 bits: only their differences tell who is behind.
        behind = {rank: (sight.flags[rank] - first + 2**31) % 2**32 for rank in ranks}
        ranks = [rank for rank in ranks if behind[rank] == min(behind.values())]
    # A rank that waits for the next step is not what a step waits for, unless it has not heard of it.
    rank = next((rank for rank in ranks if beats[rank].phase not in RESTING), ranks[0])

    what = "is stopped" if rank in sight.stopped else "does not get on"
    each = "; ".join(f"rank {number}: {_words(number, sight)}" for number in range(len(beats)))
    return Stall(rank, f"rank {rank} {what}: nothing has moved for {seconds:.1f} s ({each})", rank in sight.stopped)


def _words(rank: int, sight: Sight) -> str:
    beat = sight.beats[rank]
    words = f"{beat.phase!r} of step {beat.step} ({beat.tokens} tokens)" if beat.step else repr(beat.phase)
    if sight.flags:
        words += f", after {sight.flags[rank]} sums"
    return words + (", stopped" if rank in sight.stopped else "")


class RankSights:
    """Looks at the ranks of a group: their heartbeats, their collectives and their processes."""

    def __init__(self, beats: Path, pids: Sequence[int | None], rank: int | None = None) -> None:
        """`beats` is the file of their heartbeats, `pids` their processes; None of one that is on another host.

        `rank` is the one whose process this is, if it is a rank's.
        """
        self._pids = pids
        self._rank = rank
        self._beats = BeatsReader(beats, len(pids))
        self._segment: mmap.mmap | None = None
        self._processes_at = 0.0
        self._stopped: list[int] = []

    def look(self) -> Sight:
        """Return how the ranks are now."""
        beats = self._beats.read()
        first = self._pids[0]
        if self._segment is None and self._rank is not None and beats[self._rank].segment >= 0:
            self._segment = _map_flags(beats[self._rank].segment, len(self._pids))
        elif self._segment is None and self._rank is None and first is not None and beats[0].segment >= 0:
            self._segment = _open_segment(first, beats[0].segment, len(self._pids))

        now = time.monotonic()
        if now - self._processes_at > PROCESSES_S:
            self._processes_at = now
            self._stopped = [rank for rank, pid in enumerate(self._pids) if pid is not None and _is_stopped(pid)]
        return Sight(
            beats, self._flags(), self._stopped, [0.0 if pid is None else _starved_s(pid) for pid in self._pids]
        )

    def _flags(self) -> list[int]:
        segment = self._segment
        if segment is None:
            return []
        starts = range(FLAGS_AT, FLAGS_AT + FLAG_BYTES * len(self._pids), FLAG_BYTES)
        return [int.from_bytes(segment[start : start + 4], sys.byteorder) for start in starts]

    def close(self) -> None:
        """Give up what it has open of the ranks. A rank itself keeps it for as long as its group lasts (_map_flags)."""
        self._beats.close()
        if self._segment is not None:
            self._segment.close()


def _open_segment(pid: int, number: int, ranks: int) -> mmap.mmap | None:
    """Map the flags that a rank's collectives share, in a process that is no rank; None where it may not have them."""
    try:
        with open(f"/proc/{pid}/fd/{number}", "rb") as file:
            return _map_flags(file.fileno(), ranks)
    except OSError:
        return None


def _map_flags(number: int, ranks: int) -> mmap.mmap | None:
    """Map the flags of an open segment; None if it is none any more.

    A rank gives its own descriptor, and never closes the map. It is by a POSIX lock on the segment that the others see
    that it lives, and a process loses its locks on a file when it closes any descriptor of it.
    """
    try:
        return mmap.mmap(number, FLAGS_AT + FLAG_BYTES * ranks, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        # The name before the state may hold anything, a parenthesis too.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _starved_s(pid: int) -> float:
    """Seconds for which the thread that runs the rank's steps was ready to run and had no core."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def stacks_file(folder: Path, rank: int) -> Path:
    """Return where a rank of the group in `folder` writes its stacks."""
    return folder / f"stacks-{rank}.txt"


def collect_stacks(folder: Path, pids: Sequence[int]) -> str:
    """Return the Python stacks of all ranks; of one that does not answer, as one that is stopped, that it does not."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, STACKS_SIGNAL)
    time.sleep(STACKS_S)
    texts = []
    for rank in range(len(pids)):
        text = ""
        with contextlib.suppress(OSError):
            text = stacks_file(folder, rank).read_text(errors="replace")
        texts.append(f"rank {rank}:\n{text or 'no answer: its process is stopped, or held up by the system'}")
    return "\n".join(texts)
