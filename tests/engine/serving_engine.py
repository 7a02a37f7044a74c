"""An engine behind ZeroMQ in this process, and what its memory is, for tests of much traffic."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from phalanx.engine.client.client import Client
from phalanx.engine.client.llm import choose_device
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine, EngineThread
from phalanx.engine.protocol.transport import ZmqConnection, ZmqTransport
from phalanx.parallel.group import local_group

PATIENCE_S = 120.0
CLOSE_S = 5.0


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@contextmanager
def serving(folder: Path, address: str, **config: Any) -> Iterator[None]:
    """An engine at `address`. At the end nothing may be left in it, and closing it takes CLOSE_S at most."""
    settings = EngineConfig.from_dict({"model": str(folder), **config})
    engine = Engine(settings, local_group(choose_device(settings)), ZmqTransport(address))
    assert engine.coordinator is not None
    engine.coordinator.start()
    failures: list[Exception] = []
    thread = EngineThread(engine, failures.append)
    try:
        yield
        client = Client(ZmqConnection(address))
        deadline = time.monotonic() + PATIENCE_S
        while (status := client.status(PATIENCE_S)).running or status.waiting:
            assert time.monotonic() < deadline, "requests are left that nobody waits for"
            time.sleep(0.05)
        assert status.free_blocks == status.total_blocks
        client.close()
    finally:
        began = time.monotonic()
        thread.stop()
        engine.close()
        took_s = time.monotonic() - began
    assert failures == []
    assert took_s <= CLOSE_S
