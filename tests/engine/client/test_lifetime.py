"""An engine that nobody closes: a script that just ends, an LLM that is dropped, a process that is forked."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from phalanx import LLM, EngineStopped, SamplingParams
from phalanx.engine.client.client import Client
from phalanx.engine.client.group_process import STOP_TIMEOUT_S
from phalanx.engine.coordinator.input_processor import InputProcessor

LONG = "SamplingParams(max_tokens=200, ignore_eos=True)"


def _run(program: str) -> subprocess.CompletedProcess[str]:
    head = "from phalanx import LLM, SamplingParams, EngineStopped\n"
    return subprocess.run(
        [sys.executable, "-c", head + program], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_script_that_ends_while_a_request_runs_ends_well(tiny: Path, ranks: int) -> None:
    done = _run(
        f"llm = LLM({str(tiny)!r}, ranks={ranks}, max_model_len=256)\n"
        f"stream = llm.stream('on and on', sampling={LONG})\nnext(stream)\nprint('begun')\n"
    )
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_llm_that_is_dropped_takes_its_engine_along(tiny: Path, ranks: int) -> None:
    threads, children = set(threading.enumerate()), set(psutil.Process().children(recursive=True))
    llm = LLM(str(tiny), ranks=ranks, max_model_len=256)
    gone = weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None

    def left() -> tuple[int, int]:
        now = set(threading.enumerate()), set(psutil.Process().children(recursive=True))
        return len(now[0] - threads), len(now[1] - children)

    deadline = time.monotonic() + 60
    while left() not in ((0, 0), (1, 0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() in ((0, 0), (1, 0))  # the reaper stays


def test_a_stream_keeps_the_llm_that_nobody_else_holds(tiny: Path) -> None:
    stream = LLM(str(tiny), max_model_len=256).stream("x", sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    gc.collect()
    assert len(list(stream)) > 1


def test_a_forked_process_is_told_that_the_engine_is_its_parents(tiny: Path) -> None:
    done = _run(
        "import os, signal\n"
        f"llm = LLM({str(tiny)!r}, max_model_len=256)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(100)\n"
        "    for call in (lambda: llm.generate(['a']), llm.status, lambda: llm.stream('a')):\n"
        "        try: call()\n"
        "        except EngineStopped as error: print(error, flush=True)\n"
        "    llm.close()\n"
        "    raise SystemExit(0)\n"
        "_, status = os.wait()\n"
        "[output] = llm.generate(['a'], SamplingParams(max_tokens=2, ignore_eos=True))\n"
        "print(status, len(output.outputs[0].token_ids), flush=True)\n"
    )
    *told, last = done.stdout.splitlines()
    assert last == "0 2", done.stderr
    assert len(told) == 3
    assert all("forked: make an engine here, or start processes by spawn" in line for line in told)


@pytest.mark.slow
def test_a_forked_process_may_have_an_engine_of_its_own(tiny: Path) -> None:
    done = _run(
        "import os, signal\n"
        "def answer(llm):\n"
        "    [output] = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, ignore_eos=True))\n"
        "    return output.outputs[0].token_ids\n"
        f"model = {str(tiny)!r}\n"
        "llm = LLM(model, max_model_len=256)\n"
        "print(answer(llm), flush=True)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(60)\n"
        "    with LLM(model, max_model_len=256) as own: print(answer(own), flush=True)\n"
        "    raise SystemExit(0)\n"
        "_, status = os.wait()\n"
        "print(status, flush=True)\n"
    )
    parents, childs, status = done.stdout.splitlines()
    assert (childs, status) == (parents, "0"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_a_program_without_standard_streams_has_a_group_that_ends_well(tiny: Path, closed: str) -> None:
    program = (
        "import sys\nfrom phalanx import LLM\n"
        f"llm = LLM({str(tiny)!r}, ranks=2, max_model_len=256)\nllm.generate('x')\nllm.close()\n"
        "sys.stderr.write('closed\\n')\n"
    )
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, program],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "closed\n")


@pytest.mark.slow
def test_a_group_of_a_program_that_blocks_signals_ends_at_once(tiny: Path) -> None:
    done = _run(
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        f"llm = LLM({str(tiny)!r}, ranks=2, max_model_len=256)\nllm.generate('x')\n"
        "begun = time.monotonic()\nllm.close()\nprint(time.monotonic() - begun)\n"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < STOP_TIMEOUT_S / 2


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Sets a handler of SIGUSR1. What waits for ever is interrupted after a while."""

    def hangs(*_: Any) -> None:
        raise TimeoutError("a signal handler waits for a lock that the line it interrupted holds")

    before = signal.signal(signal.SIGALRM, hangs), signal.getsignal(signal.SIGUSR1)
    signal.setitimer(signal.ITIMER_REAL, 100.0)
    yield lambda act: signal.signal(signal.SIGUSR1, lambda *_: act()) and None
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    signal.signal(signal.SIGALRM, before[0])
    signal.signal(signal.SIGUSR1, before[1])


def _signals_once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """Have a method, which is called with a lock held, interrupted by SIGUSR1 at its first call from here on."""
    method, called = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        if not called:
            called.append(True)
            signal.raise_signal(signal.SIGUSR1)
        return method(*args)

    monkeypatch.setattr(owner, name, interrupted)


def test_a_signal_handler_may_close_an_engine_within_any_line_of_a_call(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    llm = LLM(str(tiny), max_model_len=256)
    on_signal(llm.close)
    _signals_once(monkeypatch, Client, "_check_stopped")  # submit() holds the client's lock
    endless = SamplingParams(max_tokens=200, ignore_eos=True)
    try:
        outputs = llm.generate([[number] for number in range(100)], endless)
    except EngineStopped:
        outputs = []
    assert {output.outputs[0].finish_reason for output in outputs} <= {"abort"}
    with pytest.raises(EngineStopped, match="was closed"):
        llm.generate([[1]])


def test_a_signal_handler_may_abort_a_request_within_any_line_of_a_call(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    with LLM(str(tiny), max_model_len=256) as llm:
        endless = llm.stream([1], sampling=SamplingParams(max_tokens=250, ignore_eos=True))
        on_signal(endless.abort)
        _signals_once(monkeypatch, InputProcessor, "check_bytes")  # the lock of rank 0's ingress is held
        [output] = llm.generate([[2]], SamplingParams(max_tokens=3, ignore_eos=True))
        assert output.outputs[0].finish_reason == "length"
        *_, last = endless
        assert last.completions[0].finish_reason == "abort"  # type: ignore[union-attr]
