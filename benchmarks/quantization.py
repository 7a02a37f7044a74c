"""What quantization costs in quality: the distributions of a real model's next tokens on real text, beside bfloat16's.

    python benchmarks/quantization.py model=models/smollm2-135m quantizations=int8,w8a8,int4,kv_int8

kv_int8 is a KV cache of 8 bits beside weights of bfloat16. The text is what Python's own `help()` says of the language.
For each token: whether the likeliest next token is the same (top-1 agreement), and KL(bfloat16 || quantized) in nats;
the perplexity of the text under each. The last line is JSON.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from phalanx import EngineConfig
from phalanx.benchmarks.lab.common import ROOT, run
from phalanx.benchmarks.lab.sequence_logits import sequence_logits
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.execution.worker_factory import build_worker
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.parallel.group import local_group

KV_INT8 = "kv_int8"


@dataclass
class Options:
    """What to compare."""

    model: str = str(ROOT / "models" / "smollm2-135m")  # a folder with trained weights
    quantizations: str = "int8,w8a8,int4,kv_int8"
    tokens: int = 8192
    window: int = 512  # tokens of one sequence
    threads: int = 0
    out: str | None = None  # a file for the JSON line


def make_worker(options: Options, quantization: str) -> Worker:
    """A rank on its own. Raises ConfigError."""
    config = EngineConfig(
        model=options.model,
        dtype="bfloat16",
        quantization="none" if quantization == KV_INT8 else quantization,
        kv_cache_dtype="int8" if quantization == KV_INT8 else "auto",
        max_model_len=options.window,
        max_num_seqs=1,
        threads=options.threads,
    )
    folder = Path(options.model)
    spec = spec_from_config(read_config(folder), str(folder))
    return build_worker(config, spec, folder, local_group(torch.device("cpu")))


def real_tokens(options: Options) -> list[list[int]]:
    """Windows of the text's tokens."""
    text = "\n".join(topics[name] for name in sorted(topics))
    tokens = Tokenizer(Path(options.model)).encode(text[: 8 * options.tokens])[: options.tokens]
    windows = [tokens[first : first + options.window] for first in range(0, len(tokens), options.window)]
    return [window for window in windows if len(window) > 1]


def measure(options: Options) -> dict[str, Any]:
    """Compare, window after window."""
    windows = real_tokens(options)
    plain = make_worker(options, "none")
    names = options.quantizations.split(",")
    workers = {name: make_worker(options, name) for name in names}

    sums = {name: {"agree": 0, "kl": 0.0, "loss": 0.0} for name in ("none", *names)}
    count = scored = 0
    for window in windows:
        reference = sequence_logits(plain, window).log_softmax(dim=1)
        following = torch.tensor(window[1:]).unsqueeze(1)
        count, scored = count + len(window), scored + len(following)

        for name, entry in sums.items():
            found = reference if name == "none" else sequence_logits(workers[name], window).log_softmax(dim=1)
            entry["agree"] += int((found.argmax(dim=1) == reference.argmax(dim=1)).sum())
            entry["kl"] += float((reference.exp() * (reference - found)).sum(dtype=torch.float64))
            entry["loss"] -= float(found[:-1].gather(1, following).sum(dtype=torch.float64))

    result: dict[str, Any] = {"benchmark": "quantization", "tokens": count}
    for name, entry in sums.items():
        result[name] = {
            "top1_agreement": round(entry["agree"] / count, 4),
            "kl_nats": round(entry["kl"] / count, 6),
            "perplexity": round(math.exp(entry["loss"] / scored), 3),
        }
        print(f"{name}: {result[name]}", flush=True)
    return result


if __name__ == "__main__":
    run(Options, measure)
