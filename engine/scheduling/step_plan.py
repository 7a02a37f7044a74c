"""What every rank computes in one step, as plain frozen data: the only thing that crosses ranks for control.

A rank keeps, for each slot, the token ids and the block table it was sent; a plan carries what changed. Rank 0's
scheduler puts it together in a StepBuilder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from ..protocol.logprobs import TokenLogprobs

if TYPE_CHECKING:
    from .request import Sequence


class SlotSampling(msgspec.Struct, frozen=True, array_like=True):
    """A request's sampling values with every default resolved; all ranks apply them to their vocabulary shard."""

    temperature: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0  # signed 64 bits: the key of this sequence's noise
    min_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()  # masked while fewer than min_tokens are out
    bias_token_ids: tuple[int, ...] = ()
    bias_values: tuple[float, ...] = ()
    logprobs: int = -1  # -1: none; 0: the chosen token's alone; k: and the k likeliest
    prompt_logprobs: int = -1
    processed_logprobs: bool = False
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids that may not follow one another in the output
    allowed_token_ids: tuple[int, ...] = ()  # the only ones that may be sampled; none stands for all

    @property
    def needs_token_counts(self) -> bool:
        """Whether the ids of the tokens so far change the next token's logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def changes_logits(self, output_length: int) -> bool:
        """Whether logits are edited, by a bias, a penalty or a mask, after `output_length` output tokens."""
        return (
            self.needs_token_counts
            or bool(self.bias_token_ids or self.bad_words or self.allowed_token_ids)
            or (output_length < self.min_tokens and bool(self.end_token_ids))
        )


class SlotStart(msgspec.Struct, frozen=True, array_like=True):
    """What the ranks need to know of a sequence that takes a slot, first admitted or again after a preemption."""

    slot: int
    prompt_length: int  # tokens before the output began; the rest of token_ids is output from before a preemption
    token_ids: list[int]  # every token known so far
    sampling: SlotSampling


class StepPlan(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """One step. Row i of the batch is `counts[i]` tokens of slot `slots[i]` from position `positions[i]`.

    Rows of one token whose position is the slot's last token (decodes) come first: `num_decodes` of them. That token
    may be one past those that the rank was sent: then the slot's last step has sampled it on the device.
    Blocks and tokens are applied before the rows are computed, in this order: starts, tokens, blocks.
    """

    step: int
    starts: list[SlotStart]
    # Tokens committed since the slot's last row: each token id is appended to its slot's tokens.
    token_slots: list[int]
    token_ids: list[int]
    # Block table entries that changed: block_table[slot][index] = block id.
    block_slots: list[int]
    block_indices: list[int]
    block_ids: list[int]
    slots: list[int]
    positions: list[int]
    counts: list[int]
    num_decodes: int
    sample_rows: list[int]  # rows whose last token gets a successor sampled in this step, ascending
    # Indices of sample_rows whose tokens a grammar limits: the Masks that follow this plan say to which.
    masked_samples: list[int] = []

    @property
    def only_decodes(self) -> bool:
        """Whether every row is a token from which the next is sampled."""
        return self.num_decodes == len(self.slots) == len(self.sample_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(self.counts)


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

    def computed(self, counts: list[int]) -> list[int]:
        """The tokens that each row has computed for good, of those that its plan counts."""
        if not self.postponed:
            return counts
        return [count - (row in self.postponed) for row, count in enumerate(counts)]

    def postpone(self, row: int) -> None:
        """Take back that a row's last token is scheduled, and that the next one is pending."""
        sequence = self.sequence(row)
        if sequence is not None:
            sequence.num_scheduled_tokens -= 1
            sequence.num_pending_tokens -= 1
            self.postponed.add(row)


class StepBuilder:
    """A step while the scheduler puts it together: its rows, what is new for the ranks, and the budget that is left."""

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
        self.has_constraints = False  # whether some row's sequence has one

    def send_blocks(self, sequence: Sequence, first: int) -> None:
        """Send the ranks the entries of a block table from index `first`."""
        new = sequence.blocks[first:]
        self.block_slots += [sequence.slot] * len(new)
        self.block_indices += range(first, first + len(new))
        self.block_ids += new

    def send_new_tokens(self, sequence: Sequence) -> None:
        """Send the ranks the tokens sampled since they were last sent some: one, for most rows of most steps."""
        tokens = sequence.tokens
        known = len(tokens)
        if known - sequence.num_sent_tokens == 1:
            self.token_slots.append(sequence.slot)
            self.token_ids.append(tokens[-1])
        else:
            new = tokens[sequence.num_sent_tokens :]
            self.token_slots += [sequence.slot] * len(new)
            self.token_ids += new
        sequence.num_sent_tokens = known

    def schedule_tokens(self, sequence: Sequence) -> None:
        """Schedule all its uncomputed tokens, but at most half of the remaining budget.

        So no short prompt waits for a long one.
        """
        wanted = sequence.num_uncomputed_tokens
        count = min(wanted, (self.budget + 1) // 2)
        if count:
            self.has_constraints |= sequence.constraint is not None
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
        masked = []
        for i, row in enumerate(sample_rows if self.has_constraints else []):
            constraint = rows[row].constraint
            if constraint is not None and (constraint.active or rows[row].num_pending_tokens):
                masked.append(i)

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


class Masks(msgspec.Struct, frozen=True, array_like=True, tag="masks"):
    """Which tokens a grammar allows, for each of the masked_samples of the plan just sent: sent while that computes.

    A mask has one bit for each token of the vocabulary, the lowest first in each byte; an empty one allows all.
    """

    masks: list[bytes]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """The group's work is done: every rank leaves its loop, which returns `payload` (see LLM.in_group)."""

    payload: bytes = b""


class Idle(msgspec.Struct, frozen=True, array_like=True, tag="idle"):
    """Nothing to compute; sent now and then so that a waiting rank knows that rank 0 lives."""


class Capture(msgspec.Struct, frozen=True, array_like=True, tag="capture"):
    """Capture the CUDA graph of decode steps of `rows` rows, between two steps."""

    rows: int


Control = StepPlan | Masks | Stop | Idle | Capture

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Control] = msgspec.msgpack.Decoder(Control)


def encode(message: Control) -> bytes:
    """Return the bytes of a control message, for the control channel."""
    return _encoder.encode(message)


def decode(data: bytes) -> Control:
    """Return the control message in `data`; raises msgspec.ValidationError if it is not one."""
    return _decoder.decode(data)


class StepResult(msgspec.Struct, frozen=True):
    """The results of one step on rank 0, aligned with the plan's sample_rows."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # row -> for the prompt tokens that follow the row's positions
    failures: dict[int, Exception] = {}  # place in sample_rows -> why it has no token, where that is no number
