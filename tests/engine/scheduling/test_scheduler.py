from __future__ import annotations

from typing import Any

import pytest
from phalanx.engine.errors import CapacityExceeded, ConfigError, InvalidRequest
from phalanx.engine.scheduling.block_pool import IntegrityError
from phalanx.engine.scheduling.request import Request, SequenceStatus
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling, StepPlan
from phalanx.tests.benchmarks.fake_ranks import FakeRanks, assert_complete, expected_output, run_until_idle, step

MAX_MODEL_LEN = 64


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_model_len": MAX_MODEL_LEN,
        "max_queue": 100,
        "prefix_cache": True,
    }
    return Scheduler(**(values | changes))


def request(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1, **changes: Any) -> Request:
    sampling: dict[str, Any] = changes.pop("sampling", {})
    samplings = [SlotSampling(seed=i, **sampling) for i in range(n)]
    return Request(id=name, prompt=prompt, samplings=samplings, max_tokens=max_tokens, **changes)


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [first + i for i in range(length)]


def granted(plan: StepPlan, *requests: Request) -> list[int]:
    """Tokens that the first completion of each request computes in this step."""
    counts = dict(zip(plan.slots, plan.counts, strict=True))
    return [counts.get(r.sequences[0].slot, 0) for r in requests]


# -- one rule: computed catches up with known


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks_and_sampled_once_it_is_complete() -> None:
    scheduler = make(max_num_batched_tokens=8)
    ranks = FakeRanks(scheduler)
    long = request("long", prompt_of(20), max_tokens=3)
    scheduler.add(long)
    plans = run_until_idle(scheduler, ranks)
    assert [plan.counts for plan in plans] == [[8], [8], [4], [1], [1]]
    assert [plan.sample_rows for plan in plans] == [[], [], [0], [0], [0]]
    assert [plan.num_decodes for plan in plans] == [0, 0, 0, 1, 1]
    assert_complete(long, MAX_MODEL_LEN)


def test_decodes_come_first_and_share_the_step_with_prompt_chunks() -> None:
    scheduler = make(max_num_batched_tokens=16)
    ranks = FakeRanks(scheduler)
    first, second = request("first", prompt_of(5)), request("second", prompt_of(30, 7))
    scheduler.add(first)
    step(scheduler, ranks)
    scheduler.add(second)
    plan = step(scheduler, ranks)
    assert plan is not None
    assert (plan.num_decodes, plan.counts, plan.sample_rows) == (1, [1, 15], [0])
    run_until_idle(scheduler, ranks)
    assert_complete(first, MAX_MODEL_LEN)
    assert_complete(second, MAX_MODEL_LEN)


def test_a_sampled_token_reaches_the_ranks_with_the_next_plan_and_a_start_carries_all_known() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    one = request("one", [3, 1, 4], max_tokens=2)
    scheduler.add(one)
    first = step(scheduler, ranks)
    second = step(scheduler, ranks)
    assert first is not None
    assert second is not None
    assert [start.token_ids for start in first.starts] == [[3, 1, 4]]
    assert (second.starts, second.token_ids) == ([], one.sequences[0].output[:1])


def test_a_one_token_prompt_is_a_decode_row() -> None:
    scheduler = make()
    scheduler.add(request("one", [5]))
    plan = scheduler.schedule()
    assert plan is not None
    assert (plan.num_decodes, plan.counts, plan.sample_rows) == (1, [1], [0])


def test_with_nothing_to_compute_there_is_no_plan() -> None:
    scheduler = make()
    assert scheduler.schedule() is None
    assert not scheduler.has_work
    assert scheduler.steps == 0


@pytest.mark.parametrize("budget", [8, 9, 17, 64, 1000])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_outputs_do_not_depend_on_the_chunk_size_or_the_prefix_cache(budget: int, prefix_cache: bool) -> None:
    scheduler = make(max_num_batched_tokens=budget, prefix_cache=prefix_cache)
    requests = [request(str(i), prompt_of(3 + 7 * i, i % 2), max_tokens=5 + i, n=1 + i % 3) for i in range(8)]
    for each in requests:
        scheduler.add(each)
    run_until_idle(scheduler, FakeRanks(scheduler))
    for each in requests:
        assert_complete(each, MAX_MODEL_LEN)


# -- fairness and priorities


def test_a_short_prompt_behind_a_long_one_is_computed_at_once() -> None:
    scheduler = make(num_blocks=1024, max_model_len=4096, max_num_batched_tokens=64)
    ranks = FakeRanks(scheduler)
    long, short = request("long", [1] * 3000), request("short", [2] * 10, max_tokens=1)
    scheduler.add(long)
    step(scheduler, ranks)
    scheduler.add(short)
    plan = scheduler.schedule()
    assert plan is not None
    assert granted(plan, long, short) == [54, 10]
    scheduler.commit(plan, ranks.execute(plan))
    assert short.sequences[0].status is SequenceStatus.FINISHED


def test_no_prompt_takes_more_than_half_of_what_is_left_while_others_want_some() -> None:
    scheduler = make(num_blocks=1024, max_model_len=1000, max_num_batched_tokens=64, prefix_cache=False)
    requests = [request(str(i), [i] * 900) for i in range(3)]
    for each in requests:
        scheduler.add(each)
    plan = scheduler.schedule()
    assert plan is not None
    assert granted(plan, *requests) == [40, 16, 8]


def test_requests_are_admitted_by_priority_and_then_by_arrival() -> None:
    scheduler = make(max_num_seqs=1)
    ranks = FakeRanks(scheduler)
    order: list[str] = []
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        scheduler.add(request(name, [7, 7], max_tokens=2, priority=priority))
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan is not None
        updates = scheduler.commit(plan, ranks.execute(plan))
        order += [update.request.id for update in updates if update.finish_reason]
    assert order == ["d", "b", "e", "a", "c"]


@pytest.mark.parametrize("length", [1, 4, 30, 56, 60, 62, 63])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_pool_of_as_many_whole_sequences_as_slots_admits_them_all_at_once(length: int, prefix_cache: bool) -> None:
    blocks = 8 * MAX_MODEL_LEN // 4
    scheduler = make(num_blocks=blocks, max_num_batched_tokens=4096, prefix_cache=prefix_cache)
    ranks = FakeRanks(scheduler)
    for i in range(8):
        scheduler.add(request(f"r{i}", prompt_of(length, 100 * i), max_tokens=MAX_MODEL_LEN))
    plan = step(scheduler, ranks)
    assert plan is not None
    assert plan.counts == [length] * 8
    run_until_idle(scheduler, ranks)
    assert scheduler.preemptions == 0


def test_nothing_is_admitted_past_a_request_that_waits_for_blocks() -> None:
    scheduler = make(num_blocks=16, max_model_len=64)
    ranks = FakeRanks(scheduler)
    first, large, small = request("first", [1] * 20, 4), request("large", [2] * 50, 4), request("small", [3], 4)
    for each in (first, large, small):
        scheduler.add(each)
    step(scheduler, ranks)
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    run_until_idle(scheduler, ranks)
    assert small.sequences[0].first_scheduled_at >= large.sequences[0].first_scheduled_at  # type: ignore[operator]


# -- preemption


def test_when_blocks_run_out_the_youngest_of_the_lowest_priority_is_preempted() -> None:
    scheduler = make(num_blocks=12, max_model_len=32, max_num_seqs=3)
    ranks = FakeRanks(scheduler)
    requests = [
        request("low", [1] * 9, max_tokens=20, priority=1),
        request("old", [2] * 9, max_tokens=20),
        request("young", [3] * 9, max_tokens=20),
    ]
    for each in requests:
        scheduler.add(each)
    while scheduler.preemptions == 0:
        step(scheduler, ranks)
    low, old, young = (each.sequences[0] for each in requests)
    assert low.status is SequenceStatus.WAITING
    assert low.blocks == []
    assert old.status is young.status is SequenceStatus.RUNNING
    while scheduler.preemptions == 1:
        step(scheduler, ranks)
    assert young.status is SequenceStatus.WAITING
    run_until_idle(scheduler, ranks)
    assert old.preemptions == 0
    for each in requests:
        assert_complete(each, 32)


def test_a_preempted_sequence_starts_again_with_all_its_tokens_and_keeps_its_timestamps() -> None:
    clock = Clock()
    scheduler = make(num_blocks=8, max_model_len=32, max_num_seqs=2, prefix_cache=False, clock=clock)
    ranks = FakeRanks(scheduler)
    older, younger = request("older", [1] * 8, max_tokens=20), request("younger", [2] * 8, max_tokens=20)
    scheduler.add(older)
    scheduler.add(younger)
    while scheduler.preemptions == 0:
        clock.now += 1
        step(scheduler, ranks)
    sequence = younger.sequences[0]
    before = sequence.output
    assert len(before) > 0
    assert (sequence.first_scheduled_at, sequence.first_token_at) == (1.0, 1.0)
    while sequence.status is SequenceStatus.WAITING:
        clock.now += 1
        plan = scheduler.schedule()
        assert plan is not None
        starts = plan.starts
        scheduler.commit(plan, ranks.execute(plan))
    assert [(start.token_ids, start.prompt_length) for start in starts] == [([2] * 8 + before, 8)]
    run_until_idle(scheduler, ranks)
    assert (sequence.first_scheduled_at, sequence.first_token_at) == (1.0, 1.0)
    assert_complete(younger, 32)


def test_a_sequence_preempted_in_the_middle_of_its_prompt_computes_nothing_in_that_step() -> None:
    scheduler = make(num_blocks=16, max_num_seqs=2, max_num_batched_tokens=2)
    ranks = FakeRanks(scheduler)
    older, younger = request("older", [1] * 4, max_tokens=40), request("younger", [2] * 40, max_tokens=2)
    scheduler.add(older)
    step(scheduler, ranks)
    step(scheduler, ranks)
    scheduler.add(younger)
    while scheduler.preemptions == 0:
        assert younger.sequences[0].num_output == 0
        plan = step(scheduler, ranks)
    assert plan is not None
    assert plan.slots == [older.sequences[0].slot]
    run_until_idle(scheduler, ranks)
    assert_complete(older, MAX_MODEL_LEN)
    assert_complete(younger, MAX_MODEL_LEN)


def test_preemption_does_not_thrash() -> None:
    scheduler = make(num_blocks=32, max_model_len=64, max_num_seqs=8)
    ranks = FakeRanks(scheduler)
    requests = [request(str(i), [i] * 8, max_tokens=50) for i in range(24)]
    for each in requests:
        scheduler.add(each)
    run_until_idle(scheduler, ranks)
    wanted = sum(len(sequence.tokens) - 1 for each in requests for sequence in each.sequences)
    assert scheduler.preemptions > 0
    assert ranks.computed < 1.5 * wanted


# -- prefix cache


def test_a_repeated_prompt_computes_only_what_is_not_cached_and_at_least_one_token() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    first, second, third = (request(name, prompt_of(16), max_tokens=3) for name in ("a", "b", "c"))
    scheduler.add(first)
    run_until_idle(scheduler, ranks)
    scheduler.add(second)
    plan = step(scheduler, ranks)
    assert plan is not None
    assert (plan.positions, plan.counts, plan.sample_rows) == ([12], [4], [0])
    run_until_idle(scheduler, ranks)
    third.prompt = prompt_of(17)
    scheduler.add(third)
    plan = step(scheduler, ranks)
    assert plan is not None
    assert (plan.positions, plan.counts, plan.num_decodes) == ([16], [1], 1)
    run_until_idle(scheduler, ranks)
    assert (first.cached_tokens, second.cached_tokens, third.cached_tokens) == (0, 12, 16)
    assert scheduler.prefix_hits == 28
    for each in (first, second, third):
        assert_complete(each, MAX_MODEL_LEN)


def test_output_of_one_turn_is_cached_for_the_next() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    first = request("first", prompt_of(6), max_tokens=11)
    scheduler.add(first)
    run_until_idle(scheduler, ranks)
    second = request("second", [*first.sequences[0].tokens, 1, 2], max_tokens=3)
    scheduler.add(second)
    run_until_idle(scheduler, ranks)
    assert second.cached_tokens == 16
    assert_complete(second, MAX_MODEL_LEN)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    scheduler = make(max_num_batched_tokens=64)
    ranks = FakeRanks(scheduler)
    requests = [request(str(i), prompt_of(40), max_tokens=1) for i in range(5)]
    for each in requests:
        scheduler.add(each)
    run_until_idle(scheduler, ranks)
    assert [each.cached_tokens for each in requests] == [0, 36, 36, 36, 36]
    assert ranks.computed == 40 + 4 * 4
    for each in requests:
        assert_complete(each, MAX_MODEL_LEN)


def test_a_request_does_not_wait_for_a_prefix_that_a_lower_priority_is_computing() -> None:
    scheduler = make(max_num_batched_tokens=8)
    ranks = FakeRanks(scheduler)
    low, high = request("low", prompt_of(40), priority=1), request("high", prompt_of(40), priority=0)
    scheduler.add(low)
    step(scheduler, ranks)
    scheduler.add(high)
    step(scheduler, ranks)
    assert high.sequences[0].status is SequenceStatus.RUNNING
    run_until_idle(scheduler, ranks)
    assert high.sequences[0].finished_at < low.sequences[0].finished_at  # type: ignore[operator]
    assert_complete(low, MAX_MODEL_LEN)
    assert_complete(high, MAX_MODEL_LEN)


@pytest.mark.parametrize(("prefix_cache", "salts"), [(True, ("a", "b")), (False, ("", ""))])
def test_other_salts_and_a_cache_that_is_off_share_nothing(prefix_cache: bool, salts: tuple[str, str]) -> None:
    scheduler = make(prefix_cache=prefix_cache)
    ranks = FakeRanks(scheduler)
    for name, salt in zip("ab", salts, strict=True):
        each = request(name, prompt_of(16), cache_salt=salt)
        scheduler.add(each)
        run_until_idle(scheduler, ranks)
        assert each.cached_tokens == 0


# -- n > 1


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_completions_of_one_prompt_compute_it_once_and_share_its_full_blocks(prefix_cache: bool) -> None:
    scheduler = make(prefix_cache=prefix_cache, max_num_batched_tokens=16)
    ranks = FakeRanks(scheduler)
    group = request("group", prompt_of(22), max_tokens=6, n=4)
    scheduler.add(group)
    step(scheduler, ranks)
    assert (scheduler.running, scheduler.waiting) == (1, 3)
    step(scheduler, ranks)
    step(scheduler, ranks)
    assert scheduler.running == 4
    tables = [sequence.blocks for sequence in group.sequences]
    assert all(table[:5] == tables[0][:5] for table in tables)
    assert len({table[5] for table in tables}) == 4
    run_until_idle(scheduler, ranks)
    assert_complete(group, MAX_MODEL_LEN)


def test_without_a_prefix_cache_another_group_of_the_same_prompt_shares_nothing() -> None:
    scheduler = make(prefix_cache=False)
    ranks = FakeRanks(scheduler)
    for name in "ab":
        scheduler.add(request(name, prompt_of(22), n=2))
        run_until_idle(scheduler, ranks)
    assert scheduler.prefix_hits == 2 * 20


def test_siblings_go_on_when_the_first_one_leaves_in_the_middle_of_its_prompt() -> None:
    scheduler = make(max_num_batched_tokens=8)
    ranks = FakeRanks(scheduler)
    group = request("group", prompt_of(30), max_tokens=3, n=3)
    scheduler.add(group)
    step(scheduler, ranks)
    scheduler.finish("group", 0, "gone")
    run_until_idle(scheduler, ranks)
    for index in (1, 2):
        sequence = group.sequences[index]
        assert (sequence.output, sequence.finish_reason) == expected_output(group, index, MAX_MODEL_LEN)


# -- logprobs


@pytest.mark.parametrize("budget", [8, 32])
def test_prompt_logprobs_add_up_over_chunks_and_do_without_cached_blocks(budget: int) -> None:
    scheduler = make(max_num_batched_tokens=budget)
    ranks = FakeRanks(scheduler)
    scheduler.add(request("before", prompt_of(22)))
    run_until_idle(scheduler, ranks)
    asked = request("asked", prompt_of(22), n=2, sampling={"prompt_logprobs": 1, "logprobs": 0})
    scheduler.add(asked)
    run_until_idle(scheduler, ranks)
    assert asked.sequences[0].cached_tokens == 0
    assert asked.sequences[1].cached_tokens == 20
    assert_complete(asked, MAX_MODEL_LEN)


def test_an_update_carries_the_logprobs_of_its_token_if_they_were_asked_for() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    scheduler.add(request("with", [1, 2], sampling={"logprobs": 0}))
    scheduler.add(request("without", [1, 2]))
    plan = scheduler.schedule()
    assert plan is not None
    with_, without = scheduler.commit(plan, ranks.execute(plan))
    assert with_.logprobs is not None
    assert [entry.token_id for entry in with_.logprobs] == with_.token_ids
    assert without.logprobs is None


# -- how a sequence ends


def first_output(prompt: list[int], count: int) -> list[int]:
    return expected_output(request("x", prompt, max_tokens=count), 0, 10**6)[0]


def test_an_end_of_sequence_token_ends_it_and_is_part_of_the_output() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    output = first_output([1, 2, 3], 10)
    one = request("one", [1, 2, 3], max_tokens=10, eos_token_ids=frozenset([output[2]]))
    scheduler.add(one)
    run_until_idle(scheduler, ranks)
    sequence = one.sequences[0]
    assert (sequence.output, sequence.finish_reason, sequence.stop_reason) == (output[:3], "stop", None)


def test_a_stop_token_is_the_stop_reason() -> None:
    scheduler = make()
    output = first_output([1, 2, 3], 10)
    one = request("one", [1, 2, 3], max_tokens=10, stop_token_ids=frozenset([output[2]]))
    scheduler.add(one)
    run_until_idle(scheduler, FakeRanks(scheduler))
    sequence = one.sequences[0]
    assert (sequence.output, sequence.finish_reason, sequence.stop_reason) == (output[:3], "stop", output[2])


def test_a_stop_token_does_not_end_it_before_min_tokens() -> None:
    scheduler = make()
    output = first_output([1, 2, 3], 10)
    assert output[0] not in output[1:]
    # The ranks were not told of the end token, so they do sample it: the scheduler alone decides here.
    one = request("one", [1, 2, 3], 10, stop_token_ids=frozenset([output[0]]), sampling={"min_tokens": 1})
    scheduler.add(one)
    run_until_idle(scheduler, FakeRanks(scheduler))
    assert (one.sequences[0].output, one.sequences[0].finish_reason) == (output, "length")


def test_it_ends_at_max_tokens_or_at_max_model_len_whichever_comes_first() -> None:
    scheduler = make(max_model_len=16)
    few, many = request("few", prompt_of(6), max_tokens=3), request("many", prompt_of(6), max_tokens=300)
    scheduler.add(few)
    scheduler.add(many)
    run_until_idle(scheduler, FakeRanks(scheduler))
    assert [(len(each.sequences[0].tokens), each.sequences[0].finish_reason) for each in (few, many)] == [
        (9, "length"),
        (16, "length"),
    ]


def test_an_external_finish_drops_later_tokens_and_frees_the_slot() -> None:
    scheduler = make(max_num_seqs=2)
    ranks = FakeRanks(scheduler)
    group = request("group", prompt_of(3), max_tokens=9, n=2)
    scheduler.add(group)
    step(scheduler, ranks)
    plan = scheduler.schedule()
    assert plan is not None
    update = scheduler.finish("group", 0, "END")
    assert update is not None
    assert (update.finish_reason, update.stop_reason, update.request_finished) == ("stop", "END", False)
    updates = scheduler.commit(plan, ranks.execute(plan))
    assert [u.sequence.index for u in updates] == [1]
    assert scheduler.running == 1
    assert scheduler.finish("group", 0, "END") is None
    last = scheduler.finish("group", 1, "END")
    assert last is not None
    assert last.request_finished
    assert not scheduler.has_work
    scheduler.check_integrity()


def test_the_last_update_of_a_request_says_that_it_is_finished() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    scheduler.add(request("group", prompt_of(3), max_tokens=1, n=2))
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.commit(plan, ranks.execute(plan))
    assert [(u.finish_reason, u.request_finished) for u in updates] == [("length", False), ("length", True)]


# -- aborts


def test_an_abort_while_waiting_running_or_in_flight_ends_all_of_a_request_and_nothing_else() -> None:
    scheduler = make(max_num_seqs=3)
    ranks = FakeRanks(scheduler)
    kept = request("kept", prompt_of(9), max_tokens=8)
    scheduler.add(kept)
    scheduler.add(request("gone", prompt_of(3, 5), n=3, max_tokens=8))
    step(scheduler, ranks)
    plan = scheduler.schedule()
    assert plan is not None
    updates = scheduler.abort("gone")
    assert [(u.sequence.index, u.finish_reason, u.request_finished) for u in updates] == [
        (0, "abort", False),
        (1, "abort", False),
        (2, "abort", True),
    ]
    scheduler.check_integrity()
    assert [u.request.id for u in scheduler.commit(plan, ranks.execute(plan))] == ["kept"]
    assert scheduler.abort("gone") == scheduler.abort("never there") == []
    run_until_idle(scheduler, ranks)
    assert_complete(kept, MAX_MODEL_LEN)


def test_a_slot_and_blocks_freed_in_flight_serve_the_next_request() -> None:
    scheduler = make(max_num_seqs=1, num_blocks=16)
    ranks = FakeRanks(scheduler)
    scheduler.add(request("gone", prompt_of(50)))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.abort("gone")
    scheduler.commit(plan, ranks.execute(plan))
    following = request("next", prompt_of(50))
    scheduler.add(following)
    run_until_idle(scheduler, ranks)
    assert following.cached_tokens == 0, "what was not committed must not be matched"
    assert_complete(following, MAX_MODEL_LEN)


# -- refusals


def test_a_full_queue_refuses_one_more_request_and_names_max_queue() -> None:
    scheduler = make(max_num_seqs=2, max_queue=2)
    ranks = FakeRanks(scheduler)
    scheduler.add(request("a", [1], n=2))
    scheduler.add(request("b", [1]))
    with pytest.raises(CapacityExceeded, match="max_queue=2"):
        scheduler.add(request("c", [1]))
    step(scheduler, ranks)
    scheduler.add(request("c", [1]))
    scheduler.abort("b")
    scheduler.add(request("d", [1]))
    run_until_idle(scheduler, ranks)


def test_more_completions_than_max_num_seqs_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"n=9 .*\[1, 8\].*max_num_seqs=8"):
        make().add(request("a", [1], n=9))


@pytest.mark.parametrize("length", [0, 64, 65])
def test_a_prompt_that_is_empty_or_leaves_no_room_for_a_token_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"prompt has {length} tokens; it must have 1 to 63.*max_model_len=64"):
        make().add(request("a", [1] * length))


def test_an_id_in_use_is_refused_and_the_request_that_has_it_goes_on() -> None:
    scheduler = make()
    first = request("a", [1, 2])
    scheduler.add(first)
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        scheduler.add(request("a", [3]))
    run_until_idle(scheduler, FakeRanks(scheduler))
    assert_complete(first, MAX_MODEL_LEN)


def test_a_pool_too_small_for_one_sequence_is_refused_and_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"15 blocks of 4 = 60 tokens.*max_model_len=64.*kv_memory.*at most 60"):
        make(num_blocks=15)


def test_three_plans_in_flight_or_a_commit_out_of_order_are_internal_errors() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    scheduler.add(request("a", [1, 2]))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert not scheduler.can_run_ahead
    with pytest.raises(IntegrityError, match="step 1 must be committed"):
        scheduler.schedule()
    results = ranks.execute(first), ranks.execute(second)
    with pytest.raises(IntegrityError, match="step 2 was committed, but it is not the oldest"):
        scheduler.commit(second, results[1])
    scheduler.commit(first, results[0])
    with pytest.raises(IntegrityError, match="not the oldest"):
        scheduler.commit(first, results[0])
    scheduler.commit(second, results[1])


def test_a_step_ahead_computes_the_token_that_is_expected_and_tells_it_one_step_later() -> None:
    scheduler = make()
    ranks = FakeRanks(scheduler)
    a = request("a", [1, 2], max_tokens=3)
    scheduler.add(a)
    first = scheduler.schedule()
    assert first is not None
    first_result = ranks.execute(first)
    second = scheduler.schedule()
    assert second is not None
    assert (second.positions, second.counts, second.sample_rows, second.token_ids) == ([2], [1], [0], [])
    second_result = ranks.execute(second)
    scheduler.commit(first, first_result)
    third = scheduler.schedule()
    assert third is not None
    assert (third.positions, third.token_ids) == ([3], first_result.token_ids)
    third_result = ranks.execute(third)
    scheduler.commit(second, second_result)
    assert scheduler.schedule() is None  # the token that is expected is the last one
    scheduler.commit(third, third_result)
    assert_complete(a, MAX_MODEL_LEN)
    assert not scheduler.has_work


def test_what_a_step_in_flight_brings_to_a_preempted_sequence_is_dropped_and_sampled_again() -> None:
    scheduler = make(num_blocks=16, block_size=4, max_model_len=64, prefix_cache=False)
    ranks = FakeRanks(scheduler)
    old, young = request("old", [1] * 20, max_tokens=20), request("young", [2] * 19, max_tokens=20)
    scheduler.add(old)
    scheduler.add(young)
    flying = []
    while scheduler.has_work or flying:
        plan = scheduler.schedule() if scheduler.can_run_ahead else None
        scheduler.check_integrity()
        if plan is not None:
            flying.append((plan, ranks.execute(plan)))
        if plan is None or len(flying) == 2:
            scheduler.commit(*flying.pop(0))
            scheduler.check_integrity()
    assert scheduler.preemptions > 0
    for each in (old, young):
        assert_complete(each, 64)


# -- what callers read


def test_timestamps_come_from_the_clock_that_was_given() -> None:
    clock = Clock()
    scheduler = make(max_num_batched_tokens=8, clock=clock)
    ranks = FakeRanks(scheduler)
    one = request("one", prompt_of(10), max_tokens=3)
    clock.now = 1.0
    scheduler.add(one)
    for now in (2.0, 3.0, 4.0, 5.0):
        clock.now = now
        step(scheduler, ranks)
    sequence = one.sequences[0]
    assert one.arrived_at == 1.0
    assert (sequence.first_scheduled_at, sequence.first_token_at) == (2.0, 3.0)
    assert (sequence.last_token_at, sequence.finished_at) == (5.0, 5.0)


def test_counters_tell_what_runs_waits_and_is_free() -> None:
    scheduler = make(max_num_seqs=2)
    ranks = FakeRanks(scheduler)
    for i in range(3):
        scheduler.add(request(str(i), [i] * 5))
    step(scheduler, ranks)
    assert (scheduler.running, scheduler.waiting, scheduler.steps) == (2, 1, 1)
    assert (scheduler.free_blocks, scheduler.total_blocks) == (60, 64)


def test_ten_thousand_short_requests_with_aborts_leak_nothing() -> None:
    scheduler = make(num_blocks=40, max_num_seqs=8, max_queue=50)
    ranks = FakeRanks(scheduler)
    sent = aborted = 0
    while sent < 10_000 or scheduler.has_work:
        while sent < 10_000 and scheduler.waiting < 20:
            scheduler.add(request(str(sent), [sent % 7, sent % 3, 1, 2, sent % 5], max_tokens=1 + sent % 4))
            sent += 1
        plan = scheduler.schedule()
        assert plan is not None
        if scheduler.steps % 4 == 0:
            aborted += len(scheduler.abort(str(sent - 1 - scheduler.steps % 23)))
        scheduler.commit(plan, ranks.execute(plan))
    assert aborted > 500
    scheduler.check_integrity()
    assert scheduler.free_blocks == scheduler.total_blocks
