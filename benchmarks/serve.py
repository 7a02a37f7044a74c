"""A server of OpenAI's API under load over real connections: latencies, throughput, goodput, and the client's own cost.

    python benchmarks/serve.py servers=phalanx=http://127.0.0.1:8000/v1,vllm=http://127.0.0.1:8001/v1 \\
        concurrencies=1,8,32 rates=1,2,4 repeats=5 plot=serve.svg out=serve.json

Closed loop (`concurrencies`): so many requests are always under way. Open loop (`rates`): requests a second begin as a
Poisson process, whatever is under way, and TTFT counts from when a request was due. Servers are measured in turns, with
a pause before each, for some spin on after their last token, and each round begins with the next one; the figures are
those of the median round. Goodput counts requests that keep both targets. The client is measured by itself, against a
server that answers at once (lab/http_load/trivial_server.py), and the share of a processor that it takes stands beside
each figure. The key of a server that needs one is the environment variable OPENAI_API_KEY. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from phalanx.benchmarks.lab.common import percentiles, run
from phalanx.benchmarks.lab.http_load.answers import Answer, read_answer
from phalanx.benchmarks.lab.http_load.client import Exchange, Target
from phalanx.benchmarks.lab.peers.plot import chart, document
from phalanx.engine.errors import ConfigError, EngineStopped

TRIVIAL_SERVER = Path(__file__).parent / "lab" / "http_load" / "trivial_server.py"
WORDS = re.findall(
    r"\w+",
    "time people way water day man year good work life world hand part place week case point government company number "
    "group problem fact house line school country night story book word business power money room mother area father",
)


@dataclass
class Options:
    """What to measure."""

    servers: str = "server=http://127.0.0.1:8000/v1"  # NAME=BASE_URL[,...]; ratios are of the first to each other
    model: str | None = None  # by its name at the servers; without one the first that each server lists
    endpoint: str = "completions"  # or chat
    concurrencies: str | None = "1,8,32"  # closed loop: requests under way
    rates: str | None = None  # open loop: requests a second
    requests: int = 64  # of each run
    prompt_tokens: int = 128  # words of the prompt, each about a token
    shared_tokens: int = 0  # words with which all prompts begin
    new_tokens: int = 64
    ignore_eos: bool = True  # false for servers that refuse the field
    ttft_target_ms: float = 500.0  # of a request that counts as good
    tpot_target_ms: float = 100.0
    timeout_s: float = 600.0  # of one request
    repeats: int = 3
    pause_s: float = 2.0  # between two servers' runs: vLLM's worker spins for a second after its last token
    seed: int = 0
    plot: str | None = None  # a file for the plot, SVG
    out: str | None = None  # a file for the JSON line

    def targets(self) -> dict[str, str]:
        """Base URLs by name. Raises ConfigError."""
        named = dict(pair.partition("=")[::2] for pair in self.servers.split(","))
        if not all(named) or not all(url.startswith(("http://", "https://")) for url in named.values()):
            raise ConfigError(f"servers={self.servers!r} must be NAME=http://HOST:PORT/v1[,NAME=...]")
        return named

    def levels(self) -> list[Level]:
        """The loads to measure. Raises ConfigError."""
        try:
            levels = [Level(concurrency=int(text)) for text in (self.concurrencies or "").split(",") if text]
            levels += [Level(rate=float(text)) for text in (self.rates or "").split(",") if text]
        except ValueError:
            levels = []
        if not levels or any(not (level.rate > 0 or level.concurrency > 0) for level in levels):
            raise ConfigError(
                f"concurrencies={self.concurrencies!r} and rates={self.rates!r} must be numbers above 0, with commas "
                f"between, and one of them must be given"
            )
        return levels

    def check(self) -> None:
        """Raises ConfigError for what cannot be run."""
        for name, least in {
            "requests": 1,
            "prompt_tokens": 1,
            "new_tokens": 1,
            "repeats": 1,
            "shared_tokens": 0,
        }.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.pause_s <= 600:
            raise ConfigError(f"pause_s={self.pause_s} must be from 0 to 600 seconds")
        if self.endpoint not in ("completions", "chat"):
            raise ConfigError(f"endpoint={self.endpoint!r} must be completions or chat")
        if self.shared_tokens > self.prompt_tokens:
            raise ConfigError(f"shared_tokens={self.shared_tokens} is above prompt_tokens={self.prompt_tokens}")


@dataclass(frozen=True)
class Level:
    """One load: a number of requests under way, or a rate."""

    concurrency: int = 0
    rate: float = 0.0  # requests a second; 0 for a closed loop

    @property
    def name(self) -> str:
        return f"rate {self.rate:g}" if self.rate else f"concurrency {self.concurrency}"


class Load:
    """Sends the requests of one run to one server."""

    def __init__(self, options: Options, target: Target, model: str, level: Level, seed: int) -> None:
        self._options = options
        self._target = target
        self._level = level
        self._path = "/completions" if options.endpoint == "completions" else "/chat/completions"
        self._bodies = make_bodies(options, model, seed)
        self._gaps = random.Random(seed)

    async def run(self) -> dict[str, Any]:
        """Run the load. Returns its figures."""
        await self._target.connect(self._level.concurrency or 8)
        cpu, started = time.process_time(), time.monotonic()
        exchanges = await (self._open_loop() if self._level.rate else self._closed_loop())
        seconds, cpu = time.monotonic() - started, time.process_time() - cpu
        answers = [read_answer(exchange) for exchange in exchanges]
        return {**self._summarize(answers, seconds), "client_cpu_share": round(cpu / seconds, 3)}

    async def _closed_loop(self) -> list[Exchange]:
        bodies = iter(self._bodies)
        done: list[Exchange] = []

        async def work() -> None:
            for body in bodies:
                done.append(await self._target.post(self._path, body))

        await asyncio.gather(*(work() for _ in range(self._level.concurrency)))
        return done

    async def _open_loop(self) -> list[Exchange]:
        due = time.monotonic()
        running = []
        for body in self._bodies:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            running.append(asyncio.create_task(self._target.post(self._path, body, due)))
            due += self._gaps.expovariate(self._level.rate)
        return list(await asyncio.gather(*running))

    def _summarize(self, answers: list[Answer], seconds: float) -> dict[str, Any]:
        whole = [answer for answer in answers if answer.error is None]
        if not whole:
            raise EngineStopped(f"no request of {self._level.name} was answered; the first: {answers[0].error}")
        good = [
            answer
            for answer in whole
            if 1000 * answer.ttft_s <= self._options.ttft_target_ms and answer.tpot_ms <= self._options.tpot_target_ms
        ]
        return {
            "seconds": round(seconds, 3),
            "requests": len(answers),
            "failed": len(answers) - len(whole),
            "first_failure": next((answer.error for answer in answers if answer.error is not None), None),
            "prompt_tokens": sum(answer.prompt_tokens for answer in whole),
            "output_tokens": sum(answer.output_tokens for answer in whole),
            "output_tokens_per_s": round(sum(answer.output_tokens for answer in whole) / seconds, 1),
            "requests_per_s": round(len(whole) / seconds, 3),
            "goodput_requests_per_s": round(len(good) / seconds, 3),
            "goodput_share": round(len(good) / len(answers), 3),
            "ttft_ms": percentiles([1000 * answer.ttft_s for answer in whole], 2),
            "tpot_ms": percentiles([answer.tpot_ms for answer in whole if answer.output_tokens > 1], 3),
            "itl_ms": percentiles([1000 * gap for answer in whole for gap in answer.gaps_s], 3),
            "e2e_ms": percentiles([1000 * answer.e2e_s for answer in whole], 1),
            "late_ms": percentiles([1000 * answer.late_s for answer in answers], 2),
        }


def make_bodies(options: Options, model: str, seed: int) -> list[bytes]:
    """The requests of a run: greedy, of new_tokens each, with prompts that only begin alike where that is asked for."""
    shared = " ".join(random.Random(options.seed).choices(WORDS, k=options.shared_tokens))
    words = random.Random(seed)
    bodies = []
    for _ in range(options.requests):
        own = " ".join(words.choices(WORDS, k=options.prompt_tokens - options.shared_tokens))
        text = f"{shared} {own}".strip()
        prompt = {"prompt": text} if options.endpoint == "completions" else {"messages": [_user(text)]}
        body = {
            "model": model,
            **prompt,
            "max_tokens": options.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if options.ignore_eos else {}),
        }
        bodies.append(msgspec.json.encode(body))
    return bodies


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def first_model(name: str, target: Target) -> str:
    """The first model that a server lists. Raises EngineStopped if it does not answer so."""
    exchange = await target.get("/models")
    try:
        listed = msgspec.json.decode(b"".join(piece for _, piece in exchange.pieces))
        return str(listed["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError):
        why = exchange.error or f"status {exchange.status}"
        raise EngineStopped(f"{name} lists no model at /models ({why}): start it, or give its base URL") from None


async def measure_client(options: Options, level: Level) -> dict[str, Any]:
    """The same load against a server that answers at once: what is left is the client's, and the kernel's."""
    with trivial_server(options.new_tokens) as url:
        target = Target(url, None, options.timeout_s)
        closed = Level(concurrency=level.concurrency or 8)
        try:
            await Load(options, target, "trivial", closed, options.seed).run()
            figures = await Load(options, target, "trivial", closed, options.seed).run()
        finally:
            target.close()
    pieces = figures["output_tokens"]
    return {
        "concurrency": closed.concurrency,
        "output_tokens_per_s": figures["output_tokens_per_s"],
        "ttft_ms": figures["ttft_ms"],
        "cpu_us_per_token": round(1e6 * figures["client_cpu_share"] * figures["seconds"] / pieces, 2),
    }


@contextmanager
def trivial_server(tokens: int) -> Iterator[str]:
    """A trivial server in a process of its own; its base URL."""
    process = subprocess.Popen([sys.executable, str(TRIVIAL_SERVER), str(tokens)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


async def measure_all(options: Options) -> dict[str, Any]:
    """Every level, round after round, the servers in turns."""
    key = os.environ.get("OPENAI_API_KEY")
    targets = {name: Target(url, key, options.timeout_s) for name, url in options.targets().items()}
    levels = options.levels()
    models = {name: options.model or await first_model(name, target) for name, target in targets.items()}
    client = await measure_client(options, max(levels, key=lambda level: level.concurrency))

    runs: dict[tuple[str, Level], list[dict[str, Any]]] = {(name, level): [] for name in targets for level in levels}
    for number in range(options.repeats):
        for level in levels:
            names = list(targets)
            names = names[number % len(names) :] + names[: number % len(names)]
            for name in names:
                # Each round has prompts of its own: a prefix cache must not know them.
                load = Load(options, targets[name], models[name], level, options.seed + 1 + number)
                await asyncio.sleep(options.pause_s)
                figures = await load.run()
                runs[name, level].append(figures)
                print(f"{name}, {level.name}: {figures['output_tokens_per_s']} output tokens/s", flush=True)
    for target in targets.values():
        target.close()
    return {"benchmark": "serve", "models": models, "client": client, **tables(list(targets), levels, runs)}


def tables(
    names: list[str], levels: list[Level], runs: dict[tuple[str, Level], list[dict[str, Any]]]
) -> dict[str, Any]:
    """The median run of each server and level, and the ratios of the first server to the others within the rounds."""
    results = []
    for (name, level), rounds in runs.items():
        median = sorted(rounds, key=lambda figures: figures["output_tokens_per_s"])[(len(rounds) - 1) // 2]
        each = [figures["output_tokens_per_s"] for figures in rounds]
        where = {"server": name, "mode": "open" if level.rate else "closed", "level": level.rate or level.concurrency}
        results.append({**where, **median, "runs_output_tokens_per_s": each})

    ratios = []
    for other in names[1:]:
        for level in levels:
            pairs = list(zip(runs[names[0], level], runs[other, level], strict=True))
            ratios.append(
                {
                    "of": names[0],
                    "to": other,
                    "level": level.name,
                    "output_tokens_per_s": _ratio(
                        [(a["output_tokens_per_s"], b["output_tokens_per_s"]) for a, b in pairs]
                    ),
                    "ttft_p95": _ratio([(a["ttft_ms"]["p95"], b["ttft_ms"]["p95"]) for a, b in pairs]),
                }
            )
    return {"results": results, "ratios": ratios}


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def draw(results: list[dict[str, Any]]) -> str:
    """The plot, SVG: throughput, goodput and p95 of TTFT over each kind of load."""
    charts = []
    for mode, label in (("closed", "requests under way"), ("open", "requests a second")):
        of_mode = [result for result in results if result["mode"] == mode]
        for title, unit, read in (
            ("Output tokens a second", "tokens/s", lambda result: result["output_tokens_per_s"]),
            ("Requests a second that keep the targets", "requests/s", lambda result: result["goodput_requests_per_s"]),
            ("Time to first token, p95", "ms", lambda result: result["ttft_ms"]["p95"]),
        ):
            lines: dict[str, list[tuple[float, float]]] = {}
            for result in of_mode:
                lines.setdefault(result["server"], []).append((result["level"], read(result)))
            if lines:
                charts.append(chart(title, label, unit, lines))
    return document(charts)


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    options.check()
    options.targets()
    options.levels()
    result = _run_async(measure_all(options))
    if options.plot is not None:
        Path(options.plot).write_text(draw(result["results"]))
    return result


def _run_async(main: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
    import uvloop

    return uvloop.run(main)


if __name__ == "__main__":
    run(Options, measure)
