"""The scheduler's books compared with each other: what must hold at any moment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Ordered

from .block_pool import IntegrityError
from .request import Request, Sequence, SequenceStatus


def check_books(
    requests: Mapping[str, Request],
    queued: Collection[str],
    waiting: Ordered[Sequence],
    running: Ordered[Sequence],
    computing: Mapping[bytes, Sequence],
    block_size: int,
    *,
    steps: int,
) -> None:
    """Raises IntegrityError where requests and sequences contradict each other, with `steps` steps in flight."""
    for sequence in running:
        if sequence.status is not SequenceStatus.RUNNING or not sequence.computed < len(sequence.tokens):
            raise IntegrityError(f"{sequence.name} is {sequence.status.value} in the running list")
        if not 0 <= sequence.expected <= steps or (not steps and sequence.planned != sequence.computed):
            raise IntegrityError(f"{sequence.name} expects {sequence.expected} tokens of {steps} steps in flight")
        if len(sequence.blocks) * block_size != sequence.capacity:
            raise IntegrityError(f"{sequence.name} has {len(sequence.blocks)} blocks for {sequence.capacity} tokens")
    for sequence in waiting:
        if sequence.status is not SequenceStatus.WAITING or sequence.blocks or sequence.slot != -1:
            raise IntegrityError(f"{sequence.name} is {sequence.status.value} in the waiting list")
    for sequences in (running, waiting):
        if sorted(sequences, key=lambda sequence: sequence.order) != list(sequences):
            raise IntegrityError("sequences are out of rank order")
    unfinished = sum(request.unfinished for request in requests.values())
    if unfinished != len(running) + len(waiting) or not set(queued) <= requests.keys():
        raise IntegrityError(f"{unfinished} sequences are unfinished, {len(running)} run and {len(waiting)} wait")
    if any(sequence.status is not SequenceStatus.RUNNING for sequence in computing.values()):
        raise IntegrityError("a block is promised by a sequence that does not run")
