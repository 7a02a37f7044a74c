"""benchmarks/gateway.py: what a gateway adds to an engine, measured against engines of the benchmark's own."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest
from phalanx.benchmarks.gateway import (
    Options,
    measure_in_process,
    measure_latency,
    measure_memory,
    measure_served,
)
from phalanx.benchmarks.lab.http_load.client import Target
from phalanx.engine.errors import ConfigError


def test_every_stamped_token_is_timed() -> None:
    measured = asyncio.run(measure_latency(Options(few=3, stamped_tokens=20)))
    waits = measured["token_to_byte_ms"]
    assert 0 < waits["p50"] <= waits["p95"] <= waits["p99"] < 10_000  # one clock for all processes
    assert measured["gateway_ready_s"] > 0


def test_streams_stay_open_while_their_memory_is_measured() -> None:
    measured = asyncio.run(measure_memory(Options(idle=40)))
    assert measured["gateway_mb_with_open_streams"] >= measured["gateway_mb"] > 10


@pytest.mark.slow
def test_the_server_and_the_process_itself_compute_the_same_tokens(smollm2: Path) -> None:
    options = Options(model=str(smollm2), streams=4, new_tokens=6, prompt_tokens=8)
    served = asyncio.run(measure_served(options, 0))
    in_process = measure_in_process(options, 0)
    assert served["output_tokens"] == in_process["output_tokens"] == 24
    assert served["gateway_mb_after"] >= served["gateway_mb_at_start"] > 10


@pytest.mark.parametrize(("name", "value"), [("streams", 0), ("idle", -1), ("parts", "latency,all")])
def test_an_option_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        Options(**{name: value}).check()  # type: ignore[arg-type]


def test_a_request_that_is_cancelled_leaves_no_connection() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    left = threading.Event()

    def serve() -> None:
        connected, _ = listener.accept()
        with connected:
            while connected.recv(65536):
                pass
        left.set()

    thread = threading.Thread(target=serve)
    thread.start()

    async def main() -> None:
        target = Target(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", None, 60.0)
        asked = asyncio.create_task(target.post("/completions", b"{}"))
        await asyncio.sleep(0.2)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        # The loop goes on, as a benchmark's does; only the request has ended.
        assert await asyncio.to_thread(left.wait, 20)

    asyncio.run(main())
    thread.join(20)
    listener.close()
