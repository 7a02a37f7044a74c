"""The benchmark of restarts: a rank that is killed is replaced, and the time is told phase by phase."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx.benchmarks.parts.restarts import PHASES, Options, measure_all


@pytest.mark.slow
def test_each_phase_of_a_restart_is_told(smollm2: Path) -> None:
    result = measure_all(Options(model=str(smollm2), ranks=[2], kills=1))["restarts"]
    assert list(result) == ["2 ranks, weights=keep", "2 ranks, weights=read"]
    for figures in result.values():
        assert figures["kills"] == 2
        phases = [figures[f"{name}_s"] for name in PHASES]
        assert all(seconds >= 0 for seconds in phases)
        assert 0 < figures["total_s"] <= figures["worst_s"]
