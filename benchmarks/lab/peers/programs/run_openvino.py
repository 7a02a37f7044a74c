"""OpenVINO GenAI's continuous batching: run_openvino.py EXPORTED_FOLDER [threads=] [PROPERTY=] [CASE ...]

See program.py. Whatever the weights are stored in, it computes in bf16, with AMX where the processor has it. A PROPERTY
in capitals is one of the CPU plugin's.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from program import Engine, Stepping, cores, main


class OpenVino:
    """ContinuousBatchingPipeline, step by step."""

    def __init__(self, model: str, kv_gib: int, properties: dict[str, str | int]) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = kv_gib
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self._pipeline: Any = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._handles: dict[int, Any] = {}

    def add(self, number: int, prompt: list[int], new_tokens: int) -> None:
        """As Stepper's."""
        import openvino as ov
        import openvino_genai as genai

        config = genai.GenerationConfig()
        config.ignore_eos = True
        config.do_sample = False
        config.max_new_tokens = new_tokens
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        self._handles[number] = self._pipeline.add_request(number, ids, config)

    def step(self) -> dict[int, list[int]]:
        """As Stepper's."""
        self._pipeline.step()
        new: dict[int, list[int]] = {}
        for number, handle in list(self._handles.items()):
            while handle.can_read():
                for output in handle.read().values():
                    new.setdefault(number, []).extend(output.generated_ids)
            if handle.get_status().name == "FINISHED":
                del self._handles[number]
        return new


def make(model: str, options: dict[str, str]) -> Engine:
    """A pipeline on all cores of this process."""
    properties: dict[str, str | int] = {
        "INFERENCE_NUM_THREADS": int(options.get("threads", len(cores()))),
        "INFERENCE_PRECISION_HINT": "bf16",
    }
    properties |= {name: value for name, value in options.items() if name.isupper()}
    pipeline = OpenVino(model, int(options.get("kv_gib", "1")), properties)
    return Stepping(pipeline, f"openvino-genai {version('openvino-genai')}")


if __name__ == "__main__":
    main(make)
