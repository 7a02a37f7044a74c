"""What the engine has on a GPU alone: graphs, overlap, sampling on the device, streamed weights, memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phalanx import LLM, SamplingParams
from phalanx.engine.client.requests import RequestOutput
from phalanx.engine.config import EngineConfig
from phalanx.engine.coordinator import coordinator
from phalanx.engine.engine import Engine
from phalanx.engine.errors import ConfigError, EngineStopped
from phalanx.engine.execution.cuda_graphs import DecodeGraphs
from phalanx.engine.execution.rank_worker import Worker
from phalanx.engine.protocol.transport import InProcess
from phalanx.engine.sampling.sampler import Sampler, SampleRow
from phalanx.parallel.collectives.local import LocalCollectives
from phalanx.parallel.group import local_group
from phalanx.parallel.loading.checkpoint import WeightSlice, load_weights
from phalanx.parallel.loading.streaming import CudaLanding, Landing
from phalanx.tests.engine.test_overlap import SAMPLINGS
from phalanx.tests.gpu.place import (
    DEVICE,
    GRAPHS,
    NEEDS_GPU,
    ON_GPU,
    engine_config,
    normal,
    torch_alone,
    waiting_is_an_error,
)
from phalanx.tests.parallel.loading.test_streaming import parts_of, save

gpu_only = pytest.mark.skipif(not ON_GPU, reason=NEEDS_GPU)


def _samplings() -> list[SamplingParams]:
    """Return samplings of every kind; on a CPU fewer and shorter ones."""
    if ON_GPU:
        return SAMPLINGS
    short: dict[str, Any] = {"max_tokens": 4, "ignore_eos": True}
    return [
        SamplingParams(temperature=0, logprobs=2, **short),
        SamplingParams(temperature=0.9, seed=1, **short),
        SamplingParams(temperature=0.9, seed=2, top_k=20, top_p=0.8, **short),
        SamplingParams(temperature=1.0, seed=5, top_p=0.95, repetition_penalty=1.2, **short),
    ]


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    longest = 80 if ON_GPU else 10
    return [[5] * 3 + [rng.randrange(3, 1031) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def _assert_same(outputs: list[RequestOutput], others: list[RequestOutput]) -> None:
    """Tokens exactly, log-probabilities as close as float32 is on any device."""
    for output, other in zip(outputs, others, strict=True):
        for one, two in zip(output.outputs, other.outputs, strict=True):
            assert (one.token_ids, one.text, one.finish_reason) == (two.token_ids, two.text, two.finish_reason)
            _assert_close(one.logprobs, two.logprobs)
        _assert_close(output.prompt_logprobs, other.prompt_logprobs)


def _assert_close(some: list[Any] | None, others: list[Any] | None) -> None:
    assert (some is None) == (others is None)
    for one, other in zip(some or [], others or [], strict=True):
        assert one.token_id == other.token_id
        assert [one.logprob, *one.top_logprobs] == pytest.approx([other.logprob, *other.top_logprobs], abs=1e-3)


def _generate(folder: Path, **changes: Any) -> list[RequestOutput]:
    samplings = _samplings()
    with LLM(str(folder), **engine_config(**changes)) as llm:
        outputs = llm.generate(_prompts(len(samplings)), samplings)
        status = llm.status()
    assert status.free_blocks == status.total_blocks
    return outputs


@pytest.fixture(scope="module")
def of_a_cpu(tiny: Path) -> list[RequestOutput]:
    """What an engine on a CPU answers, by torch's operations."""
    with torch_alone():
        return _generate(tiny, device="cpu", attention="torch", graphs="none", overlap=False, kv_memory=2**23)


def test_an_engine_on_the_device_answers_as_one_on_a_cpu(tiny: Path, of_a_cpu: list[RequestOutput]) -> None:
    _assert_same(_generate(tiny, graphs="none", overlap=False), of_a_cpu)


def test_overlapping_steps_change_no_answer(tiny: Path, of_a_cpu: list[RequestOutput]) -> None:
    _assert_same(_generate(tiny, graphs="none", overlap=True), of_a_cpu)


@pytest.mark.parametrize("graphs", GRAPHS)
def test_replayed_graphs_change_no_answer(
    tiny: Path, of_a_cpu: list[RequestOutput], graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed: set[int] = set()
    run = DecodeGraphs.run

    def counted(self: DecodeGraphs, batch: Any) -> torch.Tensor:
        replayed.add(len(batch.token_ids))
        return run(self, batch)

    monkeypatch.setattr(DecodeGraphs, "run", counted)
    monkeypatch.setattr(coordinator, "CAPTURE_EVERY", 2)
    _assert_same(_generate(tiny, graphs=graphs, overlap=True), of_a_cpu)
    assert replayed
    assert graphs == "lazy" or max(replayed) >= min(4, len(of_a_cpu))


def test_lazy_graphs_are_all_captured_in_the_end_and_serve_then(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "CAPTURE_EVERY", 1)
    config = EngineConfig(**{"model": str(tiny), **engine_config(graphs="lazy")})
    link = InProcess()
    engine = Engine(config, local_group(DEVICE), link.transport)
    assert engine.worker.uncaptured == ([13, 12, 8, 4, 2, 1] if ON_GPU else [5, 4, 2, 1])
    greedy = SamplingParams(max_tokens=30 if ON_GPU else 7, temperature=0, ignore_eos=True)
    with LLM.from_engine(engine, link) as llm:
        first = llm.generate(_prompts(3), greedy)
        assert engine.worker.uncaptured == []
        again = llm.generate(_prompts(3), greedy)
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in again]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if ON_GPU else ["float32"])
def test_a_graph_computes_what_its_operations_do_one_by_one(tiny: Path, dtype: str, monkeypatch: Any) -> None:
    logits: dict[str, list[torch.Tensor]] = {"all": [], "eager": []}
    run = DecodeGraphs.run
    for graphs, seen in logits.items():

        def kept(self: DecodeGraphs, batch: Any, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(run(self, batch).clone())
            return seen[-1]

        monkeypatch.setattr(DecodeGraphs, "run", kept)
        with LLM(str(tiny), **engine_config(graphs=graphs, dtype=dtype, overlap=False)) as llm:
            # The rows of one request come to run in the same steps each time; they are padded to four.
            llm.generate([[5, 6, 7]], SamplingParams(n=3, max_tokens=6, temperature=0, ignore_eos=True))
    assert len(logits["all"]) == len(logits["eager"]) > 2
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for replayed, eager in zip(logits["all"], logits["eager"], strict=True):
        assert float((replayed - eager).norm() / eager.norm()) <= tolerance


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.8, "seed": 1}, {"temperature": 0.8, "seed": 1, "top_k": 20, "top_p": 0.9}, "mixed"],
    ids=str,
)
def test_launching_a_decode_step_waits_for_nothing(tiny: Path, sampling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else the GPU is idle while the host gets the next step ready."""
    launch, checked = Worker.launch, []

    def watched(self: Worker, plan: Any) -> Any:
        if not plan.only_decodes or plan.step < 8:
            return launch(self, plan)
        checked.append(plan.step)
        with waiting_is_an_error():
            return launch(self, plan)

    monkeypatch.setattr(Worker, "launch", watched)
    kinds = [{}, {"temperature": 0.8, "seed": 1}] if sampling == "mixed" else [sampling] * 2
    with LLM(str(tiny), **engine_config(graphs="all", overlap=True)) as llm:
        llm.generate([[5, 6], [7]], [SamplingParams(max_tokens=14, ignore_eos=True, **kind) for kind in kinds])
    assert len(checked) >= 3


def _rows(count: int) -> list[SampleRow]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.6, "min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": 0.4},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.1, "bias_token_ids": (4, 7), "bias_values": (3, -3)},
        {"temperature": 1.0, "min_tokens": 9, "end_token_ids": (8, 11), "top_p": 0.95},
        {"temperature": 50.0, "top_p": 0.99},
    ]
    from phalanx.engine.scheduling.step_plan import SlotSampling

    said = np.array([3, 3, 5, 9, 9, 2], dtype=np.int32)
    return [SampleRow(SlotSampling(**kinds[i % len(kinds)], seed=i), said, 3, len(said)) for i in range(count)]


def test_equal_logits_give_the_same_tokens_on_every_device() -> None:
    rows, vocabulary = _rows(60 if ON_GPU else 10), 20_011 if ON_GPU else 5000
    logits = 3 * normal(len(rows), vocabulary)

    def tokens(where: torch.device) -> list[int]:
        sampler = Sampler(LocalCollectives(where), range(vocabulary), vocabulary)
        chosen = sampler.sample(logits.to(where, copy=True), rows)
        assert chosen is not None
        return chosen[0]

    on_device = tokens(DEVICE)
    with torch_alone():
        assert on_device == tokens(torch.device("cpu"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_bytes", [24, 2**16])
def test_streamed_weights_are_bit_for_bit_those_of_the_cpus_loader(
    tmp_path: Path, buffer_bytes: int, stored: torch.dtype, wanted: torch.dtype
) -> None:
    save(tmp_path, dtype=stored)
    expected = parts_of(wanted)
    there = [WeightSlice(e.name, e.shape, e.index, _copy(e.destination), e.owner) for e in parts_of(wanted)]
    kept = [[one.destination for one in parts] for parts in (expected, there)]
    landing = (CudaLanding if ON_GPU else Landing)(DEVICE, buffer_bytes)
    load_weights(tmp_path, expected)
    report = load_weights(tmp_path, there, threads=3, landing=landing)
    assert report.bytes_read == report.shard_bytes
    for one, other in zip(*kept, strict=True):
        assert torch.equal(one, other.cpu())


def _copy(part: torch.Tensor) -> torch.Tensor:
    """On the device, of the same strides."""
    there = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=DEVICE)
    return there.copy_(part)


def test_a_models_weights_on_the_device_are_those_of_its_checkpoint(qwq_tiny: Path) -> None:
    config = EngineConfig(**{"model": str(qwq_tiny), **engine_config()})
    engine = Engine(config, local_group(DEVICE), InProcess().transport)
    loaded = list(engine.worker.model.weight_slices())
    read = [WeightSlice(part.name, part.shape, part.index, torch.empty(part.destination.shape)) for part in loaded]
    kept = [part.destination for part in read]
    load_weights(qwq_tiny, read)
    assert len(loaded) > 40
    for part, expected in zip(loaded, kept, strict=True):
        assert torch.equal(part.destination.detach().float().cpu(), expected), part.name
    engine.worker.close()


@gpu_only
def test_the_kv_pool_stays_within_its_fraction(tiny: Path) -> None:
    # What libraries take when they are first used is not of this engine alone.
    with LLM(str(tiny), **engine_config()) as llm:
        llm.generate([5], SamplingParams(max_tokens=4))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    allowed = total - free + 2**28
    many = {"max_num_seqs": 2048, "max_num_batched_tokens": 2048, "graphs": "none", "kv_memory": allowed / total}
    with LLM(str(tiny), **engine_config(**many)) as llm:
        status = llm.status()
        llm.generate([[5] * 500] * 64, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True))
        used = total - torch.cuda.mem_get_info()[0]
    assert status.total_blocks < 2048 * 512 // status.block_size  # all sequences together could use more
    assert status.total_blocks >= 512 // status.block_size
    assert used <= allowed + 2**25


@gpu_only
def test_too_little_memory_says_what_to_set_to_which_value(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"set .*kv_memory to at least 0\.\d+"):
        LLM(str(tiny), **engine_config(kv_memory=1e-3))
    with pytest.raises(ConfigError, match=r"max_model_len to at most \d+|kv_memory to at least \d+ \(bytes\)"):
        LLM(str(tiny), **engine_config(kv_memory=2.0**16))


@gpu_only
def test_a_step_out_of_memory_says_what_to_lower(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(str(tiny), **engine_config(graphs="none")) as llm:
        free = torch.cuda.mem_get_info()[0]
        launch = Worker._launch

        def greedy(self: Worker, plan: Any) -> Any:
            torch.empty(2 * free, dtype=torch.uint8, device=DEVICE)
            return launch(self, plan)

        monkeypatch.setattr(Worker, "_launch", greedy)
        with pytest.raises(EngineStopped, match=r"out of GPU memory: .*lower .* from .* to "):
            llm.generate([[5, 6]], SamplingParams(max_tokens=2))


def test_the_report_says_what_serves(tiny: Path) -> None:
    with LLM(str(tiny), **engine_config()) as llm:
        report = llm.status().report
    assert f"on {DEVICE.type}" in report[0]
    assert "attention=triton" in report[0]
    if ON_GPU:
        assert report[2] == "CUDA graphs of decode steps; steps overlap: yes"
