"""What is not one engine's serving: the peer, two ranks on one device, starts of a process."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import torch
from phalanx import LLM, SamplingParams
from phalanx.benchmarks.lab.peers.programs.program import random_prompts
from phalanx.benchmarks.startup import start_once
from phalanx.engine.models.spec import read_config

from .serving import engine_config
from .shapes import Shape, mixed_requests

RANKS_PROMPTS, RANKS_TOKENS = (5, 60, 200), 24


def measure_peer(shape: Shape, folder: Path, device: torch.device) -> dict[str, Any]:
    """transformers' continuous batching: output tokens a second of the mixed load, decoded greedily."""
    import transformers
    from phalanx.benchmarks.lab.peers.programs.continuous import ContinuousBatching, dummy_model

    requests = [(request.prompt, request.new_tokens) for request in mixed_requests(shape.sizes, shape.spec.vocab_size)]
    model = dummy_model(folder, device, torch.bfloat16)
    longest = shape.sizes.lengths[1]
    try:
        peer = ContinuousBatching(model, longest, longest, len(requests))
    except (AttributeError, ImportError, TypeError) as reason:
        return {"skipped": f"not available in transformers {transformers.__version__}: {reason}"}
    with closing(peer):
        peer.run([(prompt, 4) for prompt, _ in requests[:8]])
        seconds, outputs = peer.run(requests)
    tokens = sum(map(len, outputs))
    return {
        "engine": f"transformers {transformers.__version__}, continuous batching",
        "attention": peer.attention,
        "seconds": round(seconds, 3),
        "requests": len(requests),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 1),
    }


def measure_two_ranks(folder: Path, device: torch.device) -> dict[str, Any]:
    """Whether two ranks on one device, in float32, choose the tokens of one: for correctness alone, it is slow."""
    vocab_size = int(read_config(folder)["vocab_size"])
    prompts = [random_prompts(1, length, vocab_size, seed=length)[0] for length in RANKS_PROMPTS]
    greedy = SamplingParams(max_tokens=RANKS_TOKENS, temperature=0.0, ignore_eos=True)

    tokens = []
    reports = []
    for ranks in (1, 2):
        config: dict[str, Any] = {
            "device": device.type,
            "dtype": "float32",
            "load_format": "dummy",
            "tokenizer": "none",
            "max_model_len": 256,
            "max_num_seqs": 4,
            # Two ranks' processes, and this one's, share the device.
            "kv_memory": 2.0**26,
        }
        with LLM(str(folder), ranks=ranks, **config) as llm:
            reports.append(llm.status().report)
            tokens.append([output.outputs[0].token_ids for output in llm.generate(prompts, greedy)])

    pairs = [pair for outputs in zip(*tokens, strict=True) for pair in zip(*outputs, strict=True)]
    return {
        "equal": tokens[0] == tokens[1],
        "tokens": len(pairs),
        "tokens_equal": sum(one == other for one, other in pairs),
        "reports": reports,
    }


def measure_ready(shape: Shape, folder: Path, device: torch.device, graphs: str) -> dict[str, Any]:
    """Seconds from a process's start to imports, ready and the first token; dummy weights are made, not read."""
    if device.type == "cpu":
        if graphs == "lazy":
            return {"skipped": "device=cpu has no CUDA graphs; a start without them stands under all"}
        graphs = "none"
    config = engine_config(shape, folder, device.type, False, shape.sizes.context + shape.sizes.slack)
    [prompt] = random_prompts(1, min(32, shape.sizes.context), shape.spec.vocab_size)
    phases = start_once({**msgspec.to_builtins(config), "graphs": graphs}, prompt)
    return {"model": shape.name, "graphs": graphs, **{name: at for name, at in phases.items() if at is not None}}
