"""How far a request got: its events, noted once a second, and the request that goes on from there.

Only what a second and more takes is noted; a shorter one is computed again from its beginning, with the same seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from ...engine.client.resume.delivered import Delivered
from ...engine.protocol.messages import Accepted, Delta, Event, Finished, Submit
from .entries import digest_of
from .journal import Journal

PROGRESS_S = 1.0
"""Least time between two notes of one request."""


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """What came since the note before."""

    digest: bytes
    """A digest of what was asked of which model: tokens of another question are no beginning of an answer."""
    accepted: Accepted | None
    deltas: list[Delta]
    """At most one for each completion."""


class Resumed(msgspec.Struct, frozen=True):
    """A request that goes on."""

    submit: Submit
    events: list[Event]
    """What was computed before: Accepted, and a Delta for each completion that has begun."""


def digest_of_submit(submit: Submit, model: str) -> bytes:
    """What two submits have in common whose answers are the same; `model` tells what computes them."""
    return digest_of(model.encode(), msgspec.msgpack.encode(msgspec.structs.replace(submit, id="", resume=None)))


class ProgressNotes:
    """Takes the events of one submit, and has the journal note them. Used by one thread at a time; it never waits."""

    def __init__(
        self,
        journal: Journal,
        number: Callable[[], int],
        place: int,
        digest: bytes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`number` returns the request's number in the journal; it is called with the first note."""
        self._journal, self._number, self._place, self._digest, self._clock = journal, number, place, digest, clock
        self._accepted: Accepted | None = None
        self._deltas: dict[int, list[Delta]] = {}
        self._noted_at = clock()

    def add(self, event: Event) -> None:
        """Take an event in. One that was replayed from the journal is not given here."""
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, Delta):
            self._deltas.setdefault(event.index, []).append(event)
            if self._clock() - self._noted_at >= PROGRESS_S and self._journal.takes_progress:
                self._note()
        elif isinstance(event, Finished):
            self._deltas.clear()

    def _note(self) -> None:
        progress = Progress(self._digest, self._accepted, [_joined(deltas) for deltas in self._deltas.values()])
        self._noted_at = self._clock()
        self._accepted = None
        self._deltas.clear()
        self._journal.progress(self._number(), self._place, msgspec.msgpack.encode(progress))


def resume(submit: Submit, pieces: list[bytes], digest: bytes) -> Resumed | None:
    """Return how the request goes on after what was noted of it; None if nothing was, or of another question."""
    accepted: Accepted | None = None
    deltas: dict[int, list[Delta]] = {}
    for piece in pieces:
        try:
            progress = msgspec.msgpack.decode(piece, type=Progress)
        except msgspec.DecodeError:
            return None
        if progress.digest != digest:
            return None
        accepted = accepted or progress.accepted
        for delta in progress.deltas:
            deltas.setdefault(delta.index, []).append(delta)
    if accepted is None or any(not _whole(index, each, submit) for index, each in deltas.items()):
        return None

    delivered = Delivered(submit)
    events: list[Event] = [accepted, *(_joined(each) for each in deltas.values())]
    events = [msgspec.structs.replace(event, id=submit.id) for event in events]
    for event in events:
        delivered.add(event)
    return Resumed(delivered.resubmit(submit.id), events)


def _whole(index: int, deltas: list[Delta], submit: Submit) -> bool:
    """Whether the deltas are those of a completion of the request, from its beginning and without a gap."""
    position = 0
    for delta in deltas:
        if delta.position != position:
            return False
        position += len(delta.token_ids)
    return 0 <= index < submit.sampling.n


def _joined(deltas: list[Delta]) -> Delta:
    first = deltas[0]
    logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
    return Delta(
        first.id,
        first.index,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        None if all(delta.logprobs is None for delta in deltas) else logprobs,
        first.position,
        "".join(delta.reasoning for delta in deltas),
    )
