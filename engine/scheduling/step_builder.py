"""A step while the scheduler puts it together: who gets how many tokens, and how a StepPlan is built from that."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Sequence
from .step_plan import SlotStart, StepPlan


@dataclass(eq=False, slots=True)
class StepInFlight:
    """A step that is not committed yet."""

    step: int
    sequences: list[Sequence]
    """By row."""
    epochs: list[int]
    """Each sequence's epoch when the step was planned: the row of an earlier one is dropped."""
    postponed: set[int] = field(default_factory=set)
    """Rows whose last token is computed once more in a later step, which samples what this one did not."""

    def sequence(self, row: int) -> Sequence | None:
        """The sequence of a row; None if it has given its slot up since."""
        sequence = self.sequences[row]
        return sequence if sequence.epoch == self.epochs[row] else None

    def sampled(self, row: int) -> Sequence | None:
        """The sequence that gets the token of a row; None if none does."""
        return None if row in self.postponed else self.sequence(row)

    def postpone(self, row: int) -> None:
        """Take back that a row's last token is scheduled, and that the next one is pending."""
        sequence = self.sequence(row)
        if sequence is not None:
            sequence.num_scheduled_tokens -= 1
            sequence.num_pending_tokens -= 1
            self.postponed.add(row)


class StepBuilder:
    """The rows of one step, what changed for the ranks, and the budget of tokens that is left."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.starts: list[SlotStart] = []
        self.token_slots: list[int] = []
        self.token_ids: list[int] = []
        self.block_slots: list[int] = []
        self.block_indices: list[int] = []
        self.block_ids: list[int] = []
        self.decodes: list[Sequence] = []
        self.chunks: list[Sequence] = []
        self.chunk_counts: list[int] = []

    def send_blocks(self, sequence: Sequence, first: int) -> None:
        """Send the ranks the entries of a block table from index `first`."""
        new = sequence.blocks[first:]
        self.block_slots += [sequence.slot] * len(new)
        self.block_indices += range(first, first + len(new))
        self.block_ids += new

    def send_new_tokens(self, sequence: Sequence) -> None:
        """Send the ranks the tokens sampled since they were last sent some."""
        for token in sequence.tokens[sequence.num_sent_tokens :]:
            self.token_slots.append(sequence.slot)
            self.token_ids.append(token)
        sequence.num_sent_tokens = len(sequence.tokens)

    def schedule_tokens(self, sequence: Sequence) -> None:
        """Schedule all its uncomputed tokens, but at most half of the remaining budget.

        So no short prompt waits for a long one.
        """
        wanted = sequence.num_uncomputed_tokens
        count = min(wanted, (self.budget + 1) // 2)
        if count:
            self.budget -= count
            if wanted == 1:
                self.decodes.append(sequence)
            else:
                self.chunks.append(sequence)
                self.chunk_counts.append(count)

    def spend_leftover_budget(self) -> None:
        """Give the rest of the budget to the first chunks that can use it."""
        for i, sequence in enumerate(self.chunks):
            more = min(self.budget, sequence.num_uncomputed_tokens - self.chunk_counts[i])
            self.chunk_counts[i] += more
            self.budget -= more

    def build(self, step: int) -> StepPlan:
        """Return the finished plan: decodes first, then chunks."""
        rows = self.decodes + self.chunks
        num_decodes = len(self.decodes)

        # A chunk samples only if it reaches the end of its sequence.
        sample_rows = list(range(num_decodes))
        for row, (sequence, count) in enumerate(zip(self.chunks, self.chunk_counts, strict=True), num_decodes):
            if count == sequence.num_uncomputed_tokens:
                sample_rows.append(row)

        # While a token is pending, whether a grammar limits the one after it is not known yet.
        sampled = [rows[row] for row in sample_rows]
        masked = [
            i
            for i, sequence in enumerate(sampled)
            if sequence.constraint is not None and (sequence.constraint.active or sequence.num_pending_tokens)
        ]

        return StepPlan(
            step=step,
            starts=self.starts,
            token_slots=self.token_slots,
            token_ids=self.token_ids,
            block_slots=self.block_slots,
            block_indices=self.block_indices,
            block_ids=self.block_ids,
            slots=[sequence.slot for sequence in rows],
            positions=[sequence.num_scheduled_tokens for sequence in rows],
            counts=[1] * num_decodes + self.chunk_counts,
            num_decodes=num_decodes,
            sample_rows=sample_rows,
            masked_samples=masked,
        )

    def mark_in_flight(self, step: int) -> StepInFlight:
        """Count the step's tokens as scheduled, and a pending one for each row that reaches its sequence's end."""
        for sequence in self.decodes:
            sequence.num_scheduled_tokens += 1
            sequence.num_pending_tokens += 1
        for sequence, count in zip(self.chunks, self.chunk_counts, strict=True):
            sequence.num_scheduled_tokens += count
            sequence.num_pending_tokens += sequence.num_scheduled_tokens == len(sequence.tokens)
        rows = self.decodes + self.chunks
        return StepInFlight(step, rows, [sequence.epoch for sequence in rows])
