"""Whatever ends or stops a thread of the engine, nobody waits for it for ever."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, EngineStopped, InvalidRequest, SamplingParams
from phalanx.engine.client.requests import make_submit
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.engine.coordinator.output_processor import OutputProcessor
from phalanx.engine.errors import EngineFault
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.models.decoder import CausalLM
from phalanx.engine.protocol.messages import Event, Finished
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG

ENDLESS = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
PATIENCE_S = 60.0


class Panic(BaseException):
    """As tokenizers' PanicException: no Exception."""


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Panic, MemoryError])
def test_whatever_ends_the_steps_ends_every_iteration(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def broken(*_: Any) -> Any:
        raise kind("a card fell out")

    with LLM(str(tiny), **CONFIG) as llm:
        handle = llm.stream([5, 6], sampling=ENDLESS)
        next(handle)
        monkeypatch.setattr(Worker, "launch", broken)
        with pytest.raises(EngineStopped, match=r"rank 0 failed: .*a card fell out"):
            list(handle)
        with pytest.raises(EngineStopped, match="a card fell out"):
            llm.status()


@pytest.mark.parametrize("kind", [SystemExit, Panic])
@pytest.mark.parametrize("place", [(InputProcessor, "process"), (OutputProcessor, "update")])
def test_whatever_ends_a_thread_for_texts_ends_the_requests(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], kind: type[BaseException]
) -> None:
    def broken(*_: Any) -> Any:
        raise kind("a defect")

    with LLM(str(tiny), **CONFIG) as llm:
        monkeypatch.setattr(*place, broken)
        with pytest.raises((EngineStopped, InvalidRequest), match="a defect"):
            llm.generate("abc", ENDLESS)


def test_closing_leaves_a_step_that_hangs_behind(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, go_on = threading.Event(), threading.Event()

    def hang(*_: Any) -> Any:
        hangs.set()
        go_on.wait(PATIENCE_S)
        raise RuntimeError("the step went on")

    llm = LLM(str(tiny), **CONFIG, timeout_s=0.5)
    monkeypatch.setattr(Worker, "launch", hang)
    handle = llm.stream([5, 6], sampling=ENDLESS)
    assert hangs.wait(PATIENCE_S)
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < PATIENCE_S / 2  # a bound against hanging, no measurement
    with pytest.raises(EngineStopped, match="closed"):
        list(handle)
    go_on.set()


def test_memory_that_the_kernels_do_not_get_ends_the_engine_with_their_words(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(tiny), **CONFIG) as llm:
        monkeypatch.setattr(CausalLM, "forward", programs.no_memory)
        with pytest.raises(EngineStopped, match="rank 0 failed: MemoryError: the CPU kernels cannot allocate 40 bytes"):
            llm.generate([[5], [6]], ENDLESS)


@pytest.mark.parametrize("broken", [0, 1])
def test_memory_that_one_of_several_ranks_does_not_get_ends_them_all(
    run_ranks: Callable[..., list[Any]], tiny: Path, broken: int
) -> None:
    raised = run_ranks(2, programs.out_of_memory, str(tiny), {**CONFIG, "timeout_s": 3600}, broken)
    assert [name for name, _ in raised] == ["EngineStopped"] * 2
    words = f"rank {broken} failed: MemoryError: the CPU kernels cannot allocate 40 bytes of scratch memory"
    assert words in raised[broken][1]


@pytest.mark.parametrize(
    "name",
    ["phalanx-callbacks", "phalanx-intake-", "phalanx-grammar", "phalanx-masks", "phalanx-vocabulary", "Thread-"],
)
def test_threads_that_cannot_be_started_fail_one_request_at_most(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real, refused = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith(name) and len(refused) < 1:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        real(thread)

    few = SamplingParams(max_tokens=3, temperature=0)
    with LLM(str(tiny), **CONFIG) as llm:
        monkeypatch.setattr(threading.Thread, "start", start)
        failed = 0
        for _ in range(2):
            with contextlib.suppress(EngineFault):
                failed += 1
                llm.chat([{"role": "user", "content": "x"}], few)
                failed -= 1
            with contextlib.suppress(EngineFault):
                failed += 1
                llm.generate("hi", few, StructuredOutput(regex="a{3}"))
                failed -= 1
            ends: queue.SimpleQueue[Event] = queue.SimpleQueue()
            llm.submit(make_submit(llm.client.new_id(), prompt=[5, 6], sampling=few), ends.put)
            while not isinstance(ends.get(timeout=PATIENCE_S), Finished):
                pass
            llm.status()
        assert failed <= len(refused)
    assert refused or name == "phalanx-vocabulary"  # which may have been started before
