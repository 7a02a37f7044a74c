"""Output tokens a second, latencies and memory under a load of random token ids or of a JSONL file.

    python benchmarks/throughput.py model=qwen2_5_0_5b requests=32 prompt_tokens=128 new_tokens=128 peer=transformers

`model` is a folder or a preset, whose random checkpoint is made first. With peer=transformers its `generate` runs the
same prompts in turns with phalanx, in the same process. Ends with one JSON line; figures are medians over the repeats.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from common import finish, model_folder, percentiles, random_prompts, read_options
from phalanx import LLM, SamplingParams
from phalanx.engine.messages import Delta, Event, Failed, Finished, Submit
from phalanx.engine.models.spec import read_config


@dataclass
class Options:
    """What to run; all but the first group are EngineConfig's."""

    model: str = "qwen2_5_0_5b"
    input: str | None = None  # JSONL lines of {"prompt" | "messages" | "token_ids", "sampling"?} instead of random ids
    requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 128
    rate: float = 0.0  # requests a second; 0 sends all at once
    concurrency: int = 0  # requests under way at most; 0 sets no limit
    repeats: int = 3
    peer: str | None = None  # transformers
    out: str | None = None
    ranks: int = 1
    dtype: str = "bfloat16"
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefix_cache: bool = False
    kv_memory: float = 0.9


@dataclass
class Request:
    """What the client saw of one request; seconds on the monotonic clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    end: Finished | None = None


class Load:
    """Sends requests at a rate or all at once, and notes when their tokens arrive."""

    def __init__(self, llm: LLM, options: Options) -> None:
        self._llm, self._options = llm, options
        self._requests: dict[str, Request] = {}
        self._finished: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._slots = threading.Semaphore(options.concurrency or 2**30)

    def run(self, submits: list[Submit]) -> tuple[float, list[Request]]:
        """Seconds from the first request to the last token, and every request."""
        started = time.monotonic()
        for i, submit in enumerate(submits):
            if self._options.rate:
                time.sleep(max(0.0, started + i / self._options.rate - time.monotonic()))
            self._slots.acquire()
            self._requests[submit.id] = Request(time.monotonic())
            self._llm.submit(submit, self._on_event)
        for _ in submits:
            event = self._finished.get()
            if isinstance(event, Failed):
                sys.exit(f"request {event.id} failed: {event.message}")
        return time.monotonic() - started, list(self._requests.values())

    def _on_event(self, event: Event) -> None:
        assert isinstance(event, Delta | Finished | Failed)
        request = self._requests[event.id]
        if isinstance(event, Delta):
            request.arrivals.append(time.monotonic())
            request.tokens += len(event.token_ids)
            return
        request.end = event if isinstance(event, Finished) else None
        self._slots.release()
        self._finished.put(event)


def make_submits(options: Options, folder: str) -> list[Submit]:
    """The requests of one run."""
    greedy = SamplingParams(max_tokens=options.new_tokens, temperature=0, ignore_eos=True)
    if options.input is None:
        vocabulary = int(read_config(Path(folder))["vocab_size"])
        prompts = random_prompts(options.requests, options.prompt_tokens, vocabulary)
        return [Submit(id=str(i), token_ids=prompt, sampling=greedy) for i, prompt in enumerate(prompts)]
    submits = []
    for i, line in enumerate(Path(options.input).read_text().splitlines()):
        values = {"sampling": {"max_tokens": options.new_tokens}, **json.loads(line), "id": str(i)}
        values["sampling"] = SamplingParams.from_dict(values["sampling"])
        submits.append(Submit(**values))
    return submits


def summarize(seconds: float, requests: list[Request]) -> dict[str, Any]:
    """One run's figures."""
    output = sum(request.tokens for request in requests)
    prompt = sum(request.end.usage.prompt_tokens for request in requests if request.end)
    gaps = [after - before for r in requests for before, after in zip(r.arrivals, r.arrivals[1:], strict=False)]
    return {
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(output / seconds, 1),
        "total_tokens_per_s": round((output + prompt) / seconds, 1),
        "ttft_s": percentiles([request.arrivals[0] - request.sent for request in requests if request.arrivals], 3),
        "tpot_ms": percentiles([request.end.timings.tpot_ms for request in requests if request.end]),
        "itl_ms": percentiles([1000 * gap for gap in gaps]),
    }


class TransformersPeer:
    """transformers' generate over all prompts as one static batch, with torch's own attention (sdpa)."""

    def __init__(self, folder: str, options: Options) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._new_tokens = options.new_tokens
        dtype = getattr(torch, options.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")

    def run(self, prompts: list[list[int]]) -> float:
        """Output tokens a second."""
        import torch

        batch = torch.tensor(prompts)
        started = time.monotonic()
        out = self._model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=self._new_tokens,
            min_new_tokens=self._new_tokens,
            do_sample=False,
        )
        return (out.shape[1] - batch.shape[1]) * len(prompts) / (time.monotonic() - started)


def main() -> None:
    """Run, and print."""
    options = read_options(Options, sys.argv[1:])
    folder = model_folder(options.model)
    started = time.monotonic()
    engine = {name: getattr(options, name) for name in ("ranks", "dtype", "max_num_seqs", "max_num_batched_tokens")}
    llm = LLM(folder, prefix_cache=options.prefix_cache, kv_memory=options.kv_memory, **engine)
    ready = time.monotonic() - started
    status = llm.status()
    print("\n".join(status.report))
    submits = make_submits(options, folder)
    peer = None
    if options.peer is not None:
        if options.peer != "transformers" or options.input is not None:
            sys.exit(f"peer={options.peer!r}: only transformers, and only with random token ids")
        peer = TransformersPeer(folder, options)
    # The first steps pay for set-up that no later one does.
    llm.generate([list(range(1, 9))], SamplingParams(max_tokens=2, ignore_eos=True))
    runs, peers = [], []
    for _ in range(options.repeats):
        fresh = [msgspec.structs.replace(submit, id=f"{submit.id}-{len(runs)}") for submit in submits]
        runs.append(summarize(*Load(llm, options).run(fresh)))
        print(f"phalanx: {runs[-1]['output_tokens_per_s']} output tokens/s in {runs[-1]['seconds']} s")
        if peer is not None:
            peers.append(peer.run([submit.token_ids or [] for submit in submits]))
            print(f"transformers: {peers[-1]:.1f} output tokens/s")
    llm.close()
    median = sorted(runs, key=lambda run: run["output_tokens_per_s"])[len(runs) // 2]
    result = {
        "benchmark": "throughput",
        **median,
        "runs_output_tokens_per_s": [run["output_tokens_per_s"] for run in runs],
        "ready_s": round(ready, 2),
        "peak_memory_bytes": status.peak_memory,
        "settings": {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "model")}
        | {"model": Path(options.model).name},
    }
    if peers:
        result["transformers_output_tokens_per_s"] = round(statistics.median(peers), 1)
        result["ratio_to_transformers"] = round(median["output_tokens_per_s"] / statistics.median(peers), 2)
    finish(result, options.out)


if __name__ == "__main__":
    main()
