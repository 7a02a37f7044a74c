"""Many requests of clients that abort, drop what they asked for, or are killed, while garbage is collected anywhere.

The long form: `pytest -s -m slow tests/engine/test_endurance.py`.
"""

from __future__ import annotations

import gc
import queue
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from phalanx import SamplingParams
from phalanx.engine.client.client import Client, RequestHandle
from phalanx.engine.protocol.messages import Event, Failed, Finished, Submit
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.engine.serving_engine import PATIENCE_S, resident_bytes, serving

AT_ONCE = 64
GROWTH_LIMIT = 24 * 2**20

# A client of another process, which is killed while its requests run. It imports as little as it can.
DOOMED = """
import sys, msgspec, zmq
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
for number in range(6):
    sampling = {"max_tokens": 100, "ignore_eos": True}
    fields = {"type": "submit", "id": str(number), "token_ids": [5 + number], "sampling": sampling}
    socket.send(msgspec.msgpack.encode(fields))
socket.recv()
print("begun", flush=True)
while True:
    socket.recv()
"""


class _Traffic:
    """Keeps AT_ONCE requests of two clients under way; notes how each one ended."""

    def __init__(self, address: str, seed: int) -> None:
        self._address = address
        self._rng = random.Random(seed)
        self._clients = [Client(ZmqConnection(address)) for _ in range(2)]
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._number = 0
        self._under_way: dict[str, Client] = {}
        self.ends: Counter[str] = Counter()
        self.deaths = 0

    def run(self, count: int, deaths: int) -> None:
        """Send `count` requests, a tenth of which are aborted, and kill `deaths` clients meanwhile."""
        rng, last = self._rng, self._number + count
        fatal = set(rng.sample(range(self._number, last), deaths))
        doomed: dict[str, int] = {}
        while self._number < last or self._under_way:
            while self._number < last and len(self._under_way) < AT_ONCE:
                if self._number in fatal:
                    self._kill_a_client()
                name = self._submit()
                if rng.random() < 0.1:
                    doomed[name] = rng.randrange(40)

            self._take(self._events.get(timeout=PATIENCE_S))
            for name in [name for name, left in doomed.items() if left == 0 and name in self._under_way]:
                self._under_way[name].abort(name)
            doomed = {name: left - 1 for name, left in doomed.items() if left > 0 and name in self._under_way}

    def close(self) -> None:
        """End both clients."""
        for client in self._clients:
            client.close()

    def _submit(self) -> str:
        rng, client = self._rng, self._rng.choice(self._clients)
        name = f"request {self._number}"
        self._number += 1
        prompt = [7] * rng.choice([0, 16, 40]) + [rng.randrange(3, 1031) for _ in range(rng.randrange(1, 20))]
        sampling = SamplingParams(max_tokens=rng.choice([1, 2, 4, 24]), temperature=rng.choice([0.0, 1.0]))
        self._under_way[name] = client
        client.submit(Submit(id=name, token_ids=prompt, sampling=sampling), self._events.put, quick=True)

        if rng.random() < 0.05:
            # Dropped at once: the garbage collector aborts it, on whatever thread it runs.
            endless = SamplingParams(max_tokens=100, ignore_eos=True)
            cycle = [RequestHandle(client, Submit(id=f"dropped {name}", token_ids=prompt, sampling=endless))]
            cycle.append(cycle)  # type: ignore[arg-type]
        if rng.random() < 0.05:
            gc.set_threshold(rng.choice([1, 10, 700]), rng.choice([1, 10]), rng.choice([1, 10]))
        return name

    def _take(self, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            assert event.id in self._under_way, f"{event.id} ended twice"
            del self._under_way[event.id]
            self.ends[event.error if isinstance(event, Failed) else event.completions[0].finish_reason] += 1

    def _kill_a_client(self) -> None:
        program = [sys.executable, "-c", DOOMED, self._address]
        with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(self._rng.random() / 50)
            process.kill()
        self.deaths += 1


@contextmanager
def _collecting() -> Iterator[None]:
    """Put the collector's thresholds back afterwards."""
    before = gc.get_threshold()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _endure(folder: Path, address: str, count: int, deaths: int) -> None:
    # Room for two of the longest sequences, of the eight that may run: preemptions belong to the traffic.
    config = {**CONFIG, "block_size": 4, "max_model_len": 128, "kv_memory": 34 * 2048}
    with _collecting(), serving(folder, address, **config):
        traffic = _Traffic(address, seed=0)
        traffic.run(count // 4, 1)
        before = resident_bytes()
        began = time.monotonic()
        traffic.run(count - count // 4, deaths - 1)
        seconds = time.monotonic() - began
        growth = resident_bytes() - before
        traffic.close()
    print(f"\n{count} requests ended: {dict(traffic.ends)}; {traffic.deaths} clients were killed")
    print(f"the last three quarters in {seconds:.0f} s, {growth / 2**20:.1f} MiB more in memory after them")
    assert sum(traffic.ends.values()) == count
    assert set(traffic.ends) == {"stop", "length", "abort"}
    assert growth <= GROWTH_LIMIT


def test_600_requests_amid_aborts_deaths_and_collections_are_all_answered(tiny: Path, tmp_path: Path) -> None:
    _endure(tiny, f"ipc://{tmp_path}/engine", 600, 2)


@pytest.mark.slow
def test_10000_requests_amid_aborts_deaths_and_collections_are_all_answered(tiny: Path, tmp_path: Path) -> None:
    _endure(tiny, f"ipc://{tmp_path}/engine", 10_000, 40)
