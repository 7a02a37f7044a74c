"""Rows whose masks are not there: left out of steps, or postponed, with the same tokens in the end."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.engine.scheduling.request import Request
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling
from phalanx.tests.benchmarks.fake_ranks import FakeRanks, assert_complete, run_until_idle, step


class Mask:
    """A constraint that allows everything, and is ready when it is told to be."""

    def __init__(self) -> None:
        self.ready = True
        self.active = True

    def advance(self, token_id: int) -> bool:
        return False


def make(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {
        "num_blocks": 24,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "max_model_len": 64,
        "max_queue": 100,
        "prefix_cache": True,
    }
    return Scheduler(**(values | changes))


def request(name: str, prompt: list[int], mask: Mask | None = None, **fields: Any) -> Request:
    return Request(
        id=name, prompt=prompt, samplings=[SlotSampling(seed=len(name))], constraints=(mask,) if mask else (), **fields
    )


def test_a_row_whose_mask_is_not_ready_is_left_out_and_its_neighbour_goes_on() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    mask = Mask()
    slow, other = request("slow", [1, 2, 3], mask, max_tokens=5), request("other", [4, 5], max_tokens=5)
    scheduler.add(slow)
    scheduler.add(other)
    step(scheduler, ranks)
    mask.ready = False
    blocks = list(slow.sequences[0].blocks)
    for _ in range(4):
        plan = step(scheduler, ranks)
        assert plan is not None
        assert len(plan.slots) == 1
        assert plan.slots != [slow.sequences[0].slot]
    assert other.sequences[0].finish_reason == "length"
    assert scheduler.schedule() is None
    assert scheduler.has_work
    assert (slow.sequences[0].blocks, slow.sequences[0].num_output) == (blocks, 1)

    mask.ready = True
    run_until_idle(scheduler, ranks)
    assert_complete(slow, 64)


def test_a_late_row_computes_its_last_token_once_more_even_that_of_a_prompt() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    late = request("late", [1, 2, 3, 4, 5], Mask(), max_tokens=3)
    scheduler.add(late)
    counts = []
    for postponed in (True, True, False, True, False, False):
        plan = scheduler.schedule()
        assert plan is not None
        assert plan.masked_samples == [0]
        counts.append((plan.positions[0], plan.counts[0]))
        if postponed:
            scheduler.postpone(0)
        result = ranks.execute(plan, late={0} if postponed else ())
        assert (scheduler.sequence_of_row(0) is None) == postponed
        assert len(scheduler.commit(plan, result)) == (not postponed)
        scheduler.check_integrity()
    assert counts == [(0, 5), (4, 1), (4, 1), (5, 1), (5, 1), (6, 1)]
    assert_complete(late, 64)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), ahead=st.booleans())
def test_whatever_is_late_every_answer_is_what_it_would_have_been(seed: int, ahead: bool) -> None:
    chance = random.Random(seed)
    scheduler = make(num_blocks=16 if chance.random() < 0.5 else 24)
    ranks = FakeRanks(scheduler)
    masks = [Mask() if chance.random() < 0.7 else None for _ in range(6)]
    requests = [
        request(f"{i}" * (i + 1), [chance.randrange(9) for _ in range(chance.randint(1, 20))], mask, max_tokens=12)
        for i, mask in enumerate(masks)
    ]
    for each in requests:
        scheduler.add(each)

    flying = []
    for _ in range(2000):
        for mask in masks:
            if mask is not None:
                mask.ready = chance.random() < 0.6
        plan = scheduler.schedule()
        if plan is not None:
            late = []
            if plan.masked_samples:  # the steps before are committed first
                while flying:
                    scheduler.commit(*flying.pop(0))
                late = [plan.sample_rows[i] for i in plan.masked_samples if chance.random() < 0.3]
                for row in late:
                    scheduler.postpone(row)
            flying.append((plan, ranks.execute(plan, late)))
        if flying and (plan is None or not ahead or len(flying) == 2):
            scheduler.commit(*flying.pop(0))
        scheduler.check_integrity()
        if not scheduler.has_work:
            break
    assert not scheduler.has_work
    for each in requests:
        assert_complete(each, 64)
