"""Clients that leave at every moment of a request, and what the server still holds once they are gone.

    python -m phalanx.tests.serving.soak MODEL [disconnects=10000] [connections=1000] [under_way=64]

It starts a group and a gateway in front of it, and prints one JSON object. check() raises AssertionError for a leak.
With fewer disconnects than the pool has blocks (2048), the first use of each page of the KV cache counts as one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import resource
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx.benchmarks.lab.http_load.client import Target
from phalanx.engine.client.client import Client
from phalanx.engine.coordinator.text.template_processes import PROCESSES
from phalanx.engine.protocol.messages import Status
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.tests.launch.programs import family
from phalanx.tests.serving.servers import RunningServer, running

MOMENTS = ("head", "body", "sent", "waiting", "prefill", "first", "middle", "end", "stays")
"""When a client leaves: within the head or the body, once it has sent them, after a moment without reading, at the
first byte of the answer, in its middle, at its last bytes; the last kind stays."""
TIMEOUT_S = 240.0
OPEN_FILES = 8192
"""Descriptors that a thousand connections need on each side, and some."""
TEMPLATES = "phalanx.engine.coordinator.text.sandbox"
WORDS = ("time", "people", "way", "water", "day", "man", "year", "good", "work", "life", "world", "hand", "part")
SETTINGS = ("max_open_requests=256", "poll_interval_s=0.2", "log_level=warning", "port=0")


@dataclass
class Holding:
    """What the server's processes hold at one moment."""

    gateway_mb: float
    group_mb: float
    descriptors: int
    group_descriptors: int
    template_processes: int  # each is one descriptor of the group's
    tasks: int
    free_blocks: int
    total_blocks: int

    def is_at_rest(self, before: Holding) -> bool:
        """Whether no more is held than there was before any client, but for memory and processes for templates."""
        started = self.template_processes - before.template_processes
        return (
            self.tasks <= before.tasks
            and self.descriptors <= before.descriptors + 2
            and self.group_descriptors <= before.group_descriptors + started + 2
        )


@dataclass
class Report:
    """What a run has seen."""

    disconnects: int = 0
    moments: dict[str, int] = field(default_factory=Counter)
    outcomes: dict[str, int] = field(default_factory=Counter)
    seconds: float = 0.0
    crowd: dict[str, int] = field(default_factory=Counter)
    """How the connections that were open all at once were answered, by status or "left"."""
    crowd_peak_gateway_mb: float = 0.0
    held: list[Holding] = field(default_factory=list)
    """Before, after each part of the disconnects, at the end."""


class Place:
    """A running server, and how to look at it."""

    def __init__(self, gateway: RunningServer, worker: RunningServer, address: str) -> None:
        self.url = gateway.url
        self.port = int(self.url.rpartition(":")[2])
        self._gateway = psutil.Process(gateway.process.pid)
        self._group = family(worker.process.pid)
        self.client = Client(ZmqConnection(address))
        # Not kept alive: an idle connection would be a descriptor, and its watcher a task.
        self._http = httpx.Client(base_url=self.url, timeout=30, headers={"connection": "close"})

    def close(self) -> None:
        """Look at it no more."""
        self.client.close()
        self._http.close()

    def gateway_mb(self) -> float:
        """The gateway's resident memory."""
        return float(round(self._gateway.memory_info().rss / 2**20, 1))

    async def settled(self, at_rest: Holding | None = None) -> Holding:
        """What is held once nothing is under way, and no more than `at_rest`. Fails if that does not come to be."""
        deadline = time.monotonic() + 60
        while True:
            status = await asyncio.to_thread(self.client.status, 30)
            numbers = await asyncio.to_thread(self._numbers)
            held = self._holding(status, numbers)
            idle = (status.running, status.waiting) == (0, 0) and held.free_blocks == held.total_blocks
            if idle and (at_rest is None or held.is_at_rest(at_rest)):
                return held
            assert time.monotonic() < deadline, f"the server does not come to rest: {held}, {status}"
            await asyncio.sleep(0.1)

    def _numbers(self) -> dict[str, float]:
        text = self._http.get("/metrics").text
        return {name: float(value) for name, value in re.findall(r"^([a-z:_]+)(?:{.*})? (\S+)$", text, re.MULTILINE)}

    def _holding(self, status: Status, numbers: dict[str, float]) -> Holding:
        return Holding(
            gateway_mb=self.gateway_mb(),
            group_mb=float(round(sum(process.memory_info().rss for process in self._group) / 2**20, 1)),
            descriptors=int(numbers["process_open_fds"]),
            group_descriptors=sum(process.num_fds() for process in self._group),
            template_processes=sum(template_processes(process) for process in self._group),
            tasks=int(numbers["phalanx:gateway_tasks"]),
            free_blocks=status.free_blocks,
            total_blocks=status.total_blocks,
        )


def template_processes(process: psutil.Process) -> int:
    """How many processes a rank has that render chat templates."""
    found = 0
    for child in process.children():
        with contextlib.suppress(psutil.Error):  # it ends meanwhile
            found += TEMPLATES in child.cmdline()
    return found


@contextlib.contextmanager
def place(model: str | Path, folder: Path, *settings: str) -> Iterator[Place]:
    """A group and a gateway in front of it, which may have as many connections open as this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    address = f"ipc://{folder}/engine"
    options = ("max_model_len=512", "max_num_seqs=64", "dtype=float32")
    with (
        running("worker", f"model={model}", f"endpoint={address}", *options) as worker,
        running("gateway", f"engines=[{address}]", *SETTINGS, *settings) as gateway,
    ):
        found = Place(gateway, worker, address)
        try:
            yield found
        finally:
            found.close()
        assert "Traceback" not in gateway.text, gateway.text
        assert "Traceback" not in worker.text, worker.text


def make_request(rng: random.Random) -> tuple[str, bytes]:
    """A route and a body of any kind that is answered with tokens."""
    words = " ".join(rng.choices(WORDS, k=rng.choice((3, 8, 8, 40))))
    fields: dict[str, Any] = {"stream": rng.random() < 0.6, "ignore_eos": True, "temperature": rng.choice((0, 1))}
    if rng.random() < 0.2:
        fields["n"] = 2
    new_tokens = rng.choice((1, 4, 12, 40))
    kind = rng.randrange(3)
    if kind == 0:
        path = "/v1/completions"
        fields |= {"prompt": [words] * rng.choice((1, 1, 3)), "max_tokens": new_tokens}
    elif kind == 1:
        path = "/v1/chat/completions"
        fields |= {"messages": [{"role": "user", "content": words}], "max_tokens": new_tokens}
        if rng.random() < 0.2:
            fields |= {"logprobs": True, "top_logprobs": 2}
    else:
        path = "/inference/v1/generate"
        names = ("ignore_eos", "temperature", "n")
        sampling: dict[str, Any] = {name: fields.pop(name) for name in names if name in fields}
        ids = [rng.randrange(3, 200) for _ in range(len(words) // 4)]
        fields |= {"token_ids": ids, "sampling_params": {**sampling, "max_tokens": new_tokens}}
    return path, json.dumps(fields).encode()


async def visit(place: Place, rng: random.Random, moment: str) -> str:
    """One connection that is closed at a moment; what came of it."""
    path, body = make_request(rng)
    lines = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    # Who reads does so until the connection ends.
    reads = moment in ("middle", "end", "stays")
    head = (lines + ("Connection: close\r\n" if reads else "") + "\r\n").encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
    try:
        if moment == "head":
            writer.write(head[: rng.randrange(len(head))])
            return "left"
        writer.write(head)
        if moment == "body":
            writer.write(body[: rng.randrange(len(body))])
            return "left"
        writer.write(body)
        if moment == "sent":
            return "left"
        if moment in ("waiting", "prefill"):
            await asyncio.sleep(rng.random() * (0.02 if moment == "waiting" else 0.3))
            return "left"
        return await _read(reader, rng, moment)
    finally:
        _leave(writer, rng)


async def _read(reader: asyncio.StreamReader, rng: random.Random, moment: str) -> str:
    data = await reader.read(1)
    if moment == "first":
        return "left"
    most = rng.randrange(200, 3000) if moment == "middle" else sys.maxsize
    while piece := await reader.read(65536):
        data += piece
        if len(data) > most or (moment == "end" and (b"finish_reason" in piece or b"[DONE]" in piece)):
            return "left"
    status = data.split(maxsplit=2)[1].decode()
    return status if _whole(data) and status in ("200", "429") else f"{status}: {data[-300:]!r}"


def _whole(data: bytes) -> bool:
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return len(body) >= int(length[1]) if length else data.endswith(b"0\r\n\r\n") and b"[DONE]" in data


def _leave(writer: asyncio.StreamWriter, rng: random.Random) -> None:
    """Close with a word to the server, or without one (a reset)."""
    if rng.random() < 0.5:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


async def disconnects(place: Place, report: Report, count: int, under_way: int, seed: int) -> None:
    """Make `count` visits that end at random moments."""
    rng = random.Random(seed)
    started = time.monotonic()
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            moment = rng.choice(MOMENTS)
            outcome = await asyncio.wait_for(visit(place, rng, moment), TIMEOUT_S)
            report.moments[moment] += 1
            report.outcomes[outcome] += 1

    await asyncio.gather(*(work() for _ in range(under_way)))
    report.disconnects += count
    report.seconds += round(time.monotonic() - started, 1)


async def crowd(place: Place, report: Report, connections: int, seed: int, new_tokens: int) -> None:
    """So many connections at once, each with a request; every tenth client gives up."""
    target = Target(f"{place.url}/v1", None, TIMEOUT_S)
    await target.connect(connections)

    async def ask(number: int) -> None:
        prompt = " ".join(random.Random(seed + number).choices(WORDS, k=8))
        body = {"prompt": prompt, "max_tokens": new_tokens, "ignore_eos": True, "stream": number % 2 == 0}
        asked = asyncio.create_task(target.post("/completions", json.dumps(body).encode()))
        if number % 10 == 0:
            await asyncio.sleep(0.5)
            if not asked.done():
                asked.cancel()
                report.crowd["left"] += 1
                return
        exchange = await asked
        report.crowd[str(exchange.error or exchange.status)] += 1

    asking = asyncio.gather(*(ask(number) for number in range(connections)))
    while not asking.done():
        report.crowd_peak_gateway_mb = max(report.crowd_peak_gateway_mb, place.gateway_mb())
        await asyncio.sleep(0.05)
    await asking
    target.close()


async def soak(
    place: Place, count: int, connections: int, under_way: int = 64, parts: int = 5, new_tokens: int = 8
) -> Report:
    """Run it; what is held is noted after each part, each of which is a fresh chance to come to rest."""
    report = Report()
    at_rest = await place.settled()
    report.held.append(at_rest)
    await crowd(place, report, connections, 0, new_tokens)
    report.held.append(await place.settled(at_rest))
    for part in range(parts):
        await disconnects(place, report, count // parts, under_way, part)
        report.held.append(await place.settled(at_rest))
    return report


def check(report: Report, connections: int, growth_mb: float) -> None:
    """Fail for a request without an answer, and for what is left of clients that are gone."""
    assert sum(report.crowd.values()) == connections
    assert set(report.crowd) <= {"200", "429", "left"}, report.crowd
    assert set(report.outcomes) <= {"200", "429", "left"}, report.outcomes
    # The engine's memory grows until each page of its KV cache has been used once: the second half counts.
    first, warm, last = report.held[0], report.held[len(report.held) // 2], report.held[-1]
    for held in report.held:
        assert held.free_blocks == held.total_blocks
        assert held.is_at_rest(first), report.held
        assert held.template_processes <= PROCESSES
    assert last.gateway_mb - report.held[1].gateway_mb <= growth_mb, report.held
    assert last.group_mb - warm.group_mb <= growth_mb, report.held


def main() -> None:
    """Run it as a program."""
    options = {"disconnects": "10000", "connections": "1000", "under_way": "64"}
    options |= dict(argument.split("=") for argument in sys.argv[2:])
    count, connections = int(options["disconnects"]), int(options["connections"])
    with tempfile.TemporaryDirectory() as folder, place(sys.argv[1], Path(folder)) as found:
        report = asyncio.run(soak(found, count, connections, int(options["under_way"])))
    print(json.dumps({**vars(report), "held": [vars(held) for held in report.held]}))
    check(report, connections, growth_mb=16.0)


if __name__ == "__main__":
    main()
