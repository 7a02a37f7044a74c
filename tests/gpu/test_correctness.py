"""The engine on the device against transformers, in float32 and bfloat16: logits and greedy tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import LLM, SamplingParams
from phalanx.benchmarks.lab.sequence_logits import sequence_logits
from phalanx.engine.client.requests import RequestOutput
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.transport import InProcess
from phalanx.parallel.group import local_group
from phalanx.tests.engine import programs
from phalanx.tests.gpu.place import DEVICE, ON_GPU, engine_config
from phalanx.tests.models import TINY_SHAPE, score

MODELS = ("qwq_tiny", "qwen3", "tiny") if ON_GPU else ("qwen3", "tiny")
HALF_MODELS = ("qwq_tiny_bfloat16", "qwen3_bfloat16") if ON_GPU else ("qwen3_bfloat16",)
BACKENDS = ("triton", "torch")
HALF_BACKENDS = ("triton", "flash_attn_2", "flash_attn_3") if ON_GPU else ("triton",)
NEW_TOKENS = 64 if ON_GPU else 5
FLOAT32_TOLERANCE = 1e-4
"""Largest difference allowed, in units of the largest logit."""


def _tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocabulary) for _ in range(count)]


def _logits(folder: Path, tokens: list[int], chunk: int, **changes: Any) -> torch.Tensor:
    config = EngineConfig(**{"model": str(folder), **engine_config(**changes)})
    engine = Engine(config, local_group(DEVICE), InProcess().transport)
    found = sequence_logits(engine.worker, tokens, chunk).cpu()
    engine.worker.close()
    return found


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_float32_logits_are_transformers(request: pytest.FixtureRequest, model: str, attention: str) -> None:
    folder = request.getfixturevalue(model)
    tokens = _tokens(180 if ON_GPU else 8, TINY_SHAPE["vocab_size"])
    reference = score(folder, tokens).logits
    # In chunks, and one by one, as decodes.
    for count, chunk in ((len(tokens), 33 if ON_GPU else 5), (20 if ON_GPU else 2, 1)):
        found = _logits(folder, tokens[:count], chunk, attention=attention)
        assert float((found - reference[:count]).abs().max() / reference.abs().max()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("attention", HALF_BACKENDS)
@pytest.mark.parametrize("model", HALF_MODELS)
def test_bfloat16_logits_are_within_one_percent(request: pytest.FixtureRequest, model: str, attention: str) -> None:
    folder = request.getfixturevalue(model)
    tokens = _tokens(180 if ON_GPU else 8, TINY_SHAPE["vocab_size"])
    reference = score(folder, tokens).logits
    try:
        found = _logits(folder, tokens, 33 if ON_GPU else 5, attention=attention, dtype="bfloat16")
    except ConfigError as reason:
        if not attention.startswith("flash_attn"):
            raise
        pytest.skip(str(reason))
    assert float((found - reference).norm() / reference.norm()) <= 1e-2


def _prompts() -> list[list[int]]:
    count, longest = (16, 180) if ON_GPU else (3, 12)
    rng = random.Random(0)
    return [_tokens(rng.randrange(1, longest), TINY_SHAPE["vocab_size"], seed=i) for i in range(count)]


def _token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("model", MODELS[:2])
def test_greedy_tokens_and_logprobs_are_transformers(request: pytest.FixtureRequest, model: str) -> None:
    folder = request.getfixturevalue(model)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    with LLM(str(folder), **engine_config()) as llm:
        outputs = llm.generate(_prompts(), sampling)
    for output in outputs:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        assert len(completion.token_ids) == NEW_TOKENS
        reference = score(folder, prompt + completion.token_ids)
        assert completion.token_ids == reference.greedy(len(prompt))
        assert completion.logprobs is not None
        for place, entry in enumerate(completion.logprobs, start=len(prompt) - 1):
            expected = reference.logprobs()[place].topk(2).values.tolist()
            assert entry.top_logprobs == pytest.approx(expected, abs=1e-3)


def test_two_ranks_on_one_device_answer_as_one(run_ranks: Callable[..., list[Any]], qwq_tiny: Path) -> None:
    prompts = _prompts()
    greedy = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    seeded = [SamplingParams(max_tokens=16, temperature=0.9, seed=i, ignore_eos=True) for i in range(len(prompts))]
    calls = [(prompts, [greedy] * len(prompts)), (prompts, seeded)]
    # On a CPU the ranks have its own kernels: they know nothing of this process's interpreter.
    config = engine_config(attention="triton" if ON_GPU else "auto", kv_memory=2**25)
    by_rank = run_ranks(2, programs.generate_at_each_size, str(qwq_tiny), [1, 2], calls, config)
    one = [_token_ids(outputs) for outputs in by_rank[0][1]]
    assert {len(tokens) for outputs in one for tokens in outputs} == {16}
    for by_size in by_rank:
        assert [_token_ids(outputs) for outputs in by_size[2]] == one
