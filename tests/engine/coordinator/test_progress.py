"""What the step loop tells of itself, also when it hangs."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import msgspec
from phalanx.engine.coordinator.progress import Progress, StatusAnswers
from phalanx.engine.protocol.messages import Event, ModelInfo, Status
from phalanx.engine.scheduling.request import Request
from phalanx.engine.scheduling.scheduler import Scheduler
from phalanx.engine.scheduling.step_plan import SlotSampling, StepResult

PATIENCE_S = 20.0
INFO = ModelInfo(
    version="1", model="m", dtype="float32", ranks=2, max_model_len=64, max_num_seqs=2, block_size=4, total_blocks=32,
    vocab_size=100, eos_token_ids=[7], tokenizer_class=None, chat_template=None, prefix_cache=True, report=["a line"],
)  # fmt: skip


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _scheduler() -> Scheduler:
    return Scheduler(
        num_blocks=32, block_size=4, max_num_seqs=2, max_num_batched_tokens=8, max_model_len=64, max_queue=9,
        prefix_cache=True,
    )  # fmt: skip


def _request(request_id: str, prompt: list[int]) -> Request:
    return Request(id=request_id, prompt=prompt, samplings=[SlotSampling()], max_tokens=2)


def _run(scheduler: Scheduler, progress: Progress) -> None:
    while (plan := scheduler.schedule()) is not None:
        progress.planned(plan)
        rows = len(plan.sample_rows)
        progress.committed(scheduler.commit(plan, StepResult([5] * rows, [None] * rows, {})))
    progress.went_on()


def test_the_tokens_of_prompts_answers_and_cached_beginnings_are_counted() -> None:
    scheduler = _scheduler()
    progress = Progress(scheduler, INFO, [1, 2])
    for request_id in ("a", "b"):
        scheduler.add(_request(request_id, list(range(20, 33))))
        assert scheduler.waiting_tokens == 13
        _run(scheduler, progress)
    status = progress.status()
    assert (status.prefix_queries, status.prefix_hits) == (26, 12)
    assert (status.prompt_tokens, status.generation_tokens, status.waiting_tokens) == (13 + 1, 4, 0)
    assert (status.ready, status.ranks, status.peak_memory, status.report) == (True, 2, [1, 2], ["a line"])


def test_the_prompt_tokens_of_requests_that_wait_are_counted_until_they_start_or_end() -> None:
    scheduler = _scheduler()
    for number in range(4):
        scheduler.add(_request(str(number), [1] * (number + 1)))
    assert scheduler.waiting_tokens == 10
    scheduler.abort("3")
    assert scheduler.waiting_tokens == 6
    assert scheduler.schedule() is not None
    assert scheduler.waiting_tokens == 3


def test_the_ranks_waits_are_read_only_for_who_asks() -> None:
    reads: list[list[float]] = []

    def waits() -> list[float]:
        reads.append([0.5, 1.5])
        return reads[-1]

    progress = Progress(_scheduler(), INFO, [0], rank_waits=waits)
    progress.went_on()
    assert reads == []
    assert progress.status().rank_wait_seconds == progress.answer().rank_wait_seconds == [0.5, 1.5]


def test_a_step_loop_with_work_that_does_not_go_on_is_stalled_and_one_that_rests_is_not() -> None:
    clock = _Clock()
    progress = Progress(_scheduler(), INFO, [0], clock)
    clock.now += 50
    assert progress.status().stalled_s == 0.0  # it has not begun
    with progress.resting():
        clock.now += 50
        assert progress.status().stalled_s == 0.0
    clock.now += 3
    assert progress.status().stalled_s == 3.0
    progress.phase("wait")
    clock.now += 4
    assert progress.status().stalled_s == 7.0
    progress.phase("commit")
    clock.now += 1
    progress.phase(None)
    clock.now += 20  # between two steps
    progress.went_on()
    assert progress.status().stalled_s == 0.0
    assert progress.status().phase_seconds == {"schedule": 0.0, "launch": 0.0, "wait": 4.0, "commit": 1.0}
    for failed in (False, True):
        progress.ended(failed)
        clock.now += 9
        assert (progress.status().ready, progress.status().stalled_s) == (not failed, 0.0)


class _Loop:
    """Runs what it is asked to only when told."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], Any]] = []

    def call_soon(self, action: Callable[..., Any], *args: Any) -> None:
        self.asked.append(lambda: action(*args))

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(name)


def test_a_question_for_the_status_is_answered_once_by_the_loop_or_without_it() -> None:
    sent: queue.SimpleQueue[tuple[bytes, Event]] = queue.SimpleQueue()
    loop = _Loop()
    answers = StatusAnswers(Progress(_scheduler(), INFO, [0]), lambda *event: sent.put(event), loop)
    answers.ask(b"a")
    loop.asked.pop()()
    client, status = sent.get(timeout=PATIENCE_S)
    assert (client, isinstance(status, Status)) == (b"a", True)

    # A loop that hangs.
    answers.ask(b"b")
    answers.ask(b"c")
    assert [sent.get(timeout=PATIENCE_S)[0] for _ in range(2)] == [b"b", b"c"]
    for action in loop.asked:
        action()
    assert sent.empty()


def test_a_status_and_the_model_information_cross_the_wire() -> None:
    status = Progress(_scheduler(), INFO, [0]).status()
    for event in (status, INFO):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Event) == event
