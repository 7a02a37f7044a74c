"""Ranks that torchrun started and that stop: they are named, torchrun starts them again, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.protocol.messages import Delta
from phalanx.tests.launch.ranks import watched

RunRanks = Callable[..., list[Any]]

WAIT_S = 120.0
SAMPLING = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
PROMPT = "Once upon a time, in a village by the sea,"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "5")


class Workers:
    """torchrun with two ranks that serve."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.address = f"ipc://{folder}/engine"
        self._log = folder / "log"
        command = [
            sys.executable, *TORCHRUN, "-m", "phalanx.launch.worker", f"model={model}", "ranks=2", "dtype=float32",
            "max_model_len=512", "step_timeout_s=2", "timeout_s=60", f"address={self.address}",
        ]  # fmt: skip
        with self._log.open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    @property
    def log(self) -> str:
        """What the agent and the ranks have said."""
        return self._log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """The ranks' processes, by number."""
        found = {}
        for child in psutil.Process(self.agent.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RANK" in (environment := child.environ()) and "phalanx.launch.worker" in child.cmdline():
                    found[int(environment["RANK"])] = child
        return [found[rank] for rank in sorted(found)]

    def close(self) -> None:
        """End all of them."""
        everyone = psutil.Process(self.agent.pid).children(recursive=True)
        self.agent.terminate()
        try:
            self.agent.wait(WAIT_S)
        finally:
            self.agent.kill()
        assert psutil.wait_procs(everyone, timeout=5)[1] == []


@pytest.fixture
def workers(smollm2: Path, tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(smollm2, tmp_path)
    try:
        yield workers
    finally:
        workers.close()


def test_a_rank_that_watches_the_others_is_not_taken_for_dead_by_those_that_wait_for_it(run_ranks: RunRanks) -> None:
    assert run_ranks(2, watched.wait_for_one_that_is_late) == [2.0, 2.0]


@pytest.mark.slow
def test_ranks_of_torchrun_that_stop_are_named_and_nothing_is_lost(workers: Workers) -> None:
    with LLM.connect(workers.address, timeout_s=WAIT_S, restart_wait_s=WAIT_S) as llm:
        expected = llm.generate([PROMPT], SAMPLING)[0].outputs[0].text
        for rank in (1, 0):
            text = ""
            for event in llm.stream(PROMPT, sampling=SAMPLING):
                if isinstance(event, Delta):
                    if not text:
                        workers.ranks()[rank].send_signal(signal.SIGSTOP)
                    text += event.text
            assert text == expected, workers.log
            assert f"rank {rank} is stopped: nothing has moved for 2" in workers.log
    assert "most recent call first" in workers.log


@pytest.mark.slow
def test_a_rank_of_torchrun_that_waits_for_another_ends_at_a_signal(workers: Workers) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(workers.ranks()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    first, second = workers.ranks()
    second.send_signal(signal.SIGSTOP)
    time.sleep(8.0)  # the first waits for it by now, in C++
    first.send_signal(signal.SIGTERM)
    assert psutil.wait_procs([first], timeout=8)[1] == []
    second.send_signal(signal.SIGKILL)
