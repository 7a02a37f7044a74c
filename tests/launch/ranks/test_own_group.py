"""LLM(ranks=N): a group of processes of its own, which answers as one process does and ends as the caller wants."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from phalanx import LLM, CheckpointError, EngineStopped, SamplingParams
from phalanx.tests.launch.programs import rank_processes
from phalanx.tests.left_behind import nothing_left_behind

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PROMPTS = ["one", "two words", "and three more of them"]

CLIENT = """
import sys
from phalanx import LLM, SamplingParams

if __name__ == "__main__":
    with LLM(sys.argv[1], ranks=2, max_model_len=256) as llm:
        llm.generate("one", SamplingParams(max_tokens=2, ignore_eos=True))
    print(*(name for name in ("torch", "numpy", "transformers") if name in sys.modules))
"""


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_two_ranks_answer_as_one_does_and_leave_nothing_behind(tiny: Path) -> None:
    with LLM(str(tiny), dtype="float32", max_model_len=256) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]
    with nothing_left_behind() as traces, LLM(str(tiny), ranks=2, dtype="float32", max_model_len=256) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)] == expected
        assert llm.status().ranks == 2
        ranks = rank_processes()
        assert len(ranks) == 2
        assert traces.shared_memory() == set()  # no segment has a name once all ranks have opened it
    assert not any(_runs(process) for process in ranks)


def test_a_killed_rank_stops_the_engine_and_is_named(tiny: Path) -> None:
    with LLM(str(tiny), ranks=2, max_model_len=16384, max_restarts=0) as llm:
        victim = rank_processes()[1].pid
        stream = llm.stream("on and on", sampling=SamplingParams(max_tokens=16000, ignore_eos=True))
        next(stream)
        os.kill(victim, signal.SIGKILL)
        # Both by what the supervisor says, not by the word of rank 0, which it tells to end.
        with pytest.raises(EngineStopped, match=r"rank [01] failed"):
            list(stream)
        with pytest.raises(EngineStopped, match=r"rank [01] failed"):
            llm.generate("more", GREEDY)


def test_a_damaged_checkpoint_is_the_same_error_as_in_one_process(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(folder), ranks=2, max_model_len=256)


def test_the_client_of_a_group_imports_nothing_that_computes(tiny: Path) -> None:
    # Each import of torch takes one of the ranks' cores for seconds while they start.
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tiny)], stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    assert client.stdout.split() == []


def test_the_programs_that_start_a_group_import_nothing_that_computes() -> None:
    names = "phalanx.launch.generate, phalanx.launch.chat, phalanx.engine.client.async_llm"
    program = f"import sys, {names}; print(*({{'torch', 'transformers'}} & sys.modules.keys()))"
    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert ended.stdout.split() == []
