"""Decides what every sequence computes in each step. One rule, no phases: a sequence has known and computed tokens, and
each step hands out a budget of tokens until computed catches up with known.

    plan = scheduler.schedule()          # None: nothing to compute
    updates = scheduler.commit(plan, result)

The next step may be scheduled before the last one is committed. A token that is being sampled is then pending: its
position is known, the ranks have it, and the row that computes it does without its id.

One thread calls everything here.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from operator import attrgetter

from ..errors import CapacityExceeded, ConfigError, InvalidRequest
from .block_pool import BlockPool, IntegrityError, PrefixSharing
from .integrity import check_scheduler, check_slots
from .request import Request, Sequence, SequenceStatus, SequenceUpdate, end_of, taken_up
from .step_plan import StepBuilder, StepInFlight, StepPlan, StepResult

HEADROOM_TOKENS = 16  # an admission leaves each running sequence the blocks of its next 16 tokens, or of one block

_order = attrgetter("order")


class Scheduler:
    """Owns all requests, their block tables and slots.

    Sequences are ordered by (priority, arrival, index). They are admitted in that order, and when blocks run out the
    last one running is preempted: it loses its blocks and its slot, keeps its tokens and waits again in its order. So
    the first in order always progresses, and nothing is admitted past a sequence that waits for blocks.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_queue: int,
        prefix_cache: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` returns seconds; max_num_batched_tokens is at least max_num_seqs, as EngineConfig checks.

        Raises ConfigError if the pool cannot hold one sequence of max_model_len tokens.
        """
        if num_blocks * block_size < max_model_len:
            raise ConfigError(
                f"the KV cache holds {num_blocks} blocks of {block_size} = {num_blocks * block_size} tokens, but one "
                f"sequence may have max_model_len={max_model_len}: raise kv_memory, or lower max_model_len to at most "
                f"{num_blocks * block_size}"
            )

        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.prefix_cache = prefix_cache
        self._clock = clock
        self._pool = BlockPool(num_blocks)

        self._requests: dict[str, Request] = {}
        self._queued: dict[str, int] = {}  # prompt tokens of the requests none of whose sequences was admitted yet
        self._waiting: list[Sequence] = []  # both lists in rank order
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._sharing = PrefixSharing(self._pool, block_size, prefix_cache)
        self._in_flight: deque[StepInFlight] = deque()  # oldest first
        self._arrivals = 0

        self.failures: list[tuple[str, Exception]] = []  # whose own rows failed, and why: the caller aborts them
        self.steps = self.preemptions = 0
        self.waiting_tokens = 0  # of the prompts of the requests in _queued
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens looked up, and found, at first admissions

    @property
    def has_work(self) -> bool:
        """Whether some request is unfinished."""
        return bool(self._requests)

    def unfinished(self) -> list[str]:
        """Ids of the requests under way."""
        return list(self._requests)

    def sequence_of_row(self, row: int) -> Sequence | None:
        """The sequence that gets the token of a row of the oldest step in flight; None if none does."""
        return self._in_flight[0].sampled(row)

    def masked_sequences(self, plan: StepPlan) -> list[Sequence | None]:
        """The sequences of the plan's masked_samples; None for one that has given its slot up since.

        `plan` is the newest step in flight.
        """
        return [self._in_flight[-1].sequence(plan.sample_rows[i]) for i in plan.masked_samples]

    def postpone(self, row: int) -> None:
        """Have a row of the newest step in flight give no token: a later step computes its last token once more."""
        self._in_flight[-1].postpone(row)

    @property
    def can_run_ahead(self) -> bool:
        """Whether a step may be scheduled now: while one is in flight, but not while two are."""
        return len(self._in_flight) < 2

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait, preempted ones included."""
        return len(self._waiting)

    @property
    def total_blocks(self) -> int:
        """Blocks of the pool."""
        return self._pool.total

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds; they may still cache a prefix."""
        return self._pool.available

    # -- requests in and out

    def add(self, request: Request) -> list[SequenceUpdate]:
        """Queue a request. Returns an update for each completion that begins with outputs, of a resumed request.

        Raises CapacityExceeded if max_queue of them wait, InvalidRequest if it can never run.
        """
        request.check(self.max_num_seqs, self.max_model_len)
        if request.id in self._requests:
            raise InvalidRequest(f"request id {request.id!r} is in use by an unfinished request")
        if len(self._queued) >= self.max_queue:
            raise CapacityExceeded(
                f"{len(self._queued)} requests wait, as many as max_queue={self.max_queue}: retry later or raise it"
            )

        request.arrived_at = self._clock() if request.arrived_at is None else request.arrived_at
        request.take_on(self._arrivals, self.max_model_len, self._sharing.chain_of(request, self._arrivals))
        self._arrivals += 1
        self._requests[request.id] = request
        self._queued[request.id] = len(request.prompt)
        self.waiting_tokens += len(request.prompt)
        for sequence in request.sequences:
            insort(self._waiting, sequence, key=_order)

        resumed = [sequence for sequence in request.sequences if sequence.num_output]
        for sequence in resumed:
            if sequence.ended is not None and not sequence.owes_prompt_logprobs:
                self._finish(sequence, *sequence.ended, self._clock())
        return [taken_up(sequence) for sequence in resumed]

    def abort(self, request_id: str, forget: bool = False) -> list[SequenceUpdate]:
        """End a request, also between schedule and commit. Returns an update for each sequence that this ended.

        With `forget` its blocks are not reused from the prefix cache: see BlockPool.forget().
        """
        request = self._requests.get(request_id)
        now = self._clock()
        updates: list[SequenceUpdate] = []
        for sequence in [] if request is None else request.sequences:
            if sequence.status is not SequenceStatus.FINISHED:
                if forget:
                    self._pool.forget(sequence.blocks)
                self._finish(sequence, "abort", None, now)
                updates.append(end_of(sequence))
        return updates

    def finish(self, request_id: str, index: int, stop_reason: str | int | None) -> SequenceUpdate | None:
        """End one completion because of its text (a stop string); None if it had ended. Later tokens are dropped."""
        request = self._requests.get(request_id)
        if request is None or request.sequences[index].status is SequenceStatus.FINISHED:
            return None
        sequence = request.sequences[index]
        if sequence.owes_prompt_logprobs:  # a resumed one, whose stop string was there when it came
            sequence.ended = ("stop", stop_reason)
            return None
        self._finish(sequence, "stop", stop_reason, self._clock())
        return end_of(sequence)

    def _finish(self, sequence: Sequence, reason: str, stop_reason: str | int | None, now: float) -> None:
        if sequence.status is SequenceStatus.RUNNING:
            self._vacate(sequence)
        else:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=_order)]
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        sequence.stop_reason = stop_reason
        sequence.finished_at = now
        request = sequence.request
        request.unfinished -= 1
        if request.unfinished == 0:
            del self._requests[request.id]
            self.waiting_tokens -= self._queued.pop(request.id, 0)

    def _vacate(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and blocks away."""
        del self._running[bisect_left(self._running, sequence.order, key=_order)]
        self._pool.release(sequence.blocks)
        self._free_slots.append(sequence.slot)
        self._sharing.withdraw(sequence)
        sequence.blocks = []
        sequence.capacity = 0
        sequence.slot = -1
        sequence.epoch += 1

    # -- one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute yet.

        A decode row whose constraint is not ready is left out, and keeps its slot and its blocks.
        Raises IntegrityError with two steps in flight.
        """
        if not self.can_run_ahead:
            raise IntegrityError(f"step {self._in_flight[0].step} must be committed before another is scheduled")
        step = StepBuilder(self.max_num_batched_tokens)
        self._schedule_running(step)
        if self._waiting:
            self._admit(step)
        if not step.decodes and not step.chunks:
            return None

        step.spend_leftover_budget()
        self.steps += 1
        plan = step.build(self.steps)
        self._in_flight.append(step.mark_in_flight(self.steps))
        return plan

    def _schedule_running(self, step: StepBuilder) -> None:
        prompts = []
        for sequence in self._running:  # preemptions shorten the list from its end, never by one that was seen here
            known = len(sequence.tokens)
            if known + sequence.num_pending_tokens - sequence.num_scheduled_tokens > 1:
                prompts.append(sequence)
                continue
            if sequence.num_pending_tokens and known + 1 >= sequence.length_limit:  # the pending token will be its last
                continue
            if sequence.constraint is not None:
                if not sequence.constraint.ready:
                    continue
                step.has_constraints = True
            if sequence.num_scheduled_tokens == sequence.capacity and not self._grow(sequence, step):
                break
            if known > sequence.num_sent_tokens:
                step.send_new_tokens(sequence)
            step.decodes.append(sequence)

        step.budget -= len(step.decodes)
        for sequence in prompts:
            step.schedule_tokens(sequence)

    def _grow(self, sequence: Sequence, step: StepBuilder) -> bool:
        """Add one block, if need be by preempting the last running sequence; False if that is `sequence` itself."""
        while not self._pool.available:
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._pool.allocate(1)
        sequence.capacity += self.block_size
        step.send_blocks(sequence, len(sequence.blocks) - 1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._vacate(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = sequence.num_pending_tokens = 0
        sequence.preemptions += 1
        self.preemptions += 1
        insort(self._waiting, sequence, key=_order)

    def _admit(self, step: StepBuilder) -> None:
        passed_over: list[Sequence] = []
        seen = 0
        now = self._clock()
        for sequence in self._waiting:
            if not step.budget or not self._free_slots:
                break
            if self._sharing.is_being_computed(sequence):
                passed_over.append(sequence)
                seen += 1
                continue

            cached = self._sharing.match(sequence)
            if self._sharing.is_being_computed(sequence):
                passed_over.append(sequence)
            elif not self._fits(sequence, cached):
                break
            elif not self._start(sequence, cached, step, now):
                passed_over.append(sequence)
            seen += 1
        self._waiting[:seen] = passed_over

    def _fits(self, sequence: Sequence, cached: list[int]) -> bool:
        if not self._running:
            return True
        needed = -(-len(sequence.tokens) // self.block_size)
        spare = self._pool.available - needed + self._pool.held(cached)
        if spare > len(self._running):
            return True
        growing = sum(self._grows_soon(running, running.capacity) for running in self._running)
        return spare >= growing + self._grows_soon(sequence, needed * self.block_size)

    def _grows_soon(self, sequence: Sequence, capacity: int) -> bool:
        """Whether its next tokens need a block beyond `capacity` tokens. The last token it may have needs none."""
        soon = len(sequence.tokens) + min(HEADROOM_TOKENS, self.block_size)
        return capacity < min(soon, sequence.length_limit - 1)

    def _start(self, sequence: Sequence, cached: list[int], step: StepBuilder, now: float) -> bool:
        """Give a waiting sequence a slot, and blocks for all it knows; False if the ranks cannot be told of it."""
        try:
            start = sequence.start(self._free_slots[-1])
        except Exception as error:
            self.failures.append((sequence.request.id, error))
            return False
        known = len(sequence.tokens)
        self._pool.acquire(cached)
        sequence.blocks = cached + self._pool.allocate(-(-known // self.block_size) - len(cached))
        sequence.capacity = len(sequence.blocks) * self.block_size
        sequence.slot = self._free_slots.pop()
        sequence.num_computed_tokens = sequence.num_scheduled_tokens = len(cached) * self.block_size
        sequence.num_sent_tokens = known
        sequence.status = SequenceStatus.RUNNING

        # From here on it runs: others may wait for the blocks that it will publish.
        insort(self._running, sequence, key=_order)
        self.waiting_tokens -= self._queued.pop(sequence.request.id, 0)
        self._sharing.announce(sequence, len(cached))
        if sequence.first_scheduled_at is None:
            sequence.first_scheduled_at = now
            sequence.cached_tokens = sequence.num_computed_tokens
            self.prefix_hits += sequence.num_computed_tokens
            self.prefix_queries += sequence.prompt_length if self.prefix_cache else 0

        step.starts.append(start)
        step.send_blocks(sequence, 0)
        step.schedule_tokens(sequence)
        return True

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Record a step's results. Returns an update for each new token; sequences that ended meanwhile get none.

        Raises IntegrityError if `plan` is not the oldest step in flight.
        """
        if not self._in_flight or plan.step != self._in_flight[0].step:
            raise IntegrityError(f"step {plan.step} was committed, but it is not the oldest one in flight")
        step = self._in_flight.popleft()
        for row, entries in result.prompt_logprobs.items():
            if (sequence := step.sequence(row)) is not None:
                sequence.request.add_prompt_logprobs(plan.positions[row], entries)

        # Publish the blocks that are full now.
        sequences = step.sequences
        epochs = step.epochs
        size = self.block_size
        for sequence, epoch, count in zip(sequences, epochs, step.computed(plan.counts), strict=True):
            if sequence.epoch == epoch:
                before = sequence.num_computed_tokens
                sequence.num_computed_tokens = before + count
                if before % size + count >= size:
                    self._sharing.publish(sequence, before // size)

        now = self._clock()
        postponed = step.postponed
        updates = []
        for row, token, logprobs in zip(plan.sample_rows, result.token_ids, result.logprobs, strict=True):
            sequence = sequences[row]
            if sequence.epoch == epochs[row] and row not in postponed:
                try:
                    update = sequence.append(token, logprobs, now)
                    if update.finish_reason is not None:
                        self._finish(sequence, update.finish_reason, update.stop_reason, now)
                    updates.append(update)
                except Exception as error:
                    self.failures.append((sequence.request.id, error))
        return updates

    def check_integrity(self) -> None:
        """Raise IntegrityError if state contradicts itself or is lost. Visits all of it: for idle moments and tests."""
        lists = self._requests, self._queued, self._waiting, self._running
        check_scheduler(*lists, self._sharing.computing, self.block_size, steps=len(self._in_flight))
        check_slots(self._free_slots, self._running, self.max_num_seqs)
        self._pool.check_integrity((s.name, s.blocks, s.chain) for s in self._running)
