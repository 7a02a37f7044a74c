"""An engine on phalanx's own kernels beside one without them, and with quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import LLM, EngineConfig, SamplingParams
from phalanx.benchmarks.lab.sequence_logits import sequence_logits
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.engine.errors import ConfigError
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.execution.resolved_settings import resolve_settings
from phalanx.engine.execution.worker_factory import build_worker
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.kernels import cpu
from phalanx.kernels.cpu.attention import CpuAttention
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.parallel.group import local_group
from phalanx.tests.models import TINY_SHAPE

pytestmark = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
KERNELS = [
    name
    for name in ("avx512_amx", "emulated_amx", "avx512_bf16", "avx512_vnni", "avx2", "portable")
    if cpu.native is not None and cpu.native.can_run(name)
]
"""Instruction sets that this machine can run."""
TEXT = (Path(__file__).resolve().parent.parent.parent / "README.md").read_text()


def _answers(folder: Path, prompts: list[list[int]], **config: Any) -> list[list[int]]:
    with LLM(str(folder), max_model_len=128, max_num_seqs=8, **config) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]


def _worker(folder: Path, **config: Any) -> Worker:
    spec = spec_from_config(read_config(folder), str(folder))
    settings = EngineConfig(model=str(folder), max_model_len=512, max_num_seqs=4, **config)
    return build_worker(settings, spec, folder, local_group(torch.device("cpu")))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("changes", [{}, {"hidden_size": 96, "intermediate_size": 48}, {"intermediate_size": 200}])
def test_layers_in_one_piece_have_the_bits_of_parts_one_by_one(
    tmp_path: Path, kernels: str, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {**TINY_SHAPE, "initializer_range": 0.2, "num_hidden_layers": 3, **changes}
    folder = make_random_model(tmp_path / "model", shape, dtype="bfloat16")
    tokens = [7 * i % 250 for i in range(130)]
    before = cpu.native.kernels()
    cpu.native.use_kernels(kernels)
    try:
        # Prompts of 32 tokens and fewer, and of 33 and more, have their activations in different layouts under AMX.
        counts = (1, 32, 33, 47, 130)
        in_one_piece = [sequence_logits(_worker(folder), tokens[:count]) for count in counts]
        monkeypatch.setattr(CpuAttention, "has_fused_decoder", False)
        for count, found in zip(counts, in_one_piece, strict=True):
            assert torch.equal(found, sequence_logits(_worker(folder), tokens[:count])), count
    finally:
        cpu.native.use_kernels(before)


def test_an_engine_answers_the_same_without_the_kernels(qwq_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[3 + i * j for j in range(1, 5 + 7 * i)] for i in range(6)]
    expected = _answers(qwq_tiny, prompts, dtype="float32")
    monkeypatch.setattr(cpu, "native", None)
    assert _answers(qwq_tiny, prompts, dtype="float32") == expected


@pytest.mark.parametrize(("quantization", "agreement"), [("int8", 0.95), ("w8a8", 0.8), ("int4", 0.55)])
def test_quantized_weights_agree_with_bfloat16_on_real_text(smollm2: Path, quantization: str, agreement: float) -> None:
    tokens = Tokenizer(smollm2).encode(TEXT)[:500]
    plain = sequence_logits(_worker(smollm2, dtype="bfloat16"), tokens)
    quantized = sequence_logits(_worker(smollm2, dtype="bfloat16", quantization=quantization), tokens)
    assert float((plain.argmax(dim=1) == quantized.argmax(dim=1)).float().mean()) >= agreement


def test_a_cache_of_8_bits_agrees_with_bfloat16_and_takes_half_its_memory(smollm2: Path) -> None:
    tokens = Tokenizer(smollm2).encode(TEXT)[:500]
    plain, small = (_worker(smollm2, dtype="bfloat16", kv_cache_dtype=kept) for kept in ("auto", "int8"))
    expected, found = sequence_logits(plain, tokens), sequence_logits(small, tokens, chunk=100)
    assert float((expected.argmax(dim=1) == found.argmax(dim=1)).float().mean()) >= 0.97
    # Whatever the chunks: a key is rounded by itself.
    assert torch.equal(found, sequence_logits(small, tokens, chunk=37))
    rooms = [
        _worker(smollm2, dtype="bfloat16", kv_cache_dtype=kept, kv_memory=16 * 2**20).capacity.num_blocks
        for kept in ("auto", "int8")
    ]
    assert rooms[1] == pytest.approx(rooms[0] * 2 * 64 / 68, rel=0.01)


def test_a_cache_of_8_bits_is_refused_where_nothing_computes_with_it(qwq_tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype=int8 needs.*attention=torch.*set kv_cache_dtype=auto"):
        _worker(qwq_tiny, attention="torch", kv_cache_dtype="int8")


@pytest.mark.parametrize("quantization", ["int8", "w8a8", "int4"])
def test_a_quantized_model_still_knows_the_capital_of_france(smollm2: Path, quantization: str) -> None:
    with LLM(str(smollm2), dtype="bfloat16", quantization=quantization, max_model_len=256) as llm:
        (answer,) = llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0.0))
    assert answer.outputs[0].text.startswith(" Paris")


def test_quantized_weights_are_the_same_at_two_ranks(smollm2: Path) -> None:
    """The same tokens, but for ties: two ranks round to bfloat16 elsewhere, which moves log-probabilities by 0.1.

    Two tokens may change places where the gap between them is no more than what both have moved.
    """
    prompts = ["The capital of France is", "Water boils at", "Once upon a time"]
    config: dict[str, Any] = {"dtype": "bfloat16", "quantization": "int8", "max_model_len": 256}
    sampling = SamplingParams(max_tokens=12, temperature=0.0, logprobs=5)
    answers = []
    for ranks in (1, 2):
        with LLM(str(smollm2), ranks=ranks, **config) as llm:
            answers.append([output.outputs[0].logprobs or [] for output in llm.generate(prompts, sampling)])
    moves = []
    for one, two in zip(*answers, strict=True):
        for first, second in zip(one, two, strict=True):
            assert first.top_logprobs[:2] == pytest.approx(second.top_logprobs[:2], abs=0.15)
            moves += [abs(a - b) for a, b in zip(first.top_logprobs[:2], second.top_logprobs[:2], strict=True)]
            if first.token_id != second.token_id:
                before, after = (
                    dict(zip(each.top_token_ids, each.top_logprobs, strict=True)) for each in (first, second)
                )
                for token in (first.token_id, second.token_id):
                    assert before[token] == pytest.approx(after[token], abs=0.15)
                break
    assert len(moves) >= 40
    assert sum(moves) / len(moves) <= 0.05  # 0.15 is the most that one moves, not what all do


@pytest.mark.parametrize("kernels", [name for name in KERNELS if name.endswith("amx")])
@pytest.mark.parametrize("quantization", ["none", "int8", "w8a8", "int4"])
def test_deterministic_int8_weights_give_a_token_the_same_bits_in_any_chunk(
    tmp_path: Path, kernels: str, quantization: str
) -> None:
    shape = {**TINY_SHAPE, "initializer_range": 0.2, "num_hidden_layers": 2}
    folder = make_random_model(tmp_path / "model", shape, dtype="bfloat16")
    tokens = [7 * i % 250 for i in range(50)]
    before = cpu.native.kernels()
    cpu.native.use_kernels(kernels)
    try:
        for deterministic in (True, False):
            worker = _worker(folder, quantization=quantization, deterministic=deterministic)
            whole, chunks = sequence_logits(worker, tokens), sequence_logits(worker, tokens, chunk=7)
            assert torch.equal(whole, chunks) == (deterministic or quantization == "none")
    finally:
        cpu.native.use_kernels(before)


def test_deterministic_results_need_the_kernels_and_say_so(qwq_tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"deterministic=True needs .* cpu, torch.float16 .*set deterministic=false"):
        _worker(qwq_tiny, dtype="float16", deterministic=True)

    group = local_group(torch.device("cpu"))
    group.collectives.has_fixed_order = False
    settings = EngineConfig(model=str(qwq_tiny), deterministic=True)
    with pytest.raises(ConfigError, match=r"deterministic=True needs sums over ranks .*set collectives=shared_memory"):
        resolve_settings(settings, spec_from_config(read_config(qwq_tiny), "qwq_tiny"), group)


def test_quantization_needs_bfloat16_and_says_so(smollm2: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization=int8 needs .*dtype=bfloat16.*float32.*set quantization=none"):
        LLM(str(smollm2), dtype="float32", quantization="int8")


def test_a_backend_that_cannot_serve_is_refused_with_the_setting(smollm2: Path) -> None:
    with pytest.raises(ConfigError, match=r"attention=cpu needs .*block_size=24.*set attention=auto"):
        LLM(str(smollm2), attention="cpu", block_size=24)


def test_the_report_says_threads_and_backend(qwq_tiny: Path) -> None:
    with LLM(str(qwq_tiny), threads=1, max_model_len=64) as llm:
        assert "1 thread(s) each" in llm.status().report[0]
        assert "attention=cpu" in llm.status().report[0]
