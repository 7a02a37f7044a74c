"""benchmarks/parts/chaos.py: a short run of it, at the end of which nothing is lost, doubled or left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.benchmarks.parts.chaos import KINDS, PROMPTS, Options, disturb, make_bodies


def test_every_kind_is_asked_of_every_prompt_whole_and_as_a_stream() -> None:
    bodies = list(make_bodies(7))
    assert len(bodies) == 2 * len(KINDS) * len(PROMPTS)
    assert {body["max_tokens"] for body in bodies} == {7}


@pytest.mark.slow
def test_a_minute_of_chaos_costs_nothing(smollm2: Path) -> None:
    options = Options(model=str(smollm2), seconds=50.0, fault_every_s=18.0, clients=4, max_tokens=30, seed=2)
    result = disturb(options)
    assert result["well"], result
    assert sum(result["faults"].values()) > 0
    assert result["restarts"] > 0
