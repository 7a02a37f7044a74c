"""phalanx against transformers, at every number of ranks: the same greedy tokens, logits and log-probabilities."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phalanx import LLM, SamplingParams
from phalanx.engine.client.requests import RequestOutput
from phalanx.tests.engine import programs
from phalanx.tests.models import TEXTS, score

RunRanks = Callable[..., list[Any]]

LOGIT_TOLERANCE = 1e-4
NEW_TOKENS = 32
CHUNKED = {"dtype": "float32", "max_model_len": 512, "kv_memory": 4e8, "max_num_batched_tokens": 96, "max_num_seqs": 16}
"""16 sequences at once, and a step budget that cuts every longer prompt into chunks beside the decodes."""


def _random_prompts(vocabulary: int, count: int = 16) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, vocabulary) for _ in range(rng.randrange(1, 180))] for _ in range(count)]


def _tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def _assert_is_transformers_greedy(folder: Path, outputs: list[RequestOutput]) -> None:
    """Each token is the choice of transformers in float64 after the same prefix, the log-probabilities are its own."""
    for output in outputs:
        completion, prompt = output.outputs[0], output.prompt_token_ids
        assert len(completion.token_ids) == NEW_TOKENS
        reference = score(folder, prompt + completion.token_ids, torch.float64)
        assert reference.margin(len(prompt)) > 2 * LOGIT_TOLERANCE, f"rounding may choose another token after {prompt}"
        assert completion.token_ids == reference.greedy(len(prompt))
        logprobs = reference.logprobs()
        assert completion.logprobs is not None
        assert output.prompt_logprobs is not None or len(prompt) == 1
        ours = [*(output.prompt_logprobs or []), *completion.logprobs]
        followers = (prompt + completion.token_ids)[1:]
        for place, (token, entry) in enumerate(zip(followers, ours, strict=True)):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(logprobs[place, token]), abs=LOGIT_TOLERANCE)
            top = logprobs[place].topk(2)
            assert entry.top_logprobs == pytest.approx(top.values.tolist(), abs=LOGIT_TOLERANCE)


def _check_sizes(
    run_ranks: RunRanks, folder: Path, prompts: list[list[int]], sizes: list[int], config: dict[str, Any]
) -> None:
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=2)
    seeded = [
        SamplingParams(max_tokens=12, temperature=0.9, seed=i, ignore_eos=True, **_truncation(i))
        for i in range(len(prompts))
    ]
    calls = [(prompts, [greedy] * len(prompts)), (prompts, seeded)]
    by_rank = run_ranks(max(sizes), programs.generate_at_each_size, str(folder), sizes, calls, config)
    _assert_is_transformers_greedy(folder, by_rank[0][sizes[0]][0])
    expected = [_tokens(outputs) for outputs in by_rank[0][sizes[0]]]
    for rank, by_size in enumerate(by_rank):
        for size, answers in by_size.items():
            assert [_tokens(outputs) for outputs in answers] == expected, f"rank {rank} of {size} answered differently"
            _assert_same_logprobs(answers[0], by_rank[0][sizes[0]][0])


def _truncation(i: int) -> dict[str, Any]:
    return [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.8}][i % 5]


def _assert_same_logprobs(some: list[RequestOutput], others: list[RequestOutput]) -> None:
    for one, other in zip(some, others, strict=True):
        for a, b in zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=LOGIT_TOLERANCE)


def _check_logits(
    run_ranks: RunRanks, folder: Path, tokens: list[int], sizes: list[int], config: dict[str, Any]
) -> tuple[dict[int, np.ndarray], np.ndarray, float]:
    """Transformers in float64 is the truth; in float32 it is off by more than phalanx may be, on some processors.

    Returns the errors of phalanx by the number of ranks, those of transformers in float32, each (tokens, vocabulary),
    and what a float32 as large as the largest logit is off by at most because it is one: half the step to the next.
    """
    truth, rounded = (score(folder, tokens, dtype).logits.numpy() for dtype in (torch.float64, torch.float32))
    transformers_error = np.abs(rounded - truth)
    results = run_ranks(max(sizes), programs.logits_at_each_size, str(folder), sizes, tokens, 33, config)[0]
    assert sorted(results) == sizes
    errors = {}
    for size, logits in results.items():
        assert logits.shape == truth.shape
        errors[size] = error = np.abs(logits - truth)
        assert error.max() <= LOGIT_TOLERANCE, f"N={size}"
        assert error.mean() <= transformers_error.mean(), f"N={size}"
    return errors, transformers_error, float(np.spacing(np.abs(truth).max().astype(np.float32))) / 2


def test_random_qwen2_with_qwqs_heads_gives_transformers_tokens_at_1_to_8_ranks(
    run_ranks: RunRanks, qwq_tiny: Path
) -> None:
    _check_sizes(run_ranks, qwq_tiny, _random_prompts(1031), list(range(1, 9)), CHUNKED)


def test_random_qwen2_with_qwqs_heads_gives_transformers_logits_at_1_to_8_ranks(
    run_ranks: RunRanks, qwq_tiny: Path
) -> None:
    _check_logits(run_ranks, qwq_tiny, _random_prompts(1031)[1], list(range(1, 9)), CHUNKED)


def test_smollm2_gives_transformers_tokens_at_1_to_4_ranks(run_ranks: RunRanks, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    _check_sizes(run_ranks, smollm2, prompts, [1, 2, 3, 4], CHUNKED)


def test_smollm2_gives_transformers_logits_at_1_to_4_ranks(run_ranks: RunRanks, smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(smollm2)(TEXTS[7] + TEXTS[11])["input_ids"]
    ours, theirs, rounding = _check_logits(run_ranks, smollm2, tokens, [1, 2, 3, 4], CHUNKED)
    for size, error in ours.items():
        # The largest of all is one logit's, as is that of transformers; the largest of each token are many.
        assert error.max() <= theirs.max() + rounding, f"N={size}"
        assert error.max(axis=1).mean() <= theirs.max(axis=1).mean(), f"N={size}"


@pytest.mark.parametrize("model", ["smollm2", "qwq_tiny_bfloat16"])
def test_bfloat16_logits_are_within_one_percent_of_float32(
    run_ranks: RunRanks, request: pytest.FixtureRequest, model: str
) -> None:
    folder = request.getfixturevalue(model)
    tokens = _random_prompts(1031)[1]
    reference = score(folder, tokens).logits.numpy()
    config = {**CHUNKED, "dtype": "bfloat16"}
    results = run_ranks(3, programs.logits_at_each_size, str(folder), [1, 2, 3], tokens, 33, config)[0]
    for size, logits in results.items():
        error = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
        assert error <= 1e-2, f"N={size}: relative error {error:.4f}"


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3", {}),
        ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        (
            "Qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 1e6,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "rope_theta": 5e5,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
)
def test_every_architecture_and_rope_scaling_gives_transformers_logits(
    run_ranks: RunRanks, tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    folder = _save_random(tmp_path, architecture, options)
    tokens = _random_prompts(211)[1][:100]
    config = {**CHUNKED, "tokenizer": "none", "max_model_len": 120}
    # Dynamic scaling looks at the whole length: transformers computes these tokens at once, so must we.
    dynamic = options.get("rope_parameters", {}).get("rope_type") == "dynamic"
    reference = score(folder, tokens).logits.numpy()
    results = run_ranks(2, programs.logits_at_each_size, str(folder), [1, 2], tokens, 100 if dynamic else 33, config)[0]
    for size, logits in results.items():
        assert np.abs(logits - reference).max() <= LOGIT_TOLERANCE, f"N={size}"


@pytest.mark.parametrize("collectives", ["auto", "gloo"])
def test_ranks_that_run_layers_in_one_piece_and_ranks_that_cannot_compute_together(
    run_ranks: RunRanks, tmp_path: Path, collectives: str
) -> None:
    # Of 131 columns of an MLP one rank has an odd number, which bfloat16 kernels do not pack.
    options = {"attention_bias": True, "mlp_bias": True, "intermediate_size": 131}
    folder = _save_random(tmp_path, "Llama", options)
    tokens = _random_prompts(211)[1][:100]
    config = {**CHUNKED, "dtype": "bfloat16", "tokenizer": "none", "max_model_len": 128, "collectives": collectives}
    reference = score(folder, tokens).logits.numpy()
    results = run_ranks(3, programs.logits_at_each_size, str(folder), [1, 2, 3], tokens, 33, config)[0]
    for size, logits in results.items():
        assert np.linalg.norm(logits - reference) / np.linalg.norm(reference) <= 1.5e-2, f"N={size}"
    # Prompts in chunks: of most steps' last layer only some tokens, or none, go through the MLP.
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    calls = [([tokens, tokens[:50], tokens[20:]], [greedy] * 3)]
    by_rank = run_ranks(3, programs.generate_at_each_size, str(folder), [1, 2, 3], calls, config)
    for size, answers in by_rank[0].items():
        assert [len(found) for found in _tokens(answers[0])] == [8, 8, 8], f"N={size}"
        for by_size in by_rank[1:size]:
            assert _tokens(by_size[size][0]) == _tokens(answers[0]), f"N={size}"


def _save_random(folder: Path, architecture: str, options: dict[str, Any]) -> Path:
    import transformers

    options = dict(options)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=211,
        hidden_size=96,
        intermediate_size=options.pop("intermediate_size", 160),
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64 if "dynamic" in str(options) else 256,
        eos_token_id=2,
        bos_token_id=1,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).float()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.2)
        else:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    return folder


def test_a_preemption_changes_no_answer_where_rotary_frequencies_depend_on_the_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    folder = _save_random(tmp_path, "Llama", {"rope_parameters": rope})
    prompts = [prompt[:60] + prompt[:20] for prompt in _random_prompts(211, 6)]
    greedy = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    config: dict[str, Any] = {"tokenizer": "none", "dtype": "float32", "max_model_len": 160, "max_num_seqs": 6}
    with LLM(str(folder), **config) as llm:
        alone = _tokens(llm.generate(prompts, greedy))
        assert llm.status().preemptions == 0
    block = 2 * 2 * 2 * 16 * 16 * 4  # bytes: layers, keys and values, KV heads, head_dim, tokens, float32
    with LLM(str(folder), **config, kv_memory=16.0 * block, block_size=16) as llm:
        assert _tokens(llm.generate(prompts, greedy)) == alone
        assert llm.status().preemptions > 0
