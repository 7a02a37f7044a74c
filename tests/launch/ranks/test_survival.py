"""A group whose ranks are killed or stopped: every request ends as if nothing had happened, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from phalanx import LLM, AsyncLLM, EngineFault, EngineStopped, SamplingParams
from phalanx.engine.client.requests import OutputBuilder, RequestOutput
from phalanx.engine.protocol.messages import Delta, Event, Submit
from phalanx.tests.launch.programs import rank_processes
from phalanx.tests.left_behind import nothing_left_behind

PATIENCE_S = 120.0
MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "frequency_penalty": 0.8, "presence_penalty": 0.5},
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.8, "seed": 12, "n": 2, "logprobs": 2},
    {"temperature": 0, "stop": [" the", "\n\n"], "min_tokens": 20},
    {"temperature": 0, "prompt_logprobs": 0, "n": 2},
)
PROMPT = "Once upon a time, in a village by the sea,"


class _Running:
    """Requests under way, each with what has come of it."""

    def __init__(self, llm: LLM, tokens: int) -> None:
        self.samplings = [
            SamplingParams.from_dict({"max_tokens": tokens, "ignore_eos": True, **each}) for each in MIXED
        ]
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.ids = [llm.client.new_id() for _ in self.samplings]
        for name, sampling in zip(self.ids, self.samplings, strict=True):
            llm.client.submit(Submit(id=name, prompt=PROMPT, sampling=sampling), self.events.put, quick=True)
        self.builders = {
            name: OutputBuilder(sampling.n) for name, sampling in zip(self.ids, self.samplings, strict=True)
        }
        self.outputs: dict[str, RequestOutput] = {}
        self.tokens = 0

    def take_until(self, tokens: int) -> None:
        """Take events until so many tokens have come, or all requests have ended. Raises if one of them fails."""
        while self.tokens < tokens and len(self.outputs) < len(self.ids):
            event = self.events.get(timeout=PATIENCE_S)
            if isinstance(event, Delta):
                self.tokens += len(event.token_ids)
            output = self.builders[event.id].add(event)  # type: ignore[union-attr]
            if output is not None:
                self.outputs[output.id] = output

    def results(self) -> list[Any]:
        """What came of each, once all have ended; log-probabilities rounded."""
        self.take_until(10**9)
        return [_comparable(self.outputs[name]) for name in self.ids]


def _comparable(output: RequestOutput) -> Any:
    each = [
        (one.text, one.token_ids, one.finish_reason, one.stop_reason, len(one.logprobs or [])) for one in output.outputs
    ]
    usage = output.usage
    return each, usage.prompt_tokens, usage.completion_tokens, len(output.prompt_logprobs or [])


@contextlib.contextmanager
def _group(model: Path, **config: Any) -> Iterator[LLM]:
    """A group of two ranks; nothing of it may be left afterwards: no process, shared memory, socket or folder."""
    others = set(psutil.Process().children(recursive=True))
    with nothing_left_behind():
        with LLM(str(model), ranks=2, dtype="float32", max_model_len=512, **config) as llm:
            yield llm
            supervised = set(psutil.Process().children(recursive=True)) - others
        assert psutil.wait_procs(list(supervised), timeout=5)[1] == []


def test_nothing_is_lost_when_the_coordinator_is_killed(smollm2: Path) -> None:
    with _group(smollm2) as llm:
        expected = _Running(llm, 24).results()
        running = _Running(llm, 24)
        running.take_until(40)
        rank_processes()[0].kill()
        assert running.results() == expected
        status = llm.status()
        assert (status.running, status.waiting) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "quantization"), [("keep", "none"), ("keep", "int4"), ("read", "none")])
def test_ranks_after_others_map_the_weights_that_those_have_left(
    smollm2: Path, weights: str, quantization: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def kept() -> list[int]:
        """Sizes of the memory of weights that each rank maps."""
        sizes = []
        for process in rank_processes():
            found = [each for each in process.memory_maps() if "phalanx-weights" in each.path]
            sizes.append(sum(each.rss for each in found))
        return sizes

    settings = {"weights": weights, "quantization": quantization, "dtype": "bfloat16"}
    with LLM(str(smollm2), ranks=2, max_model_len=512, **settings) as llm:
        expected = llm.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0))[0].outputs[0].token_ids
        before = llm.status()
        for rank in (1, 0):
            rank_processes()[rank].kill()
            again = llm.generate([PROMPT], SamplingParams(max_tokens=24, temperature=0))[0].outputs[0].token_ids
            assert again == expected
            status = llm.status()
            # They take no more memory than before, and no less is left for the KV cache.
            assert status.total_blocks == before.total_blocks
            assert any("kept from before the restart" in line for line in status.report) == (weights == "keep")
            assert all(size > 0 for size in kept()) == (weights == "keep")
    assert "of no use" not in capfd.readouterr().err


@pytest.mark.slow
def test_nothing_is_lost_whichever_rank_is_killed_and_whenever(smollm2: Path) -> None:
    with _group(smollm2, max_restarts=20) as llm:
        expected = _Running(llm, 40).results()
        for rank, tokens in ((1, 0), (0, 1), (1, 90), (0, 200), (1, 300)):
            running = _Running(llm, 40)
            running.take_until(tokens)
            rank_processes()[rank].kill()
            assert running.results() == expected


@pytest.mark.slow
def test_nothing_is_lost_with_the_process_that_ranks_are_forked_from(smollm2: Path) -> None:
    with _group(smollm2) as llm:
        expected = _Running(llm, 40).results()
        running = _Running(llm, 40)
        running.take_until(60)
        rank_processes()[0].parent().kill()  # type: ignore[union-attr]
        assert running.results() == expected


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_nothing_is_lost(
    smollm2: Path, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with _group(smollm2, step_timeout_s=2.0) as llm:
        expected = _Running(llm, 40).results()
        running = _Running(llm, 40)
        running.take_until(50)
        rank_processes()[rank].send_signal(signal.SIGSTOP)
        assert running.results() == expected
    said = capfd.readouterr().err
    assert f"rank {rank} is stopped: nothing has moved for 2" in said
    assert f"rank {rank}:\nno answer" in said
    # The other one's stack says in what it waits.
    assert "most recent call first" in said


@pytest.mark.slow
def test_a_busy_machine_and_long_prompts_are_no_hang(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    busy = [psutil.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(4)]
    try:
        with LLM(str(smollm2), ranks=2, dtype="float32", step_timeout_s=2.0) as llm:
            prompts = [[7 + number] * 2000 for number in range(4)]
            llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert "nothing has moved" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_request_that_kills_the_group_fails_alone(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 1 ends when it is to compute this token. It is a fork of a process in which nothing else may run.
    poison = 4242
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if any(part.endswith('ranks.fork') for part in sys.orig_argv):\n"
        "    from phalanx.engine.execution.slot_table import SlotTable\n"
        "    apply = SlotTable.apply\n"
        "    def applied(self, plan):\n"
        f"        poisoned = any({poison} in start.token_ids for start in plan.starts)\n"
        "        if poisoned and os.environ['RANK'] == '1':\n"
        "            os._exit(9)\n"
        "        apply(self, plan)\n"
        "    SlotTable.apply = applied\n"
    )
    with contextlib.ExitStack() as stack:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
        llm = stack.enter_context(_group(smollm2, max_restarts=20))
        expected = _Running(llm, 40).results()
        running = _Running(llm, 40)
        running.take_until(20)
        with pytest.raises(EngineFault, match="died again and again while it computed this request"):
            llm.generate([[1, 2, poison]], SamplingParams(max_tokens=2))
        assert running.results() == expected
        assert llm.generate(["a"], SamplingParams(max_tokens=2, ignore_eos=True))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_stops_while_it_loads_is_named(smollm2: Path, number: signal.Signals) -> None:
    def disturb() -> None:
        while len(rank_processes()) < 2:
            time.sleep(0.05)
        rank_processes()[1].send_signal(number)

    threading.Thread(target=disturb).start()
    how = {signal.SIGKILL: "SIGKILL: process", signal.SIGSTOP: "Hung: rank 1 is stopped"}[number]
    with nothing_left_behind(), pytest.raises(EngineStopped, match=f"rank 1 failed: {how}"):
        LLM(str(smollm2), ranks=2, step_timeout_s=2.0)
    assert rank_processes() == []


@pytest.mark.slow
def test_without_restarts_left_the_engine_ends_with_the_ranks_failure(smollm2: Path) -> None:
    with _group(smollm2, max_restarts=1) as llm:
        for _ in range(2):
            running = _Running(llm, 100)
            running.take_until(10)
            rank_processes()[1].kill()
        with pytest.raises(Exception, match="rank 1 failed: SIGKILL"):
            running.results()


@pytest.mark.slow
def test_asyncio_streams_go_on_too(smollm2: Path) -> None:
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)

    async def main() -> None:
        llm = AsyncLLM(str(smollm2), ranks=2, dtype="float32", max_model_len=512)
        try:
            expected = (await llm.generate(PROMPT, sampling=sampling)).outputs[0].text
            text = ""
            async for event in llm.stream(PROMPT, sampling=sampling):
                if isinstance(event, Delta):
                    if not text:
                        rank_processes()[0].kill()
                    text += event.text
            assert text == expected
        finally:
            await llm.close()

    asyncio.run(main())
    deadline = time.monotonic() + 5
    while rank_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rank_processes() == []
