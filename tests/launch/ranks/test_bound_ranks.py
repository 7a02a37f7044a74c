"""bind_cpus with real ranks: whose threads run where, and that nobody else's are touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from phalanx import LLM, SamplingParams
from phalanx.kernels import cpu
from phalanx.parallel.topology.placement import place
from phalanx.parallel.topology.topology import format_cpu_list, read_topology
from phalanx.tests.launch.programs import rank_processes
from phalanx.tests.threads import other_cpus, pool_cpus

GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
PROMPTS = ["one", "two words", "and three more of them"]

pytestmark = [
    pytest.mark.skipif(cpu.native is None, reason="the C++ kernels are not built"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="only one CPU may be used here"),
]


def _tokens(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, GREEDY)]


def test_ranks_of_a_group_are_bound_and_compute_what_one_that_is_not_does(tiny: Path) -> None:
    allowed = os.sched_getaffinity(0)
    with LLM(str(tiny), dtype="float32", max_model_len=256, bind_cpus="never") as llm:
        expected = _tokens(llm)
        assert "not bound to CPUs: bind_cpus=never" in llm.status().report[3]
    with LLM(str(tiny), ranks=2, dtype="float32", max_model_len=256, bind_cpus="always", threads=2) as llm:
        assert _tokens(llm) == expected
        placements = [place(read_topology(allowed), rank, 2, threads=2) for rank in range(2)]
        assert llm.status().report[0].startswith("2 rank(s) on cpu, 2 thread(s) each")
        assert llm.status().report[3] == f"rank 0: {placements[0]}; rank 1: {placements[1]}"
        processes = [process.pid for process in rank_processes()]
        for rank, placement in enumerate(placements):
            first, second = map(str, placement.cpus)
            assert pool_cpus([second], processes[rank]) == [second]
            # The thread that runs the steps is on the first CPU alone.
            assert other_cpus(processes[rank]) == {first, format_cpu_list(placement.share)}
            main = os.sched_getaffinity(processes[rank])
            assert main == {placement.cpus[0]}
        assert os.sched_getaffinity(0) == allowed


def test_an_engine_in_the_callers_process_binds_the_kernels_threads_alone(tiny: Path) -> None:
    allowed, before = os.sched_getaffinity(0), other_cpus()
    with LLM(str(tiny), dtype="float32", max_model_len=256, bind_cpus="always") as llm:
        _tokens(llm)
        placement = place(read_topology(allowed), 0, 1)
        assert llm.status().report[3] == f"rank 0: {placement}"
        expected = sorted(map(str, placement.cpus[1:]))
        assert pool_cpus(expected) == expected
        assert other_cpus() == before
    assert os.sched_getaffinity(0) == allowed
    cpu.set_threads(1)
