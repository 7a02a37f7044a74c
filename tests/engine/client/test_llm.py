"""LLM and AsyncLLM: answers, streams, early ends, failures; and that nothing changes a request's tokens."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from phalanx import LLM, AsyncLLM, EngineFault, EngineStopped, InvalidRequest, SamplingParams, Timeout
from phalanx.engine.client import llm as llm_module
from phalanx.engine.client.client import RequestHandle
from phalanx.engine.client.requests import OutputBuilder, RequestOutput
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.protocol.messages import Accepted, Delta, Event, Finished, Submit
from phalanx.engine.scheduling.step_plan import StepPlan
from phalanx.parallel.topology.placement import place
from phalanx.parallel.topology.topology import read_topology
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG

PATIENCE_S = 60
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=500, temperature=0, ignore_eos=True)


def _prompts(count: int, longest: int = 150) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(3, 1031) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def _tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def _wait_until_idle(llm: LLM) -> None:
    """An abort is a message: what it ends, ends soon. A test that fails here would wait for a whole answer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        status = llm.status()
        if (status.running, status.waiting) == (0, 0):
            break
        assert time.monotonic() < deadline, f"{status.running} still run"
    assert status.free_blocks == status.total_blocks


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# ---- answers


def test_generate_answers_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = _prompts(12)
    outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert _tokens(outputs) == [_tokens(llm.generate(prompt, GREEDY))[0] for prompt in prompts]


def test_a_caller_that_waits_for_answers_is_woken_once_for_each(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[Event | None] = []

    def counted(events: queue.SimpleQueue[Event], wait: bool) -> Event | None:
        woken.append(next_event(events, wait))
        return woken[-1]

    next_event = llm_module._next_event
    monkeypatch.setattr(llm_module, "_next_event", counted)
    outputs = llm.generate(_prompts(3), GREEDY)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [24, 24, 24]
    assert [type(event) for event in woken] == [Finished] * 3


def test_a_piece_that_cannot_be_taken_in_fails_the_call_that_waits_for_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = OutputBuilder.add

    def broken(builder: OutputBuilder, event: Event) -> RequestOutput | None:
        if isinstance(event, Delta):
            raise IndexError("no such completion")
        return add(builder, event)

    with monkeypatch.context() as patched:
        patched.setattr(OutputBuilder, "add", broken)
        with pytest.raises(EngineFault, match="no such completion"):
            llm.generate(_prompts(3), ENDLESS)
    _wait_until_idle(llm)
    assert llm.generate([5, 6], GREEDY)[0].usage.completion_tokens == 24


def test_one_prompt_of_text_and_its_token_ids_are_the_same_request(llm: LLM) -> None:
    text = llm.generate("Hello", GREEDY)[0]
    assert _tokens(llm.generate(text.prompt_token_ids, GREEDY)) == _tokens([text])
    assert llm.generate([], GREEDY) == []


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    lengths = [1, 5, 9]
    each = [msgspec.structs.replace(GREEDY, max_tokens=length) for length in lengths]
    outputs = llm.generate(_prompts(3), each)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    with pytest.raises(InvalidRequest, match="2 sampling parameters were given for 3 prompts"):
        llm.generate(_prompts(3), each[:2])


@pytest.mark.parametrize("prompts", [3, [3.5], [[5], None]])
def test_what_is_no_prompt_is_refused_by_its_value(llm: LLM, prompts: Any) -> None:
    with pytest.raises((InvalidRequest, TypeError)):
        llm.generate(prompts, GREEDY)


def test_a_refused_prompt_aborts_the_others_of_its_call(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([[5], [6], [99999], [7]], ENDLESS)
    _wait_until_idle(llm)


def test_greedy_completions_of_one_prompt_are_equal_and_seeded_ones_differ(llm: LLM) -> None:
    greedy = llm.generate([[5, 6, 7]], msgspec.structs.replace(GREEDY, n=4))[0].outputs
    assert [completion.index for completion in greedy] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in greedy}) == 1
    drawn = SamplingParams(n=4, seed=1, temperature=2.0, max_tokens=24, ignore_eos=True)
    sampled = llm.generate([[5, 6, 7]], drawn)[0].outputs
    assert len({tuple(completion.token_ids) for completion in sampled}) == 4
    assert _tokens(llm.generate([[5, 6, 7]], drawn))[0] == [completion.token_ids for completion in sampled]


def test_requests_without_a_seed_are_drawn_anew_each_time(llm: LLM) -> None:
    drawn = SamplingParams(temperature=2.0, max_tokens=24, ignore_eos=True)
    assert len({tuple(llm.generate([[5]], drawn)[0].outputs[0].token_ids) for _ in range(3)}) == 3


# ---- streams


def test_a_stream_brings_the_answer_piece_by_piece_and_ends_with_finished(llm: LLM) -> None:
    whole = llm.generate("abc", GREEDY)[0].outputs[0]
    *deltas, last = llm.stream("abc", sampling=GREEDY)
    assert isinstance(last, Finished)
    assert all(isinstance(event, Delta) for event in deltas)
    assert [token for event in deltas if isinstance(event, Delta) for token in event.token_ids] == whole.token_ids
    assert "".join(event.text for event in deltas if isinstance(event, Delta)) == whole.text
    assert len(deltas) > 1


@pytest.mark.parametrize("events", [0, 1, 3])
def test_closing_a_stream_early_aborts_the_request(llm: LLM, events: int) -> None:
    stream = llm.stream("abc", sampling=ENDLESS)
    for _ in range(events):
        next(stream)
    stream.close()
    assert list(stream) == []
    _wait_until_idle(llm)


def test_dropping_a_stream_aborts_the_request(llm: LLM) -> None:
    for _event in llm.stream("abc", sampling=ENDLESS):
        break
    _wait_until_idle(llm)


def test_an_aborted_request_ends_with_finished_and_reason_abort(llm: LLM) -> None:
    handle = llm.submit(Submit(id="to abort", token_ids=[5, 6], sampling=ENDLESS))
    assert isinstance(handle, RequestHandle)
    next(handle)
    llm.abort("to abort")
    *_, last = handle
    assert isinstance(last, Finished)
    assert [completion.finish_reason for completion in last.completions] == ["abort"]
    llm.abort("never heard of")


def test_the_garbage_collector_drops_a_stream_wherever_a_thread_is(llm: LLM) -> None:
    handle = llm.stream("abc", sampling=ENDLESS)
    next(handle)

    def collect() -> None:
        nonlocal handle
        with llm.client._lock:  # as when it runs within a line of the client's own
            del handle

    _in_thread(collect).join(PATIENCE_S)
    assert not llm.client._lock.locked()
    _wait_until_idle(llm)


def test_more_prompts_than_the_queue_holds_are_all_answered(llm: LLM, tiny: Path) -> None:
    prompts = _prompts(24, 20)
    with LLM(str(tiny), **{**CONFIG, "max_num_seqs": 2, "max_queue": 3}) as small:
        assert _tokens(small.generate(prompts, GREEDY)) == _tokens(llm.generate(prompts, GREEDY))
        blocker = small.submit(Submit(id="other's", token_ids=[5], sampling=ENDLESS), lambda event: None)
        assert blocker is None
        assert _tokens(small.generate(prompts[:9], GREEDY)) == _tokens(llm.generate(prompts[:9], GREEDY))


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_receiver_that_raises_loses_its_own_request_alone(llm: LLM, error: type[BaseException]) -> None:
    alone = _tokens(llm.generate([[5, 6]], GREEDY))
    called = threading.Event()

    def receiver(event: Any) -> None:
        called.set()
        raise error("the receiver's own fault")

    llm.submit(Submit(id="badly received", token_ids=[7], sampling=ENDLESS), receiver)
    assert _tokens(llm.generate([[5, 6]], GREEDY)) == alone
    assert called.wait(PATIENCE_S)
    _wait_until_idle(llm)


# ---- asyncio


def test_many_asynchronous_requests_are_answered_as_one_batch(llm: LLM) -> None:
    prompts = _prompts(40, 40)
    expected = _tokens(llm.generate(prompts, GREEDY))
    face = AsyncLLM.from_llm(llm)

    async def everything() -> list[RequestOutput]:
        return await asyncio.gather(*(face.generate(prompt, GREEDY) for prompt in prompts))

    assert _tokens(asyncio.run(everything())) == expected


def test_leaving_an_asynchronous_stream_aborts_the_request(llm: LLM) -> None:
    async def leave() -> None:
        stream = AsyncLLM.from_llm(llm).stream("abc", sampling=ENDLESS)
        async for _event in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    _wait_until_idle(llm)


def test_cancelling_a_task_aborts_its_request_and_no_other(llm: LLM) -> None:
    expected = _tokens(llm.generate([[5, 6]], GREEDY))
    face = AsyncLLM.from_llm(llm)

    async def cancel() -> RequestOutput:
        endless = [asyncio.create_task(face.generate([9, number], sampling=ENDLESS)) for number in range(3, 6)]
        other = asyncio.create_task(face.generate([5, 6], sampling=GREEDY))
        await asyncio.sleep(0)
        while (await face.status()).running == 0:
            assert not all(task.done() for task in endless)
        for task in endless:
            task.cancel()
        results = await asyncio.gather(*endless, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return await other

    assert _tokens([asyncio.run(cancel())]) == expected
    _wait_until_idle(llm)


def test_an_event_loop_that_ends_mid_request_leaves_the_engine_whole(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    async def begin() -> Any:
        stream = AsyncLLM.from_llm(llm).stream("abc", sampling=ENDLESS)
        await stream.__anext__()
        return stream

    loop = asyncio.new_event_loop()
    abandoned = loop.run_until_complete(begin())
    loop.close()
    _wait_until_idle(llm)
    assert len(_tokens(llm.generate([[5]], GREEDY))[0][0]) == 24
    assert caplog.text == ""
    del abandoned


def test_an_asynchronous_request_that_is_refused_raises(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        asyncio.run(AsyncLLM.from_llm(llm).generate(""))


# ---- the end of an engine


def test_a_closed_engine_refuses_everything_and_closing_twice_is_harmless(tiny: Path) -> None:
    with LLM(str(tiny), **CONFIG) as llm:
        handle = llm.submit(Submit(id="under way", token_ids=[5], sampling=ENDLESS))
        assert handle is not None
        next(handle)
    events = list(handle)
    assert isinstance(events[-1], Finished)
    assert events[-1].completions[0].finish_reason == "abort"
    llm.close()
    for call in (lambda: llm.generate("abc"), llm.status, lambda: llm.stream("abc")):
        with pytest.raises(EngineStopped, match="closed"):
            call()


def _break_steps_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    execute = Worker.launch
    count = 0

    def broken(self: Worker, plan: StepPlan) -> Any:
        nonlocal count
        count += 1
        if count > steps:
            raise RuntimeError("a card fell out")
        return execute(self, plan)

    monkeypatch.setattr(Worker, "launch", broken)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_failing_step_fails_every_request_with_the_rank_and_the_reason(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    with LLM(str(tiny), **CONFIG) as llm:
        _break_steps_after(monkeypatch, steps)
        failures: list[EngineStopped] = []

        def ask(prompts: list[list[int]]) -> None:
            try:
                llm.generate(prompts, ENDLESS)
            except EngineStopped as error:
                failures.append(error)

        threads = [_in_thread(lambda: ask(_prompts(20))) for _ in range(8)]
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        assert len(failures) == 8
        for error in failures:
            assert "rank 0 failed: RuntimeError: a card fell out" in str(error)
        for call in (lambda: llm.generate("abc"), llm.status):
            with pytest.raises(EngineStopped, match="rank 0 failed: RuntimeError: a card fell out"):
                call()


@pytest.mark.parametrize("method", ["process", "update"])
def test_a_defect_in_another_thread_leaves_no_request_waiting(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    from phalanx.engine.coordinator.input_processor import InputProcessor
    from phalanx.engine.coordinator.output_processor import OutputProcessor

    def broken(*args: Any) -> None:
        raise RuntimeError("a defect")

    with LLM(str(tiny), **CONFIG) as llm:
        monkeypatch.setattr(InputProcessor if method == "process" else OutputProcessor, method, broken)
        with pytest.raises((EngineFault, InvalidRequest), match="a defect"):
            llm.generate("abc", ENDLESS)


def test_a_status_that_does_not_come_in_time_is_a_timeout_and_not_the_next_answer(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(tiny), **CONFIG) as llm:
        begun, go_on = threading.Event(), threading.Event()
        execute = Worker.launch

        def slow(self: Worker, plan: StepPlan) -> Any:
            begun.set()
            go_on.wait(PATIENCE_S)
            return execute(self, plan)

        monkeypatch.setattr(Worker, "launch", slow)
        handle = llm.stream([5], sampling=msgspec.structs.replace(GREEDY, max_tokens=1))
        assert begun.wait(PATIENCE_S)
        with pytest.raises(Timeout, match="no status within"):
            llm.status(timeout_s=0.05)
        go_on.set()
        list(handle)
        assert llm.status().running == 0


# ---- nothing changes a request's tokens


SEEDED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.9, seed=11, ignore_eos=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix_cache": False},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 2048},
        {"max_num_seqs": 1},
        {"block_size": 4},
        {"block_size": 4, "max_model_len": 256, "kv_memory": 66 * 2048},
    ],
    ids=str,
)
def test_no_setting_of_the_engine_changes_a_token(llm: LLM, tiny: Path, changes: dict[str, Any]) -> None:
    prompts = [[5] * 40 + prompt for prompt in _prompts(10)]
    sampling = [GREEDY, SEEDED] * 5
    expected = [_tokens(llm.generate([prompt], params)) for prompt, params in zip(prompts, sampling, strict=True)]
    with LLM(str(tiny), **{**CONFIG, **changes}) as other:
        for _ in range(2):
            outputs = other.generate(prompts, sampling)
            assert [_tokens([output]) for output in outputs] == expected
        status = other.status()
        if "kv_memory" in changes:
            assert status.preemptions > 0
        if "prefix_cache" not in changes:
            assert status.prefix_hits > 0
        assert status.free_blocks == status.total_blocks


def test_log_probabilities_are_the_same_however_the_prompt_is_cut(llm: LLM, tiny: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    prompts = _prompts(6)
    with LLM(str(tiny), **{**CONFIG, "max_num_batched_tokens": 8, "prefix_cache": False}) as cut:
        for one, other in zip(llm.generate(prompts, params), cut.generate(prompts, params), strict=True):
            ours = [*(one.prompt_logprobs or []), *(one.outputs[0].logprobs or [])]
            theirs = [*(other.prompt_logprobs or []), *(other.outputs[0].logprobs or [])]
            assert len(ours) == len(one.prompt_token_ids) - 1 + 8
            for a, b in zip(ours, theirs, strict=True):
                assert (a.token_id, a.rank, a.top_token_ids) == (b.token_id, b.rank, b.top_token_ids)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


def test_processed_log_probabilities_follow_the_temperature_and_raw_ones_do_not(llm: LLM) -> None:
    def chosen(mode: str, temperature: float) -> Any:
        params = SamplingParams(max_tokens=1, seed=3, temperature=temperature, logprobs=5, logprobs_mode=mode)
        return (llm.generate([[5, 6, 7]], params)[0].outputs[0].logprobs or [])[0]

    raw_cool, raw_hot, hot = chosen("raw", 0.5), chosen("raw", 4.0), chosen("processed", 4.0)
    assert raw_cool.top_logprobs == pytest.approx(raw_hot.top_logprobs, abs=1e-5)
    raw, processed = raw_hot.top_logprobs, hot.top_logprobs
    assert (raw[0] - raw[4]) / 4 == pytest.approx(processed[0] - processed[4], abs=1e-4)


def test_a_repeated_prompt_comes_from_the_prefix_cache_unless_the_salt_differs(llm: LLM) -> None:
    prompt = [7] * 100

    def cached(salt: str, **fields: Any) -> int:
        params = msgspec.structs.replace(GREEDY, max_tokens=2, **fields)
        handle = llm.submit(Submit(id=f"{salt}{fields}", token_ids=prompt, sampling=params, cache_salt=salt))
        assert handle is not None
        *_, last = handle
        assert isinstance(last, Finished)
        return last.usage.cached_tokens

    assert [cached("mine"), cached("mine", seed=1), cached("yours")] == [0, 96, 0]


# ---- on somebody else's process group


@pytest.fixture(scope="module")
def in_group(run_ranks: Callable[..., list[Any]], tiny: Path) -> list[dict[str, Any]]:
    return run_ranks(2, programs.live_in_a_group, str(tiny), {**CONFIG, "bind_cpus": "always"})


def test_all_ranks_of_a_group_get_the_same_answers_as_one_rank_alone(in_group: list[dict[str, Any]], llm: LLM) -> None:
    expected = _tokens(llm.generate([[5, 6, 7], [8]], GREEDY))
    for answers in in_group:
        assert _tokens(answers["outputs"]) == expected
        assert answers["outputs"] == in_group[0]["outputs"]
        assert answers["chat"] == in_group[0]["chat"]


def test_an_error_is_raised_on_every_rank_of_a_group_and_the_next_call_works(in_group: list[dict[str, Any]]) -> None:
    for answers in in_group:
        assert answers["refused"][0] == "InvalidRequest"
        assert "vocabulary" in answers["refused"][1]
        assert answers["mistyped"][0] == "InvalidRequest"
        assert _tokens(answers["again"]) == _tokens(answers["outputs"])


def test_an_engine_in_a_group_leaves_the_process_as_it_was(in_group: list[dict[str, Any]]) -> None:
    for rank, answers in enumerate(in_group):
        assert answers["before"] == answers["after"]
        # Only the kernels' threads were bound, to CPUs of this rank's own.
        placement = place(read_topology(os.sched_getaffinity(0)), rank, 2)
        assert answers["binding"] == str(placement)


def test_the_callers_own_collectives_work_between_calls_and_after(in_group: list[dict[str, Any]]) -> None:
    for answers in in_group:
        assert answers["sums"] == [3.0, 3.0, 3.0]


def test_a_closed_engine_in_a_group_refuses_on_every_rank(in_group: list[dict[str, Any]]) -> None:
    for answers in in_group:
        assert answers["closed"] == ("EngineStopped", "the engine was closed")


def test_a_failing_step_stops_the_engine_of_a_group_without_a_hang(
    run_ranks: Callable[..., list[Any]], tiny: Path
) -> None:
    alone = run_ranks(1, programs.fail_in_a_group, str(tiny), CONFIG)[0]
    assert alone == [("EngineStopped", "rank 0 failed: RuntimeError: a card fell out")] * 2
    for rank, (first, second) in enumerate(run_ranks(2, programs.fail_in_a_group, str(tiny), CONFIG)):
        assert first == ("EngineStopped", f"rank {rank} failed: RuntimeError: a card fell out")
        assert second == first


def test_a_checkpoint_that_is_computed_with_in_another_dtype_says_so(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    words = "the checkpoint is in float16, but computed with in bfloat16, as dtype=auto has it on this device"
    with LLM(str(folder), max_model_len=64) as llm:
        assert any(line.startswith(words) for line in llm.status().report)
    with LLM(str(folder), max_model_len=64, dtype="float32") as llm:
        assert not any("the checkpoint is in" in line for line in llm.status().report)


# ---- what is told of a request and of the engine


def test_a_step_that_hangs_is_told_by_a_status_that_does_not(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    launch: Callable[..., Any] = Worker.launch
    waited: list[float] = []

    def slow(self: Worker, plan: StepPlan) -> Any:
        began = time.monotonic()
        assert go_on.wait(PATIENCE_S)
        waited.append(time.monotonic() - began)
        return launch(self, plan)

    with LLM(str(tiny), **CONFIG) as llm:
        assert llm.status().stalled_s == 0.0
        monkeypatch.setattr(Worker, "launch", slow)
        handle = llm.stream([5, 6, 7], sampling=msgspec.structs.replace(GREEDY, max_tokens=2))
        deadline = time.monotonic() + PATIENCE_S
        while llm.status(PATIENCE_S).stalled_s < 0.3:
            assert time.monotonic() < deadline
        go_on.set()
        assert isinstance(list(handle)[-1], Finished)
        status = llm.status()
        assert (status.stalled_s, status.prompt_tokens, status.generation_tokens) == (0.0, 3, 2)
        assert (status.prefix_queries, status.waiting_tokens) == (3, 0)
        assert status.phase_seconds["launch"] >= sum(waited) > 0.1  # the loop stood still before the launch, too


def test_log_probabilities_bear_bytes_and_the_prompts_tokens_come_back_only_if_asked_for(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    output = llm.generate(["abc"], sampling)[0]
    assert output.prompt_logprobs is not None
    assert [entry.token_bytes for entry in output.prompt_logprobs] == [b"b", b"c"]
    assert [len(entry.top_bytes) for entry in output.outputs[0].logprobs or []] == [2] * 4

    handle = llm.submit(Submit(id="silent", token_ids=[5, 6], sampling=sampling))
    assert handle is not None
    last = list(handle)[-1]
    assert isinstance(last, Finished)
    assert last.prompt_token_ids is None


def test_a_receiver_hears_first_that_its_request_was_accepted(llm: LLM) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, seed=-4)
    llm.submit(Submit(id="heard", token_ids=[5, 6], sampling=sampling), events.put)
    first = events.get(timeout=PATIENCE_S)
    assert first == Accepted(id="heard", prompt_tokens=2, seed=-4, max_tokens=3)
    positions = []
    while not isinstance(event := events.get(timeout=PATIENCE_S), Finished):
        assert isinstance(event, Delta)
        positions.append((event.position, len(event.token_ids)))
    assert [place for place, _ in positions] == [sum(n for _, n in positions[:i]) for i in range(len(positions))]
