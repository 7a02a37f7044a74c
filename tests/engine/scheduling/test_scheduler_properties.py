"""Random lives of a scheduler: every token sees the right KV, and every completion is what it would be alone."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phalanx.engine.scheduling.request import Request, SequenceStatus
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling, StepPlan, StepResult
from phalanx.tests.benchmarks.fake_ranks import FakeRanks, assert_complete, expected_output

MAX_MODEL_LEN = 40


@dataclass(frozen=True)
class Arrival:
    """One request of a trace, and what its client does to it."""

    step: int
    prompt: tuple[int, ...]
    n: int
    max_tokens: int
    min_tokens: int
    priority: int
    salt: str
    eos: bool
    prompt_logprobs: bool
    abort_after: int | None
    """Steps after its arrival."""
    abort_in_flight: bool
    """Between schedule and commit, or before schedule."""
    stop_at: int | None
    """Output tokens of completion 0 at which its text is found to hold a stop string."""


@dataclass(frozen=True)
class Sizes:
    block_size: int
    spare_blocks: int
    max_num_seqs: int
    spare_tokens: int
    prefix_cache: bool

    def scheduler(self) -> Scheduler:
        return Scheduler(
            num_blocks=-(-MAX_MODEL_LEN // self.block_size) + self.spare_blocks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_seqs + self.spare_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_queue=1000,
            prefix_cache=self.prefix_cache,
        )


sizes = st.builds(
    Sizes,
    block_size=st.integers(1, 6),
    spare_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(3, 8),
    spare_tokens=st.integers(0, 30),
    prefix_cache=st.booleans(),
)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Draw prompts of few families, so that beginnings repeat."""
    family, shared, own = draw(st.integers(0, 1)), draw(st.integers(0, 20)), draw(st.integers(0, 15))
    beginning = [family * 7 + i % 5 for i in range(shared)]
    return tuple(beginning + draw(st.lists(st.integers(0, 1), min_size=own, max_size=own))) or (family,)


arrivals = st.builds(
    Arrival,
    step=st.integers(0, 20),
    prompt=prompts(),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    max_tokens=st.integers(1, 25),
    min_tokens=st.integers(0, 3),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    salt=st.sampled_from(["", "", "other"]),
    eos=st.booleans(),
    prompt_logprobs=st.sampled_from([False, False, True]),
    abort_after=st.sampled_from([None, None, None, 0, 1, 3, 8, 15]),
    abort_in_flight=st.booleans(),
    stop_at=st.sampled_from([None, None, 1, 3, 9]),
)


class Life:
    """Plays a trace against a scheduler and fake ranks, checking each step."""

    def __init__(self, sizes: Sizes, trace: list[Arrival], ahead: bool) -> None:
        self.ahead = ahead
        self.flying: deque[tuple[StepPlan, StepResult]] = deque()
        self.scheduler = sizes.scheduler()
        self.ranks = FakeRanks(self.scheduler)
        self.trace = trace
        self.requests = [_request(i, arrival) for i, arrival in enumerate(trace)]
        self.ended: set[tuple[str, int]] = set()

    def play(self) -> None:
        now = 0
        last = max(arrival.step + (arrival.abort_after or 0) for arrival in self.trace)
        limit = last + _most_steps(self.requests, self.scheduler.max_num_seqs)
        while self.scheduler.has_work or self.flying or now <= last:
            for arrival, request in zip(self.trace, self.requests, strict=True):
                if arrival.step == now:
                    self.scheduler.add(request)
            self._abort(now, in_flight=False)
            plan = self.scheduler.schedule() if self.scheduler.can_run_ahead else None
            self.scheduler.check_integrity()
            assert plan is not None or self.flying or not self.scheduler.has_work
            if plan is not None:
                self._check_first_in_rank_progresses(plan)
                self.flying.append((plan, self.ranks.execute(plan)))
            self._abort(now, in_flight=True)
            if self.flying and (plan is None or not self.ahead or len(self.flying) == 2):
                self._commit(*self.flying.popleft())
            self.scheduler.check_integrity()
            now += 1
            assert now <= limit, "starved"
        assert self.scheduler.free_blocks == self.scheduler.total_blocks
        assert self.scheduler.running == self.scheduler.waiting == 0

    def _abort(self, now: int, in_flight: bool) -> None:
        for arrival, request in zip(self.trace, self.requests, strict=True):
            if (
                arrival.abort_after is not None
                and now == arrival.step + arrival.abort_after
                and arrival.abort_in_flight == in_flight
            ):
                updates = self.scheduler.abort(request.id)
                assert all(update.finish_reason == "abort" for update in updates)
                self.ended |= {(request.id, update.sequence.index) for update in updates}

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        for update in self.scheduler.commit(plan, result):
            request, sequence = update.request, update.sequence
            key = (request.id, sequence.index)
            assert key not in self.ended, "an update after the end"
            assert len(update.token_ids) == 1
            assert sequence.tokens[-1] == update.token_ids[0]
            if update.finish_reason is not None:
                self.ended.add(key)
            elif sequence.index == 0 and sequence.num_output == self.trace[int(request.id)].stop_at:
                finished = self.scheduler.finish(request.id, 0, "a stop string")
                assert finished is not None
                self.ended.add(key)

    def _check_first_in_rank_progresses(self, plan: StepPlan) -> None:
        running = [s for request in self.requests for s in request.sequences if s.status is SequenceStatus.RUNNING]
        assert len(running) == self.scheduler.running <= self.scheduler.max_num_seqs
        first = min(running, key=lambda sequence: sequence.order)
        assert first.slot in plan.slots or (self.ahead and first.num_pending_tokens)
        assert {sequence.slot for sequence in running} >= set(plan.slots)

    def check_outputs(self) -> None:
        for arrival, request in zip(self.trace, self.requests, strict=True):
            for index, sequence in enumerate(request.sequences):
                assert sequence.status is SequenceStatus.FINISHED
                output, reason = expected_output(request, index, MAX_MODEL_LEN)
                if sequence.finish_reason == "abort":
                    assert arrival.abort_after is not None
                    assert sequence.output == output[: sequence.num_output]
                elif sequence.stop_reason == "a stop string":
                    assert sequence.output == output[: arrival.stop_at]
                else:
                    assert (sequence.output, sequence.finish_reason) == (output, reason)


def _request(number: int, arrival: Arrival) -> Request:
    eos = frozenset(range(4)) if arrival.eos else frozenset()
    return Request(
        id=str(number),
        prompt=list(arrival.prompt),
        samplings=[
            SlotSampling(
                seed=10 * number + index,
                min_tokens=min(arrival.min_tokens, arrival.max_tokens),
                end_token_ids=tuple(sorted(eos)),
                prompt_logprobs=0 if arrival.prompt_logprobs else -1,
            )
            for index in range(arrival.n)
        ],
        max_tokens=arrival.max_tokens,
        eos_token_ids=eos,
        priority=arrival.priority,
        cache_salt=arrival.salt,
    )


def _most_steps(requests: list[Request], max_num_seqs: int) -> int:
    """Each sequence, once first in rank, waits at most until those that run have left, then progresses each step."""
    return sum(len(request.samplings) for request in requests) * (max_num_seqs + 1) * MAX_MODEL_LEN


def check_life(sizes: Sizes, trace: list[Arrival], ahead: bool) -> Life:
    life = Life(sizes, trace, ahead)
    life.play()
    life.check_outputs()
    return life


quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(sizes=sizes, trace=st.lists(arrivals, min_size=1, max_size=12), ahead=st.booleans())
def test_every_completion_of_a_random_life_is_what_it_would_be_alone(
    sizes: Sizes, trace: list[Arrival], ahead: bool
) -> None:
    check_life(sizes, trace, ahead)


@quick
@given(
    block_size=st.integers(1, 4),
    trace=st.lists(
        st.builds(
            Arrival,
            step=st.integers(0, 3),
            prompt=prompts(),
            n=st.sampled_from([1, 3]),
            max_tokens=st.integers(10, 30),
            min_tokens=st.just(0),
            priority=st.sampled_from([0, 1]),
            salt=st.just(""),
            eos=st.just(False),
            prompt_logprobs=st.booleans(),
            abort_after=st.none(),
            abort_in_flight=st.just(False),
            stop_at=st.none(),
        ),
        min_size=4,
        max_size=8,
    ),
    prefix_cache=st.booleans(),
    ahead=st.booleans(),
)
def test_outputs_and_prompt_logprobs_survive_preemption_in_the_smallest_pool(
    block_size: int, trace: list[Arrival], prefix_cache: bool, ahead: bool
) -> None:
    sizes = Sizes(block_size, spare_blocks=0, max_num_seqs=6, spare_tokens=6, prefix_cache=prefix_cache)
    life = check_life(sizes, trace, ahead)
    for request in life.requests:
        assert_complete(request, MAX_MODEL_LEN)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sizes=sizes, trace=st.lists(arrivals, min_size=1, max_size=30), ahead=st.booleans())
def test_every_completion_of_a_long_random_life_is_what_it_would_be_alone(
    sizes: Sizes, trace: list[Arrival], ahead: bool
) -> None:
    check_life(sizes, trace, ahead)
