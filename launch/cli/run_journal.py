"""How far a batch has got, kept on disk, so that a run that was broken off goes on from its last tokens."""

from __future__ import annotations

import functools
from collections.abc import Collection
from concurrent.futures import Future

from ...engine.protocol.messages import Event, Submit
from ...serving.journal.entries import Request
from ...serving.journal.journal import Journal, KeyInUse
from ...serving.journal.progress import ProgressNotes, digest_of_submit, resume
from ...serving.journal.writer import JournalError, JournalFull
from .jsonl import LineRequest

JOURNAL_BYTES = 2**30
"""Most bytes of the journal; what does not fit is computed again by the next run."""
_KEEP_S = 0.0  # answers are in the output file: the journal has none
_KIND = "generate"


class RunJournal:
    """A run's requests that have not ended, by id. Used by one thread.

    A run outlives its journal: what that cannot take in, on a full disk, is computed again by the next run.
    """

    def __init__(self, path: str, model: str) -> None:
        """`model` tells what computes the answers. Raises ConfigError for a file that cannot be used."""
        self._model = model
        self._journal = Journal(path, _KIND, max_bytes=JOURNAL_BYTES, keep_s=_KEEP_S, setting="generate's journal")
        self._notes: dict[str, ProgressNotes] = {}
        self._accepted: dict[str, Future[list[int]]] = {}
        self._known: dict[str, tuple[int, bytes]] = {}

    def read(self, done: Collection[str]) -> None:
        """Take in what an earlier run has left; the requests that are `done` have their records in the output."""
        after = 0
        while entries := self._journal.unfinished(after, 1024).result():
            after = entries[-1].number
            for entry in entries:
                if entry.request.id in done:
                    # The earlier run was broken off between writing the answer and saying so here.
                    self._journal.withdraw(entry.number)
                else:
                    self._known[entry.request.id] = (entry.number, entry.request.digest)

    def begin(self, item: LineRequest) -> tuple[Submit, list[Event]]:
        """Return the line's request as it is to be sent, and the events that an earlier run had of it."""
        submit = item.submit
        digest = digest_of_submit(submit, self._model)
        number, known = self._known.pop(submit.id, (-1, b""))
        if known == digest:
            accepted: Future[list[int]] = Future()
            accepted.set_result([number])
            before = resume(submit, self._noted(number), digest)
        else:
            self._journal.withdraw(number)  # the line, or the model, is another one now
            accepted = self._journal.accept([Request(submit.id, _KIND, digest=digest)])
            before = None
        self._accepted[submit.id] = accepted
        self._notes[submit.id] = ProgressNotes(self._journal, functools.partial(_number, accepted), 0, digest)
        return (submit, []) if before is None else (before.submit, before.events)

    def add(self, event: Event, request_id: str) -> None:
        """Take in what a request got."""
        self._notes[request_id].add(event)

    def end(self, request_id: str) -> None:
        """Forget a request, whose record is in the output."""
        del self._notes[request_id]
        self._journal.withdraw(_number(self._accepted.pop(request_id)))

    def _noted(self, number: int) -> list[bytes]:
        """What was noted of a request; nothing where the journal cannot be read, as its log says."""
        try:
            return self._journal.progress_of(number).result().get(0, [])
        except JournalError:
            return []

    def close(self) -> None:
        """Write what is left to be written."""
        self._journal.close()


def _number(accepted: Future[list[int]]) -> int:
    """The request's number; -1, of which nothing is noted, where it could not be taken in."""
    try:
        return accepted.result()[0]
    except (JournalFull, JournalError, KeyInUse):
        return -1
