"""A client's request and its sequences: state that the scheduler alone changes, from `Scheduler.add` on."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import msgspec

from ..errors import InvalidRequest
from ..protocol.logprobs import TokenLogprobs
from .block_pool import IntegrityError, PrefixChain
from .step_plan import SlotSampling, SlotStart


class SequenceStatus(Enum):
    """The state of a sequence; a preempted one waits again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Constraint(Protocol):
    """What one completion must match, and how far it has come: see engine/constraints/matcher.py."""

    @property
    def active(self) -> bool:
        """Whether some tokens may be forbidden now."""

    @property
    def ready(self) -> bool:
        """Whether what it allows next is known, or will be by the time that a step planned now samples."""

    def advance(self, token_id: int) -> bool:
        """Take in the next token, no end token. Returns whether the answer is complete, so that nothing may follow."""


@dataclass(eq=False, slots=True)
class Request:
    """What a client asked for, every default resolved: n = len(samplings) completions of one prompt."""

    id: str
    prompt: list[int]
    """Token ids, at least one."""
    samplings: list[SlotSampling]
    """One for each completion; they differ in their seed. Prompt logprobs are taken from the first one alone."""
    max_tokens: int
    """Most new tokens of each completion; max_model_len ends it too."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-sequence ids; empty with ignore_eos."""
    stop_token_ids: frozenset[int] = frozenset()
    constraints: tuple[Constraint, ...] = ()
    """One for each completion, or none; they are at its first token."""
    priority: int = 0
    """Lower runs first."""
    cache_salt: str = ""
    seed: int = 0
    """What the seeds of its completions follow from."""
    arrived_at: float | None = None
    """Seconds on the scheduler's clock; None lets `Scheduler.add` set it. So are all times below."""
    outputs: list[list[int]] = field(default_factory=list)
    """With a resumed request: the output tokens of each completion that are known already."""
    first_token_at: float | None = None
    """With a resumed request: when its first output token was known, if one is."""
    cached_before: int | None = None
    """With a resumed request: what the engine before had of its prompt in the prefix cache, if it has told."""

    sequences: list[Sequence] = field(default_factory=list)
    unfinished: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    """For prompt tokens 1, 2, ... as far as they are computed; None if not asked for."""

    def check(self, max_num_seqs: int, max_model_len: int) -> None:
        """Raise InvalidRequest if it can never run: it has too many completions, or too long a prompt."""
        n = len(self.samplings)
        length = len(self.prompt)
        if not 1 <= n <= max_num_seqs:
            raise InvalidRequest(
                f"n={n} is out of range: it must be in [1, {max_num_seqs}]; raise max_num_seqs={max_num_seqs}"
            )
        if not 1 <= length < max_model_len:
            allowed = f"1 to {max_model_len - 1}, so that one more fits max_model_len={max_model_len}"
            raise InvalidRequest(f"the prompt has {length} tokens; it must have {allowed}")

    def take_on(self, arrival: int, max_model_len: int, chain: PrefixChain | None) -> None:
        """Make a sequence for each completion. `chain` covers the prompt's full blocks; each sequence gets a copy."""
        length = len(self.prompt)
        self.unfinished = len(self.samplings)
        self.prompt_logprobs = [] if self.samplings[0].prompt_logprobs >= 0 else None

        self.sequences = [
            Sequence(
                request=self,
                index=index,
                order=(self.priority, arrival, index),
                tokens=self.prompt + self.outputs[index] if self.outputs else list(self.prompt),
                prompt_length=length,
                length_limit=min(length + self.max_tokens, max_model_len),
                end_token_ids=self.eos_token_ids | self.stop_token_ids,
                sampling=sampling if index == 0 else msgspec.structs.replace(sampling, prompt_logprobs=-1),
                chain=chain.copy() if chain is not None else None,
                constraint=self.constraints[index] if self.constraints else None,
            )
            for index, sampling in enumerate(self.samplings)
        ]
        for sequence in self.sequences if self.outputs else []:
            sequence.take_up(self.first_token_at)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from the prefix cache when the first completion was admitted."""
        if self.cached_before is not None:
            return self.cached_before
        return self.sequences[0].cached_tokens if self.sequences else 0

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether some prompt position is still to be computed for its logprobs."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt) - 1

    def add_prompt_logprobs(self, position: int, entries: list[TokenLogprobs]) -> None:
        """Add the entries for the tokens after `position`; those known before a preemption may come a second time."""
        known = self.prompt_logprobs
        if known is None or position > len(known):
            raise IntegrityError(f"prompt logprobs of {self.id} from position {position} do not follow those known")
        known += entries[len(known) - position :]


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion: its known tokens, and how many of them are computed, scheduled and sent."""

    request: Request
    index: int
    order: tuple[int, int, int]
    """(priority, arrival number, index): the smaller is scheduled first and preempted last."""
    tokens: list[int]
    """Known tokens: prompt, then output."""
    prompt_length: int
    length_limit: int
    """len(tokens) at which it ends."""
    end_token_ids: frozenset[int]
    sampling: SlotSampling
    chain: PrefixChain | None
    """None: shares no block with anybody. Else it covers the full blocks of the prompt and of the computed tokens."""
    constraint: Constraint | None = None
    """Has taken in every known token of the output."""

    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    """Tokens whose KV is in the cache."""
    num_scheduled_tokens: int = 0
    """Tokens whose KV is in the cache once the steps in flight are done."""
    num_pending_tokens: int = 0
    """Tokens that the steps in flight sample: their positions are known, their ids are not yet."""
    num_sent_tokens: int = 0
    """Tokens whose ids the ranks were sent."""
    epoch: int = 0
    """How often it has given its slot up. Results of rows planned in an earlier epoch are dropped."""
    blocks: list[int] = field(default_factory=list)
    capacity: int = 0
    """Tokens that fit in `blocks`."""
    slot: int = -1
    awaited_digest: bytes = b""
    """Digest of the block that a running sequence was computing when this one last wanted it."""
    cached_tokens: int = 0
    preemptions: int = 0
    ended: tuple[str, str | int | None] | None = None
    """The finish_reason and stop_reason of a resumed sequence that has all its tokens: it is computed, if at all, for
    the prompt's log-probabilities."""
    finish_reason: str | None = None
    """"stop", "length" or "abort"."""
    stop_reason: str | int | None = None
    first_scheduled_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None

    def take_up(self, first_token_at: float | None) -> None:
        """Take in that its output so far comes from another engine, which may have computed all of it."""
        if self.num_output == 0:
            return
        self.first_token_at = self.last_token_at = self.first_scheduled_at = first_token_at
        for length, token in enumerate(self.output):
            reason, stop_reason = self._take_in(token, length)
            if reason is not None:
                self.ended = (reason, stop_reason)

    @property
    def name(self) -> str:
        """The request's id and the completion's index, for messages."""
        return f"{self.request.id}/{self.index}"

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens to compute next, the pending ones among them."""
        return len(self.tokens) + self.num_pending_tokens - self.num_scheduled_tokens

    @property
    def owes_prompt_logprobs(self) -> bool:
        """Whether some of the prompt's log-probabilities are still to come from this sequence."""
        return self.index == 0 and self.request.needs_prompt_logprobs

    @property
    def cacheable(self) -> int:
        """Tokens that may come from the prefix cache.

        The last token's logits are needed for sampling, and prompt logprobs need those of each position not yet given.
        """
        logprobs = self.request.prompt_logprobs
        if logprobs is not None and self.owes_prompt_logprobs:
            return len(logprobs)
        return len(self.tokens) - 1

    def start(self, slot: int) -> SlotStart:
        """Return what the ranks need to know when it takes a slot."""
        sampling = self.sampling
        if sampling.prompt_logprobs >= 0 and not self.request.needs_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)
        return SlotStart(slot, self.prompt_length, list(self.tokens), sampling)

    def append(self, token: int, logprobs: TokenLogprobs | None, now: float) -> SequenceUpdate:
        """Take in a token that a step has sampled. If the update that it returns has a finish_reason, that is the end.

        Each step does this for every row, so the many tokens that end nothing are told from the others at once.
        """
        request = self.request
        if self.ended is not None:
            return SequenceUpdate(request, self, [], None, *self.ended, request.unfinished == 1)

        tokens = self.tokens
        known = len(tokens)
        ending: tuple[str | None, int | None] | None = None
        if token in self.end_token_ids or known + 1 >= self.length_limit or self.constraint is not None:
            ending = self._take_in(token, known - self.prompt_length)
        tokens.append(token)
        self.num_pending_tokens -= 1
        if self.first_token_at is None:
            self.first_token_at = now
        self.last_token_at = now

        entries = None if logprobs is None else [logprobs]
        if ending is None or ending[0] is None:
            return SequenceUpdate(request, self, [token], entries)
        return SequenceUpdate(request, self, [token], entries, *ending, request.unfinished == 1)

    def _take_in(self, token: int, output_length: int) -> tuple[str | None, int | None]:
        """Follow the output by a token after `output_length` others.

        Returns (finish_reason, stop_reason) if it ends the sequence, else two None.
        """
        if token in self.end_token_ids and output_length >= self.sampling.min_tokens:
            # The model's own end-of-sequence needs no naming.
            return "stop", None if token in self.request.eos_token_ids else token
        if self.constraint is not None and self.constraint.advance(token):
            return "stop", None
        if self.prompt_length + output_length + 1 >= self.length_limit:
            return "length", None
        return None, None

    @property
    def output(self) -> list[int]:
        """The new tokens, an end-of-sequence or stop token included."""
        return self.tokens[self.prompt_length :]

    @property
    def num_output(self) -> int:
        """The number of new tokens."""
        return len(self.tokens) - self.prompt_length


# One is made for each token: without gc, since nothing that it refers to refers to it.
class SequenceUpdate(msgspec.Struct, frozen=True, gc=False):
    """What one step, an abort or an external finish brought to one sequence."""

    request: Request
    sequence: Sequence
    token_ids: list[int]
    """New tokens; an end-of-sequence or stop token is one of them."""
    logprobs: list[TokenLogprobs] | None = None
    """Aligned with token_ids; None if not asked for."""
    finish_reason: str | None = None
    """Set in the last update of a sequence, and only there."""
    stop_reason: str | int | None = None
    request_finished: bool = False
    """Whether this ended the last unfinished sequence of the request."""


def end_of(sequence: Sequence) -> SequenceUpdate:
    """Return the update of a sequence that has ended without a new token."""
    request = sequence.request
    return SequenceUpdate(
        request, sequence, [], None, sequence.finish_reason, sequence.stop_reason, request.unfinished == 0
    )


def taken_up(sequence: Sequence) -> SequenceUpdate:
    """Return the update that tells the output tokens with which a resumed sequence begins, and its end if it has all.

    Of several completions that are told one after the other, the last one alone ends the request.
    """
    request = sequence.request
    reason, stop_reason = sequence.ended or (None, None)
    last = request.unfinished == 0 and sequence is request.sequences[-1]
    return SequenceUpdate(request, sequence, sequence.output, None, reason, stop_reason, last)
