"""What must hold at any moment between the scheduler's lists, its requests and their sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Ordered

from .block_pool import IntegrityError
from .request import Request, Sequence, SequenceStatus


def check_scheduler(
    requests: Mapping[str, Request],
    queued: Collection[str],
    waiting: Ordered[Sequence],
    running: Ordered[Sequence],
    computing: Mapping[bytes, Sequence],
    block_size: int,
    *,
    steps: int,
) -> None:
    """Raise IntegrityError where requests and sequences contradict each other, with `steps` steps in flight."""
    for sequence in running:
        name = sequence.name
        known = len(sequence.tokens)
        pending = sequence.num_pending_tokens
        scheduled = sequence.num_scheduled_tokens
        if sequence.status is not SequenceStatus.RUNNING or not sequence.num_computed_tokens < known:
            raise IntegrityError(f"{name} is {sequence.status.value} in the running list")
        if not 0 <= pending <= steps or (not steps and scheduled != sequence.num_computed_tokens):
            raise IntegrityError(f"{name} has {pending} pending tokens in {steps} steps in flight")
        if len(sequence.blocks) * block_size != sequence.capacity:
            raise IntegrityError(f"{name} has {len(sequence.blocks)} blocks for {sequence.capacity} tokens")

    for sequence in waiting:
        if sequence.status is not SequenceStatus.WAITING or sequence.blocks or sequence.slot != -1:
            raise IntegrityError(f"{sequence.name} is {sequence.status.value} in the waiting list")

    for sequences in (running, waiting):
        if sorted(sequences, key=lambda sequence: sequence.order) != list(sequences):
            raise IntegrityError("sequences are out of order")

    unfinished = sum(request.unfinished for request in requests.values())
    if unfinished != len(running) + len(waiting) or not set(queued) <= requests.keys():
        raise IntegrityError(f"{unfinished} sequences are unfinished, {len(running)} run and {len(waiting)} wait")
    if any(sequence.status is not SequenceStatus.RUNNING for sequence in computing.values()):
        raise IntegrityError("a block is promised by a sequence that does not run")


def check_slots(free: Collection[int], running: Ordered[Sequence], max_num_seqs: int) -> None:
    """Raise IntegrityError unless each slot is either free or some running sequence's."""
    slots = sorted([*free, *(sequence.slot for sequence in running)])
    if slots != list(range(max_num_seqs)):
        raise IntegrityError(f"free slots {free} and those in use do not add up to {max_num_seqs}")
