"""A rank that dies, stops or hangs in any phase of its start is named, and nothing is left of the group."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from phalanx import LLM, EngineStopped
from phalanx.engine.execution.heartbeat import STARTING
from phalanx.tests.launch.programs import rank_processes
from phalanx.tests.left_behind import nothing_left_behind

FAULTY = """
import os, signal, sys, time
if any(part.endswith("ranks.fork") for part in sys.orig_argv):
    from phalanx.engine.execution.heartbeat import Heartbeat
    tell = Heartbeat.phase
    def phase(self, name):
        tell(self, name)
        if name == os.environ["FAULT_IN"] and os.environ["RANK"] == os.environ["FAULT_OF"]:
            exec_fault()
    def exec_fault():
        if os.environ["FAULT"] == "hang":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, os.environ["FAULT"]))
    Heartbeat.phase = phase
"""
"""A sitecustomize.py by which one rank of a fork server meets with a fault when it enters a phase."""
NAMED = {
    "SIGKILL": "rank {rank} failed: SIGKILL",
    "SIGSTOP": "rank {rank} failed: Hung: rank {rank} is stopped",
    "hang": "rank {rank} failed: Hung: rank {rank} does not get on: .*'{phase}'",
}

MEETING = "waited for rank {rank} in"
"""Before they have met, whoever waits knows for whom."""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("phase", STARTING[1:])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", "hang"])
def test_a_fault_in_any_phase_of_the_start_is_named_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, phase: str, ranks: int, rank: int
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    for name, value in (("FAULT", fault), ("FAULT_IN", phase), ("FAULT_OF", str(rank))):
        monkeypatch.setenv(name, value)
    with nothing_left_behind(), pytest.raises(EngineStopped) as raised:
        LLM(str(tiny), ranks=ranks, max_model_len=256, step_timeout_s=2.0, timeout_s=6.0)
    named = MEETING if (fault, phase) == ("hang", "joining") else NAMED[fault]
    assert re.search(named.format(rank=rank, phase=phase), str(raised.value))
    assert rank_processes() == []
