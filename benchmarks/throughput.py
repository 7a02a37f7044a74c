"""Tokens a second, latencies and memory under a load of random token ids or of a JSONL file.

    python benchmarks/throughput.py random=qwen2_5_0_5b requests=32 prompt_tokens=128 new_tokens=128 peer=transformers

peer=transformers runs its `generate` on the same prompts, in turns with phalanx and never at the same time. The figures
are those of the median run; the last line is JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from phalanx import LLM, EngineConfig, SamplingParams
from phalanx.benchmarks.lab.common import model_folder, percentiles, run
from phalanx.benchmarks.lab.peers.engines import PROGRAMS
from phalanx.benchmarks.lab.peers.process import EngineProcess
from phalanx.benchmarks.lab.peers.programs.program import Case, random_prompts
from phalanx.engine.client.client import to_error
from phalanx.engine.errors import ConfigError, InvalidRequest
from phalanx.engine.models.spec import read_config
from phalanx.engine.protocol.messages import Delta, Event, Failed, Finished, Submit
from phalanx.launch.cli.jsonl import BadLine, read_requests


@dataclass
class Options:
    """What to run. The last group are EngineConfig's."""

    model: str | None = None  # a folder; without one the random checkpoint of `random`
    random: str = "qwen2_5_0_5b"  # a preset of configs/models
    input: str | None = None  # JSONL lines {"prompt" | "messages" | "token_ids", "sampling"?} instead of random ids
    requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 128
    rate: float = 0.0  # requests a second, as a Poisson process; 0 sends all at once
    concurrency: int = 0  # requests under way at most; 0 sets no limit
    repeats: int = 3
    seed: int = 0
    peer: str | None = None  # transformers
    out: str | None = None  # a file for the JSON line

    ranks: int = 1
    dtype: str = "bfloat16"
    threads: int = 0
    tokenizer: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024  # larger activations than this leave the caches of a small CPU
    block_size: int | None = None
    kv_memory: float = 0.9
    prefix_cache: bool = False  # or else the second repeat would find the first one's prompts

    def engine_config(self, folder: Path) -> EngineConfig:
        """Raises ConfigError."""
        names = {f.name for f in dataclasses.fields(EngineConfig)} & {f.name for f in dataclasses.fields(self)}
        return EngineConfig(**{name: getattr(self, name) for name in names} | {"model": str(folder)})

    def check(self) -> None:
        """Raises ConfigError for what the benchmark itself cannot run."""
        at_least = {"requests": 1, "prompt_tokens": 1, "new_tokens": 1, "repeats": 1, "concurrency": 0, "rate": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.peer not in (None, "transformers"):
            raise ConfigError(f"peer={self.peer!r} must be transformers")
        if self.peer and (self.input or self.rate or self.concurrency):
            raise ConfigError(
                "peer=transformers computes one batch of equal prompts: leave out input, rate and concurrency"
            )


@dataclass
class Seen:
    """What the client saw of one request; seconds on the monotonic clock."""

    sent: float
    arrivals: defaultdict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by completion
    tokens: int = 0
    finished: Finished | None = None


class Load:
    """Sends requests all at once, at a rate or so many at a time, and notes when their tokens arrive."""

    def __init__(self, llm: LLM, options: Options, submits: list[Submit]) -> None:
        self._llm = llm
        self._rate = options.rate
        self._submits = submits
        self._slots = threading.Semaphore(options.concurrency or len(submits))
        self._gaps = random.Random(options.seed)
        self._seen: dict[str, Seen] = {}
        self._ends: queue.SimpleQueue[Finished | Failed] = queue.SimpleQueue()

    def run(self) -> tuple[float, list[Seen]]:
        """Seconds from the first request to the last token, and every request. Raises the error of one that failed."""
        started = due = time.monotonic()
        for submit in self._submits:
            time.sleep(max(0.0, due - time.monotonic()))
            self._slots.acquire()
            self._seen[submit.id] = Seen(time.monotonic())
            self._llm.submit(submit, self._on_event, quick=True)
            if self._rate:
                due += self._gaps.expovariate(self._rate)
        for _ in self._submits:
            end = self._ends.get()
            if isinstance(end, Failed):
                raise to_error(end)
        return time.monotonic() - started, list(self._seen.values())

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Delta):
            seen = self._seen[event.id]
            seen.arrivals[event.index].append(time.monotonic())
            seen.tokens += len(event.token_ids)
        elif isinstance(event, Finished | Failed):
            if isinstance(event, Finished):
                self._seen[event.id].finished = event
            self._slots.release()
            self._ends.put(event)


def make_submits(options: Options, folder: Path) -> list[Submit]:
    """The requests of a run: greedy, of new_tokens each; a line of the input may say otherwise, and may end early."""
    sampling = SamplingParams(max_tokens=options.new_tokens, temperature=0.0, ignore_eos=options.input is None)
    if options.input is None:
        vocab_size = int(read_config(folder)["vocab_size"])
        prompts = random_prompts(options.requests, options.prompt_tokens, vocab_size, options.seed)
        return [Submit(id=str(i), token_ids=prompt, sampling=sampling) for i, prompt in enumerate(prompts)]
    submits = []
    with open(options.input, "rb") as file:
        for line in read_requests(file, sampling):
            if isinstance(line, BadLine):
                raise InvalidRequest(f"input={options.input}: {line.error}")
            submits.append(line.submit)
    return submits


def summarize(seconds: float, requests: list[Seen]) -> dict[str, Any]:
    """One run's figures. TTFT and the gaps between tokens (ITL) are the client's, TPOT is the engine's mean gap."""
    finished = [seen.finished for seen in requests if seen.finished is not None]
    streams = [arrivals for seen in requests for arrivals in seen.arrivals.values()]
    output = sum(seen.tokens for seen in requests)
    total = output + sum(end.usage.prompt_tokens for end in finished)
    gaps = [1000 * (after - before) for s in streams for before, after in itertools.pairwise(s)]
    firsts = [min(s[0] for s in seen.arrivals.values()) - seen.sent for seen in requests if seen.arrivals]
    return {
        "seconds": round(seconds, 3),
        "requests": len(requests),
        "output_tokens": output,
        "output_tokens_per_s": round(output / seconds, 1),
        "total_tokens_per_s": round(total / seconds, 1),
        "ttft_s": percentiles(firsts, 3),
        "tpot_ms": percentiles([end.timings.tpot_ms for end in finished if end.timings.tpot_ms], 2),
        "itl_ms": percentiles(gaps, 2),
    }


def repeat(
    llm: LLM, peer: EngineProcess | None, options: Options, submits: list[Submit]
) -> tuple[list[dict[str, Any]], list[float]]:
    """The figures of each of phalanx's runs, and the peer's output tokens a second, in turns."""
    runs = []
    peers = []
    prompts = [submit.token_ids or [] for submit in submits]
    case = Case(prompts, options.new_tokens, [0.0] * len(prompts))
    # The first steps pay for set-up that no later ones do.
    llm.generate([1], SamplingParams(max_tokens=2, ignore_eos=True))
    if peer is not None:
        peer.run(Case([[1]], 2, [0.0]))
    for number in range(options.repeats):
        fresh = [msgspec.structs.replace(submit, id=f"{number}:{submit.id}") for submit in submits]
        runs.append(summarize(*Load(llm, options, fresh).run()))
        print(f"phalanx: {runs[-1]['output_tokens_per_s']} output tokens/s", flush=True)
        if peer is not None:
            peers.append(round(peer.run(case)["output_tokens_per_s"], 1))
            print(f"transformers: {peers[-1]} output tokens/s", flush=True)
    return runs, peers


@contextmanager
def transformers_process(folder: Path, dtype: str) -> Iterator[EngineProcess]:
    """transformers in a process of its own, so that neither's threads slow the other's. It is idle between its runs."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(PROGRAMS / "run_transformers.py"), str(folder), f"dtype={dtype}"]
        with closing(EngineProcess("transformers", command, Path(logs) / "transformers.log")) as process:
            yield process


def measure(options: Options) -> dict[str, Any]:
    """Run, and say how it goes."""
    options.check()
    folder = model_folder(options.model, options.random)
    submits = make_submits(options, folder)

    with ExitStack() as stack:
        started = time.monotonic()
        llm = stack.enter_context(LLM.from_config(options.engine_config(folder)))
        ready_s = time.monotonic() - started
        status = llm.status()
        print("\n".join([*status.report, f"ready in {ready_s:.1f} s"]), flush=True)
        peer = stack.enter_context(transformers_process(folder, options.dtype)) if options.peer else None
        runs, peers = repeat(llm, peer, options, submits)

    median = sorted(runs, key=lambda run: run["output_tokens_per_s"])[(len(runs) - 1) // 2]
    result = {
        "benchmark": "throughput",
        **median,
        "runs_output_tokens_per_s": [run["output_tokens_per_s"] for run in runs],
        "ready_s": round(ready_s, 2),
        "peak_memory_bytes": status.peak_memory,
    }

    if peers:
        result["transformers_output_tokens_per_s"] = statistics.median_low(peers)
        result["transformers_runs_output_tokens_per_s"] = peers
        result["ratio_to_transformers"] = round(median["output_tokens_per_s"] / statistics.median_low(peers), 2)
    return result


if __name__ == "__main__":
    run(Options, measure)
