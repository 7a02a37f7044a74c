"""Ranks that have nothing to do hear from rank 0 all the same: one that hears nothing for timeout_s gives up."""

from __future__ import annotations

import queue
import time
from pathlib import Path

import pytest
from phalanx import LLM
from phalanx.engine.client.llm import choose_device
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine
from phalanx.engine.protocol.transport import InProcess
from phalanx.engine.scheduling.step_plan import Idle, decode
from phalanx.parallel.group import local_group
from phalanx.tests.engine.conftest import CONFIG

PATIENCE_S = 20.0


def test_who_asks_for_the_state_again_and_again_does_not_silence_rank_0(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig.from_dict({"model": str(tiny), **CONFIG, "timeout_s": 0.4})
    link = InProcess()
    engine = Engine(config, local_group(choose_device(config)), link.transport)
    assert engine.coordinator is not None
    sent: queue.SimpleQueue[object] = queue.SimpleQueue()
    monkeypatch.setattr(engine.coordinator._control, "send", lambda data: sent.put(decode(data)))
    with LLM.from_engine(engine, link) as llm:
        deadline = time.monotonic() + PATIENCE_S
        while sent.qsize() < 3 and time.monotonic() < deadline:
            llm.status()  # more often than rank 0 is to be heard
        assert [sent.get_nowait() for _ in range(3)] == [Idle()] * 3
