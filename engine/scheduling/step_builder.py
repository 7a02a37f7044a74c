"""A step while the scheduler puts it together: who gets how many tokens, and how that becomes a StepPlan."""

from __future__ import annotations

from .request import Sequence
from .step_plan import SlotStart, StepPlan


class StepDraft:
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

    def give_blocks(self, sequence: Sequence, first: int) -> None:
        """Tell the ranks the entries of a block table from index `first`."""
        new = sequence.blocks[first:]
        self.block_slots += [sequence.slot] * len(new)
        self.block_indices += range(first, first + len(new))
        self.block_ids += new

    def tell(self, sequence: Sequence) -> None:
        """Tell the ranks the tokens sampled since they were last told."""
        for token in sequence.tokens[sequence.told :]:
            self.token_slots.append(sequence.slot)
            self.token_ids.append(token)
        sequence.told = len(sequence.tokens)

    def give_tokens(self, sequence: Sequence) -> None:
        """All it wants, but at most half of the budget that is left: no short prompt waits for a long one."""
        wanted = sequence.wanted
        count = min(wanted, (self.budget + 1) // 2)
        if count:
            self.budget -= count
            if wanted == 1:
                self.decodes.append(sequence)
            else:
                self.chunks.append(sequence)
                self.chunk_counts.append(count)

    def give_rest(self) -> None:
        """What nobody else could use goes to the first chunk that can."""
        for i, sequence in enumerate(self.chunks):
            more = min(self.budget, sequence.wanted - self.chunk_counts[i])
            self.chunk_counts[i] += more
            self.budget -= more

    def plan(self, step: int) -> StepPlan:
        """The finished step: decodes first, then chunks."""
        rows = self.decodes + self.chunks
        num_decodes = len(self.decodes)
        sample_rows = list(range(num_decodes))
        for row, (sequence, count) in enumerate(zip(self.chunks, self.chunk_counts, strict=True), num_decodes):
            if count == sequence.wanted:
                sample_rows.append(row)
        return StepPlan(
            step=step,
            starts=self.starts,
            token_slots=self.token_slots,
            token_ids=self.token_ids,
            block_slots=self.block_slots,
            block_indices=self.block_indices,
            block_ids=self.block_ids,
            slots=[sequence.slot for sequence in rows],
            positions=[sequence.planned for sequence in rows],
            counts=[1] * num_decodes + self.chunk_counts,
            num_decodes=num_decodes,
            sample_rows=sample_rows,
        )

    def take_off(self) -> tuple[list[Sequence], list[int]]:
        """The step is on its way: its tokens are planned, and one more is expected of each row that leaves none out.

        Returns the rows' sequences, and which of their lives it is.
        """
        for sequence in self.decodes:
            sequence.planned += 1
            sequence.expected += 1
        for sequence, count in zip(self.chunks, self.chunk_counts, strict=True):
            sequence.planned += count
            sequence.expected += sequence.planned == len(sequence.tokens)
        rows = self.decodes + self.chunks
        return rows, [sequence.lives for sequence in rows]
