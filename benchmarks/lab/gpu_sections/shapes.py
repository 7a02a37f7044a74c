"""The models that benchmarks/gpu.py runs, how much of each it runs, and their folders of a config.json alone."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phalanx.engine.models.spec import ModelSpec, spec_from_config
from phalanx.launch.cli.presets import load_preset
from phalanx.launch.model_files.random_model import random_origin

LARGEST_ID = 10_000
"""Token ids of the mixed requests' prompts stay below it; a vocabulary may be smaller still."""


@dataclass(frozen=True)
class Sizes:
    """What is measured of a model."""

    batches: tuple[int, ...]  # rows of the decode steps
    context: int  # tokens of each of their sequences
    steps: int  # of each decode case, after `warm_steps` that do not count
    warm_steps: int
    prompts: tuple[int, ...]  # tokens of the prompts whose TTFT is measured
    repeats: int  # of each
    requests: int  # of the mixed load
    lengths: tuple[int, int]  # of its prompts and of its outputs, from and to
    max_num_batched_tokens: int

    @property
    def slack(self) -> int:
        """Tokens that a sequence of a decode case may grow by: it also runs while it is being started and stopped."""
        return 4 * (self.steps + self.warm_steps)


@dataclass(frozen=True)
class Shape:
    """A model by name: the fields of its config.json, and what is measured of it."""

    name: str
    config: dict[str, Any]
    sizes: Sizes

    @property
    def spec(self) -> ModelSpec:
        """The model's spec, as the engine reads it."""
        return spec_from_config(self.config, self.name)

    def make_folder(self, parent: Path) -> Path:
        """A folder with this config.json, for load_format=dummy."""
        folder = parent / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


FULL = Sizes(
    batches=(1, 8, 64, 256),
    context=2048,
    steps=50,
    warm_steps=10,
    prompts=(1024, 8192, 32768),
    repeats=3,
    requests=256,
    lengths=(100, 1024),
    max_num_batched_tokens=8192,
)
TINY = Sizes(
    batches=(1, 2, 5),
    context=24,
    steps=4,
    warm_steps=1,
    prompts=(8, 20, 70),
    repeats=2,
    requests=6,
    lengths=(3, 9),
    max_num_batched_tokens=16,
)
SMALL_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
SMALL_IDS = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
FAMILIES = ("qwq_32b", "qwen3_0_6b")
"""Presets of configs/models, the first for the attention kernels' shape, the second for the peer's model."""


def shape_of(family: str, tiny: bool) -> Shape:
    """The model of a preset; `tiny` is one of its architecture and its query heads per KV head, named as such."""
    config = load_preset(family)["shape"]
    name = family
    sizes = FULL
    if tiny:
        group = config["num_attention_heads"] // config["num_key_value_heads"]
        heads = {"num_attention_heads": 2 * group, "num_key_value_heads": 2, "head_dim": 16}
        config = {**config, **SMALL_SHAPE, **SMALL_IDS, **heads}
        name = f"{family}_tiny"
        sizes = TINY
    return Shape(name, random_origin(config, 0, "bfloat16")["config"], sizes)


def two_ranks_shape() -> Shape:
    """A model of QwQ's heads, small enough for several ranks to share a device."""
    return Shape("qwq_tiny", random_origin(load_preset("qwq_tiny")["shape"], 0, "float32")["config"], TINY)


@dataclass(frozen=True)
class MixedRequest:
    """One request of the mixed load."""

    prompt: list[int]
    new_tokens: int


def mixed_requests(sizes: Sizes, vocab_size: int) -> list[MixedRequest]:
    """nano-vllm's own benchmark (its bench.py, seed 0): 256 prompts and outputs of 100 to 1,024 tokens, 133,966 in all.

    The numbers are drawn in its order: each prompt's ids, whose count is drawn first; then all outputs' lengths.
    """
    draw = random.Random(0)
    high = min(LARGEST_ID, vocab_size - 1)
    prompts = [[draw.randint(0, high) for _ in range(draw.randint(*sizes.lengths))] for _ in range(sizes.requests)]
    return [MixedRequest(prompt, draw.randint(*sizes.lengths)) for prompt in prompts]
