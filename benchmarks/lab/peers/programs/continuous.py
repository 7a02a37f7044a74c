"""transformers' continuous batching of the weights that phalanx's load_format=dummy makes, in this process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from phalanx.parallel.loading.checkpoint import WeightSlice
from phalanx.parallel.loading.dummy_weights import fill_dummy
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

NO_TOKEN = -1
"""As the end of a sequence: none ends early."""
CPU_CACHE = {"num_blocks": 64, "max_batch_tokens": 64}
"""On a CPU its defaults would take most of the memory there is."""


def dummy_model(folder: Path, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """transformers' model of a folder with a config.json, with the weights that phalanx has of load_format=dummy."""
    config = AutoConfig.from_pretrained(folder)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    slices = []
    for name, weight in model.named_parameters():
        whole = tuple(slice(0, size) for size in weight.shape)
        slices.append(WeightSlice(name, tuple(weight.shape), whole, weight.detach()))
    fill_dummy(slices, seed)
    return model


class ContinuousBatching:
    """transformers' manager of continuous batching: greedy, and no sequence ends before its length.

    FlashAttention is taken where transformers finds it, as is its own choice; else torch's SDPA.
    """

    def __init__(self, model: Any, longest_prompt: int, longest_output: int, requests: int) -> None:
        """Raises AttributeError or TypeError where transformers has no continuous batching, or one of another kind."""
        self._model = model
        generation = GenerationConfig(max_new_tokens=longest_output, do_sample=False, eos_token_id=NO_TOKEN)
        known = inspect.signature(model.init_continuous_batching).parameters
        options: dict[str, Any] = {}
        if "workload_hints" in known:
            from transformers.generation.continuous_batching.utils import WorkloadHints

            options["workload_hints"] = WorkloadHints(
                max_prompt_length=longest_prompt, max_generated_length=longest_output, num_requests=requests
            )
        if "continuous_batching_config" in known:
            on_cpu = CPU_CACHE if model.device.type == "cpu" else {}
            options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**on_cpu)
        self._manager = model.init_continuous_batching(generation_config=generation, **options)
        if hasattr(self._manager, "warmup"):
            self._manager.warmup()
        self._manager.start()
        self._sent = 0

    @property
    def attention(self) -> str:
        """What it computes attention with."""
        return str(self._model.config._attn_implementation)

    def run(self, requests: Sequence[tuple[list[int], int]]) -> tuple[float, list[list[int]]]:
        """Seconds of requests of (prompt, new tokens), sent all at once, and their outputs.

        Raises RuntimeError if the manager stops, or a request fails.
        """
        started = time.perf_counter()
        names = [f"r{self._sent + i}" for i in range(len(requests))]
        self._sent += len(requests)
        for name, (prompt, new_tokens) in zip(names, requests, strict=True):
            self._manager.add_request(prompt, request_id=name, max_new_tokens=new_tokens, eos_token_id=NO_TOKEN)
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(requests):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError(f"it stopped after {len(outputs)} of {len(requests)} requests")
            elif result.error:
                raise RuntimeError(f"request {result.request_id} failed: {result.error}")
            elif result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
        seconds = time.perf_counter() - started
        return seconds, [outputs[name] for name in names]

    def close(self) -> None:
        """Ends its thread."""
        self._manager.stop(block=True)
