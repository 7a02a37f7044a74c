"""What the gateway costs: throughput beside AsyncLLM's, time from token to byte, memory, time until it is ready.

    python benchmarks/gateway.py model=models/smollm2-135m out=gateway.json

Throughput: `streams` requests at once by launch.serve, and the same prompts and lengths by AsyncLLM in the process that
asks; in turns, each with an engine of its own that ends before the next begins; the ratio is the median of the rounds'.
The load client shares the machine, so its part of a processor stands beside. Token to byte: an engine without a model
stamps its tokens with the moment of their sending (lab/http_load/stamping_engine.py), and the client subtracts it from
the moment of arrival. Memory of a stream: what the gateway has more with `idle` streams open and silent. Ready: from
the start of launch.gateway's process, with the engine running, to the line that says so. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import uvloop
from phalanx.benchmarks.lab.common import percentiles, run
from phalanx.benchmarks.lab.http_load.client import Exchange, Target
from phalanx.benchmarks.lab.http_load.stamping_engine import MODEL
from phalanx.benchmarks.serve import Level, Load, make_bodies
from phalanx.benchmarks.serve import Options as LoadOptions
from phalanx.engine.errors import ConfigError, EngineStopped

HERE = Path(__file__).parent / "lab" / "http_load"
STEP_S = 0.02
"""Between two tokens of the stamping engine: about a step of a model."""
SETTLE_S = 1.0
_STAMP = re.compile(rb"(\d+\.\d{6}) ")


@dataclass
class Options:
    """What to measure."""

    model: str = "models/smollm2-135m"
    ranks: int = 1
    dtype: str = "float32"
    max_model_len: int = 1024
    streams: int = 64  # at once, for the throughput
    prompt_tokens: int = 32  # words of a prompt, each about a token
    new_tokens: int = 64
    repeats: int = 3  # rounds of AsyncLLM and launch.serve
    few: int = 8  # streams, for the time from token to byte
    stamped_tokens: int = 200  # of each of them
    idle: int = 1000  # open streams, for the memory
    parts: str = "throughput,latency,memory"
    out: str | None = None  # a file for the JSON line

    def check(self) -> None:
        """Raises ConfigError for what cannot be run."""
        for name in ("ranks", "streams", "prompt_tokens", "new_tokens", "repeats", "few", "stamped_tokens", "idle"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        unknown = set(self.parts.split(",")) - {"throughput", "latency", "memory"}
        if unknown:
            raise ConfigError(f"parts={self.parts!r} must be of throughput, latency and memory, with commas between")

    def load(self, round_number: int) -> tuple[LoadOptions, int]:
        """The requests of a round, and their seed: prompts that no prefix cache knows."""
        load = LoadOptions(requests=self.streams, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens)
        return load, 1000 + round_number


class Program:
    """A program that prints a line once it is ready; its memory and processor time can be read."""

    def __init__(self, *arguments: str, stdin: str = "") -> None:
        self._arguments = arguments
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(stdin)
        self._process.stdin.close()

    def line(self) -> str:
        """The next line that it prints. Raises EngineStopped if it ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EngineStopped(f"{' '.join(self._arguments[:3])} ended with code {self._process.wait()}")
        return line

    def url(self) -> str:
        """Where a server answers, once it is ready."""
        return self.line().split(" at ")[1].split()[0]

    @property
    def memory(self) -> int:
        """Resident bytes of the process itself."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the process itself."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def end(self) -> None:
        """End it, and wait for it and what it started."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait(60)


@contextlib.contextmanager
def program(*arguments: str, stdin: str = "") -> Iterator[Program]:
    """A program that ends with the block."""
    started = Program(*arguments, stdin=stdin)
    try:
        yield started
    finally:
        started.end()


def measure_in_process(options: Options, number: int) -> dict[str, Any]:
    """One round of AsyncLLM: a first one to warm up, and the one that counts."""
    rounds = []
    for seed in (number + 500, number):
        load, first = options.load(seed)
        bodies = [json.loads(body) for body in make_bodies(load, "", first)]
        rounds.append([[body["prompt"], options.new_tokens] for body in bodies])
    arguments = (options.model, str(options.ranks), options.dtype, str(options.max_model_len))
    with program(str(HERE / "in_process.py"), *arguments, stdin=json.dumps(rounds)) as running:
        running.line()
        return dict(json.loads(running.line()))


async def measure_served(options: Options, number: int) -> dict[str, Any]:
    """The same of launch.serve."""
    settings = (f"model={options.model}", f"ranks={options.ranks}", f"dtype={options.dtype}", "port=0")
    with program(
        "-m", "phalanx.launch.serve", *settings, f"max_model_len={options.max_model_len}", "log_level=warning"
    ) as server:
        target = Target(f"{await asyncio.to_thread(server.url)}/v1", None, 600.0)
        level = Level(concurrency=options.streams)
        name = Path(options.model).name
        memory_before = server.memory
        for seed in (number + 500, number):
            load, first = options.load(seed)
            cpu_before = server.cpu_s
            figures = await Load(load, target, name, level, first).run()
        cpu_s = server.cpu_s - cpu_before
        target.close()
        if figures["failed"]:
            raise EngineStopped(f"{figures['failed']} requests failed: {figures['first_failure']}")
        return {
            **{key: figures[key] for key in ("output_tokens", "seconds", "output_tokens_per_s", "client_cpu_share")},
            "gateway_cpu_us_per_token": round(1e6 * cpu_s / figures["output_tokens"], 1),
            "gateway_mb_at_start": round(memory_before / 1e6, 1),
            "gateway_mb_after": round(server.memory / 1e6, 1),
        }


async def measure_throughput(options: Options) -> dict[str, Any]:
    """Both, in turns."""
    ours, theirs = [], []
    for number in range(options.repeats):
        turns = [True, False] if number % 2 else [False, True]
        for served in turns:
            if served:
                ours.append(await measure_served(options, number))
            else:
                theirs.append(await asyncio.to_thread(measure_in_process, options, number))
            print("launch.serve" if served else "AsyncLLM", (ours if served else theirs)[-1], flush=True)
    ratios = [a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in zip(ours, theirs, strict=True)]
    return {
        "served": ours,
        "in_process": theirs,
        "served_to_in_process": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


@contextlib.contextmanager
def stamping_gateway(step_s: float) -> Iterator[tuple[Program, str]]:
    """A gateway in front of a stamping engine, and its base URL."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/engine"
        with program(str(HERE / "stamping_engine.py"), address, str(step_s)):
            # The engine must run before the gateway, whose time until it is ready is measured.
            while not Path(folder, "engine").exists():
                time.sleep(0.01)
            arguments = ("-m", "phalanx.launch.gateway", f"engines=[{address}]", "port=0", "log_level=warning")
            with program(*arguments, "max_open_requests=65536") as gateway:
                yield gateway, f"{gateway.url()}/v1"


def _body(new_tokens: int) -> bytes:
    return msgspec.json.encode({"model": MODEL, "prompt": [1], "max_tokens": new_tokens, "stream": True})


async def measure_latency(options: Options) -> dict[str, Any]:
    """From the moment at which a token is sent to the arrival of its bytes, of a few streams."""
    with stamping_gateway(STEP_S) as (gateway, url):
        ready_s = time.monotonic() - gateway.started
        target = Target(url, None, 600.0)
        await target.connect(options.few)
        body = _body(options.stamped_tokens)
        exchanges = await asyncio.gather(*(target.post("/completions", body) for _ in range(options.few)))
        target.close()
    waits = [wait for exchange in exchanges for wait in _waits(exchange)]
    if len(waits) != options.few * options.stamped_tokens:
        raise EngineStopped(f"{len(waits)} of {options.few * options.stamped_tokens} tokens arrived")
    return {"gateway_ready_s": round(ready_s, 2), "token_to_byte_ms": percentiles([1000 * wait for wait in waits], 3)}


def _waits(exchange: Exchange) -> list[float]:
    return [arrived - float(stamp) for arrived, piece in exchange.pieces for stamp in _STAMP.findall(piece)]


async def measure_memory(options: Options) -> dict[str, Any]:
    """The gateway's memory with open streams that are silent, and without."""
    with stamping_gateway(0.0) as (gateway, url):
        target = Target(url, None, 600.0)
        # What the first requests allocate once is no stream's.
        await asyncio.gather(*(target.post("/completions", _body(1)) for _ in range(64)))
        await asyncio.sleep(SETTLE_S)
        before = gateway.memory
        await target.connect(options.idle)
        streams = [asyncio.create_task(target.post("/completions", _body(2))) for _ in range(options.idle)]
        await asyncio.sleep(SETTLE_S + options.idle / 200)
        ended = [stream for stream in streams if stream.done()]
        if ended:
            raise EngineStopped(f"{len(ended)} streams ended: {ended[0].result().error or ended[0].result().status}")
        opened = gateway.memory
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        target.close()
    return {
        "gateway_mb": round(before / 1e6, 1),
        "gateway_mb_with_open_streams": round(opened / 1e6, 1),
        "kb_per_open_stream": round((opened - before) / options.idle / 1e3, 1),
    }


async def measure_all(options: Options) -> dict[str, Any]:
    """The parts that are asked for."""
    parts = {"latency": measure_latency, "memory": measure_memory, "throughput": measure_throughput}
    asked = options.parts.split(",")
    return {"benchmark": "gateway", **{name: await part(options) for name, part in parts.items() if name in asked}}


def measure(options: Options) -> dict[str, Any]:
    """Run everything."""
    options.check()
    return uvloop.run(measure_all(options))


if __name__ == "__main__":
    run(Options, measure)
