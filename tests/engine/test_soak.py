"""Many short requests, a tenth of them aborted at any moment: no block is lost, and no memory."""

from __future__ import annotations

import gc
import queue
import random
from pathlib import Path

import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.protocol.messages import Event, Finished, Submit
from phalanx.tests.engine.conftest import CONFIG

GROWTH_LIMIT = 16 * 2**20
AT_ONCE = 64


def _resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class _Traffic:
    """Keeps AT_ONCE requests under way; each tenth is aborted after a random number of events of any request."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self._llm, self._rng = llm, random.Random(seed)
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._number = 0
        self.reasons: dict[str, int] = {}

    def run(self, count: int) -> None:
        under_way, doomed, started = 0, {}, 0
        while started < count or under_way:
            while started < count and under_way < AT_ONCE:
                name = self._submit()
                if self._rng.random() < 0.1:
                    doomed[name] = self._rng.randrange(40)
                started, under_way = started + 1, under_way + 1
            event = self._events.get(timeout=60)
            if isinstance(event, Finished):
                under_way -= 1
                doomed.pop(event.id, None)
                for completion in event.completions:
                    self.reasons[completion.finish_reason] = self.reasons.get(completion.finish_reason, 0) + 1
            for name in [name for name, left in doomed.items() if left == 0]:
                del doomed[name]
                self._llm.abort(name)
            doomed = {name: left - 1 for name, left in doomed.items()}

    def _submit(self) -> str:
        rng, name = self._rng, f"request {self._number}"
        self._number += 1
        shared = [7] * rng.choice([0, 0, 16, 40])
        prompt = shared + [rng.randrange(3, 1031) for _ in range(rng.randrange(1, 20))]
        sampling = SamplingParams(
            max_tokens=rng.choice([1, 2, 4, 24]),
            temperature=rng.choice([0.0, 1.0]),
            seed=self._number,
            n=rng.choice([1] * 9 + [2]),
            stop=("e",) if rng.random() < 0.2 else (),
            logprobs=rng.choice([None, None, 2]),
        )
        self._llm.submit(Submit(id=name, token_ids=prompt, sampling=sampling), self._events.put, quick=True)
        return name


def _soak(folder: Path, warm_up: int, count: int) -> None:
    # Room for two of the longest sequences, of the eight that may run: preemptions belong to the traffic.
    with LLM(str(folder), **{**CONFIG, "block_size": 4, "max_model_len": 128, "kv_memory": 34 * 2048}) as llm:
        traffic = _Traffic(llm, seed=0)
        traffic.run(warm_up)
        before = _resident()
        traffic.run(count - warm_up)
        growth = _resident() - before
        status = llm.status()
        assert (status.running, status.waiting) == (0, 0)
        assert status.free_blocks == status.total_blocks
        assert status.preemptions > 0
        assert set(traffic.reasons) == {"stop", "length", "abort"}
        assert growth <= GROWTH_LIMIT, f"{growth / 2**20:.1f} MB more after {count} requests than after {warm_up}"


def test_600_requests_with_aborts_leave_nothing_behind(tiny: Path) -> None:
    _soak(tiny, 300, 600)


@pytest.mark.slow
def test_10000_requests_with_aborts_leave_nothing_behind(tiny: Path) -> None:
    _soak(tiny, 1000, 10_000)
