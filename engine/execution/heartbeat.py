"""What each rank is doing, in a file that a supervisor reads without waiting for any of them. Imports no torch.

A record has one writer. A reader that meets it half written reads it again.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

BEATS_FILE = "beats"
STARTING = ("starting", "joining", "reading", "loading", "preparing")
"""What a rank does before it can compute, in this order: it meets the others, reads what describes the model, loads the
weights, and tunes, measures and captures."""
PHASES = (*STARTING, "waiting", "schedule", "launch", "wait", "commit", "compute")
"""What a rank may be doing: rank 0 what Progress tells of the step loop, the others "waiting" or "compute"."""
RESTING = ("starting", "waiting")
"""Phases in which nothing is due: no hang is told from them."""
FLAGS_AT, FLAG_BYTES = 4096, 128
"""Where the ranks' flags are in the shared segment of their collectives (collectives/native/member.h)."""

_RECORD = struct.Struct("<QQQdqQ")
BEAT_BYTES = 64
"""Bytes of a rank's record in the file."""
_READS = 10


@dataclass(frozen=True)
class Beat:
    """One rank's record."""

    step: int
    """The step it is in, or was in last."""
    phase: str
    tokens: int
    """Tokens of that step."""
    since: float
    """When the phase began, in seconds of the monotonic clock, which all processes of a host share."""
    segment: int
    """The rank's file descriptor of the segment that its collectives share; -1 if there is none."""


class Heartbeat:
    """A rank's pen. One thread at a time uses it; without a file it writes nothing."""

    def __init__(self, path: Path | None = None, rank: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """`path` is of a file that make_beats_file() made; None for a rank that nobody supervises."""
        self._clock = clock
        self._at = rank * BEAT_BYTES
        self._step = self._tokens = 0
        self._segment = -1
        self._phase = PHASES[0]
        self._memory: mmap.mmap | None = None
        if path is not None and path.exists():
            with path.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
            self.phase("starting")

    def shares(self, segment: int | None) -> None:
        """Tell the file descriptor of the segment in which the ranks raise flags at each of their collectives."""
        self._segment = -1 if segment is None else segment
        self.phase(self._phase)

    def step(self, number: int, tokens: int) -> None:
        """Note the step whose phases come next."""
        self._step = number
        self._tokens = tokens

    def phase(self, name: str) -> None:
        """Note what the rank does from now on."""
        self._phase = name
        if self._memory is not None:
            _RECORD.pack_into(
                self._memory,
                self._at,
                self._step,
                PHASES.index(name),
                self._tokens,
                self._clock(),
                self._segment,
                0,
            )


def make_beats_file(path: Path, ranks: int) -> None:
    """Make the file for a group that is about to start: every rank is "starting"."""
    path.write_bytes(bytes(BEAT_BYTES * ranks))


class BeatsReader:
    """Reads the records of a group's ranks."""

    def __init__(self, path: Path, ranks: int) -> None:
        self._ranks = ranks
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self) -> list[Beat]:
        """Return what each rank is doing now."""
        return [self._read(rank * BEAT_BYTES) for rank in range(self._ranks)]

    def _read(self, at: int) -> Beat:
        before = self._memory[at : at + _RECORD.size]
        for _ in range(_READS):
            again = self._memory[at : at + _RECORD.size]
            if again == before:
                break
            before = again
        step, phase, tokens, since, segment, _ = _RECORD.unpack(before)
        return Beat(step, PHASES[phase] if phase < len(PHASES) else PHASES[0], tokens, since, segment)

    def close(self) -> None:
        """Give the file up."""
        self._memory.close()
