"""Kills and stops ranks of a server under load at random, and says of every request what came of it.

    python benchmarks/parts/chaos.py model=models/smollm2-135m ranks=2 seconds=1800 fault_every_s=20 seed=1

A launch.serve of its own first answers each kind of request undisturbed (greedy, seeded, several completions, stop
strings, log-probabilities; as a stream and whole). Then clients ask for the same again and again, some hang up in the
middle, and now and then a burst comes, while ranks are sent SIGKILL or SIGSTOP. In float32 every answer must be the
undisturbed one's. At the end nothing may be left: no request, no block, no process, no shared memory, no folder. The
last line is JSON; the exit code is 1 unless all is well.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from phalanx.benchmarks.lab.common import model_folder, run
from phalanx.engine.errors import EngineStopped

PATIENCE_S = 180.0
STOP_S = 10.0
HANG_UP_SHARE = 0.1
"""Share of the streams whose client leaves after their first text."""
BURST_EVERY = 25
"""One request in so many brings a burst of as many as there are clients."""
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "presence_penalty": 0.6, "frequency_penalty": 0.6},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 0.8, "seed": 6, "n": 2, "logprobs": 2},
    {"temperature": 0, "stop": [" the", "\n\n"], "min_tokens": 10},
)
PROMPTS = ("Once upon a time, in a village by the sea,", "def fibonacci(n):\n", "The capital of France is")


@dataclass
class Options:
    """What to disturb, and for how long."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "smollm2_135m"  # a preset of configs/models
    ranks: int = 2
    seconds: float = 60.0
    fault_every_s: float = 15.0  # on average
    clients: int = 8  # that ask one request after the other
    max_tokens: int = 60
    step_timeout_s: float = 3.0
    seed: int = 0  # of what is asked and of what goes wrong
    out: str | None = None  # a file for the JSON line


class Server:
    """A launch.serve in a process of its own, with a folder for all that it leaves on disk."""

    def __init__(self, options: Options) -> None:
        self._before = set(os.listdir("/dev/shm"))
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-"))
        self._log = (self.folder / "log").open("w+")
        settings = [
            f"model={model_folder(options.model, options.random)}",
            f"ranks={options.ranks}",
            f"step_timeout_s={options.step_timeout_s}",
            f"max_restarts={10**6}",
            *("dtype=float32", "max_model_len=512", "port=0", "poll_interval_s=0.2", "served_model_names=[m]"),
            *("log_level=error", "affinity_entries=1"),
        ]
        (self.folder / "tmp").mkdir()
        self.process = psutil.Popen(
            [sys.executable, "-m", "phalanx.launch.serve", *settings],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "TMPDIR": str(self.folder / "tmp")},
        )
        self.url = self._url()

    def _url(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "is ready at" in line:
                return str(line.split(" at ")[1].split()[0])
        raise EngineStopped(f"the server ended before it was ready: {self.log[-2000:]}")

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return (self.folder / "log").read_text()

    def ranks(self) -> list[psutil.Process]:
        """The processes of its ranks."""
        found = []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("launch.ranks.rank" in part for part in child.cmdline()):
                    found.append(child)
        return found

    def open_requests(self) -> dict[str, float]:
        """What its metrics say is still there, by metric."""
        names = ("phalanx:open_requests", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
        found = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text.splitlines():
            name = line.partition("{")[0]
            if name in names:
                found[name] = float(line.rpartition(" ")[2])
        return found

    def stop(self) -> list[str]:
        """End it. Returns what it leaves behind."""
        everyone = [self.process, *self.process.children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        left = [f"process {each.pid}" for each in psutil.wait_procs(everyone, timeout=STOP_S)[1]]
        for each in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        left += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._before if "phalanx" in name]
        return left + [str(path) for path in (self.folder / "tmp").iterdir()]


def ask(url: str, body: dict[str, Any], leave: bool = False) -> Any:
    """Return the texts, reasons and log-probabilities of an answer; None of one that was left in the middle."""
    if not body.get("stream"):
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        answer.raise_for_status()
        return [(choice["text"], choice["finish_reason"], _tokens(choice)) for choice in answer.json()["choices"]]

    count = body.get("n", 1)
    texts, reasons, tokens = [""] * count, [None] * count, [[] for _ in range(count)]  # type: ignore[var-annotated]
    done = False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            done = done or line == "data: [DONE]"
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise EngineStopped(str(event["error"]))
            for choice in event["choices"]:
                place = choice["index"]
                texts[place] += choice["text"]
                tokens[place] += _tokens(choice)
                reasons[place] = choice["finish_reason"] or reasons[place]
                if leave and texts[place]:
                    return None
    if not done:
        raise EngineStopped("the stream ended without [DONE]")
    return list(zip(texts, reasons, tokens, strict=True))


def _tokens(choice: dict[str, Any]) -> list[str]:
    return list((choice.get("logprobs") or {}).get("tokens") or [])


class Chaos:
    """Clients and faults, until the time is up; and the verdicts."""

    def __init__(self, server: Server, options: Options, bodies: list[dict[str, Any]], expected: list[Any]) -> None:
        self._server, self._options = server, options
        self._bodies, self._expected = bodies, expected
        self._random = random.Random(options.seed)
        self._lock = threading.Lock()
        self._until = time.monotonic() + options.seconds
        self.verdicts: Counter[str] = Counter()
        self.words: list[str] = []
        self.faults: Counter[str] = Counter()

    def run(self) -> None:
        """Return once the time is up and every request has ended."""
        clients = [threading.Thread(target=self._ask_on) for _ in range(self._options.clients)]
        for client in clients:
            client.start()
        while (left := self._until - time.monotonic()) > 0:
            time.sleep(min(left, self._random.uniform(0.3, 1.7) * self._options.fault_every_s))
            if time.monotonic() < self._until:
                self._fault()
        for client in clients:
            client.join()

    def _fault(self) -> None:
        ranks = self._server.ranks()
        if ranks:
            number = self._random.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
            with contextlib.suppress(psutil.NoSuchProcess):
                self._random.choice(ranks).send_signal(number)
                self.faults[number.name] += 1

    def _ask_on(self) -> None:
        while time.monotonic() < self._until:
            self._ask_one()
            with self._lock:
                burst = self._random.randrange(BURST_EVERY) == 0
            if burst:
                more = [threading.Thread(target=self._ask_one) for _ in range(self._options.clients)]
                for each in more:
                    each.start()
                for each in more:
                    each.join()

    def _ask_one(self) -> None:
        with self._lock:
            number = self._random.randrange(len(self._bodies))
            leave = self._random.random() < HANG_UP_SHARE
        verdict = "lost"
        try:
            got = ask(self._server.url, self._bodies[number], leave)
            verdict = "left" if got is None else "same" if got == self._expected[number] else "different"
            words = f"{self._bodies[number]}: {got} instead of {self._expected[number]}"
        except (httpx.HTTPError, EngineStopped) as error:
            words = f"{self._bodies[number]}: {error!r}"
        with self._lock:
            self.verdicts[verdict] += 1
            if verdict in ("lost", "different"):
                self.words.append(words)


def make_bodies(max_tokens: int) -> Iterator[dict[str, Any]]:
    """Every kind of request to every prompt, whole and as a stream."""
    for prompt in PROMPTS:
        for kind in KINDS:
            for stream in (False, True):
                yield {
                    **{"model": "m", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": stream},
                    **kind,
                }


def disturb(options: Options) -> dict[str, Any]:
    """Run the whole of it."""
    server = Server(options)
    left: list[str] = []
    try:
        bodies = list(make_bodies(options.max_tokens))
        expected = [ask(server.url, body) for body in bodies]
        chaos = Chaos(server, options, bodies, expected)
        chaos.run()
        deadline = time.monotonic() + STOP_S
        while any(server.open_requests().values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = [f"{name} {value:g}" for name, value in server.open_requests().items() if value]
    finally:
        left += server.stop()

    verdicts = chaos.verdicts
    for words in chaos.words[:5]:
        print(words, file=sys.stderr)
    restarts = server.log.count("the group is started again")
    well = not verdicts["lost"] and not verdicts["different"] and verdicts["same"] > 0 and not left
    if well:
        shutil.rmtree(server.folder)
    else:
        print(f"what the server said is in {server.folder}", file=sys.stderr)
    return {
        "verdicts": dict(verdicts),
        "faults": dict(chaos.faults),
        "restarts": restarts,
        "left_behind": left,
        "well": well,
    }


def disturb_and_judge(options: Options) -> dict[str, Any]:
    """Run it; the program ends with 1 unless all is well."""
    result = disturb(options)
    if not result["well"]:
        print(json.dumps(result), flush=True)
        sys.exit(1)
    return result


if __name__ == "__main__":
    run(Options, disturb_and_judge)
