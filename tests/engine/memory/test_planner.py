"""Memory arithmetic, the worst step, and advice: each value that is advised must be enough."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.benchmarks.lab.sequence_logits import sequence_logits
from phalanx.engine.config import EngineConfig
from phalanx.engine.errors import ConfigError, EngineStopped
from phalanx.engine.execution.worker_factory import WorkerParts, assemble, load_parts, measure_largest_step
from phalanx.engine.memory.advice import out_of_memory_advice
from phalanx.engine.memory.planner import (
    CPU_BUDGET,
    GRAPH_BYTES,
    HIGHEST_FRACTION,
    MemoryRequirements,
    RankMemory,
    estimate_gpu,
    fewest_ranks,
    graph_reserve,
    host_budget,
    kv_bytes,
    like,
)
from phalanx.engine.memory.profiler import MemoryBudget, count_blocks
from phalanx.engine.memory.worst_case import worst_case_plan
from phalanx.engine.models.decoder import CausalLM
from phalanx.engine.models.spec import dimensions, read_config, spec_from_config
from phalanx.engine.sampling.sampler import Sampler
from phalanx.engine.scheduling.step_plan import decode, encode
from phalanx.launch.cli.presets import load_preset
from phalanx.parallel.collectives.local import LocalCollectives, LocalControl
from phalanx.parallel.group import Group, local_group
from phalanx.parallel.partition import partition

GIB = 2**30
QWQ = dimensions(spec_from_config(load_preset("qwq_32b_preview")["shape"], "qwq"))
QWQ_PARAMETERS = partition(QWQ, 1).parameters(0)


def requirements(
    ranks: int = 1, element_bytes: int = 2, max_model_len: int = 32768, **config: Any
) -> MemoryRequirements:
    settings = EngineConfig(model="m", ranks=ranks, **config)
    return MemoryRequirements(settings, partition(QWQ, ranks), element_bytes, max_model_len, block_size=16)


def gpu(
    asked: MemoryRequirements,
    rank: int = 0,
    total: int = 80 * GIB,
    elsewhere: int = GIB,
    sharers: int = 1,
    **changes: int,
) -> RankMemory:
    """A rank of QwQ with its weights on a GPU, beside those of its sharers and something `elsewhere`."""
    weights = asked.parts.parameters(rank) * asked.element_bytes
    block = asked.block_size * asked.parts.kv_elements_per_token(rank) * asked.element_bytes
    in_use = elsewhere + sharers * weights
    return RankMemory(rank, block, total=total, in_use=in_use, weights=weights, sharers=sharers, **changes)


@pytest.mark.parametrize(
    ("fraction", "sharers", "expected"),
    [(0.9, 1, 900 - 300 - 50 - 7), (1.0, 1, 1000 - 300 - 50 - 7), (0.9, 2, 300 - 50 - 7), (0.3, 1, -57)],
)
def test_the_cache_gets_the_allowed_fraction_less_all_that_is_taken(
    fraction: float, sharers: int, expected: int
) -> None:
    memory = RankMemory(0, 1, total=1000, in_use=300, activations=50, reserve=7, sharers=sharers)
    assert kv_bytes(memory, fraction) == expected


@given(
    st.integers(1, 10**12),
    st.integers(0, 10**12),
    st.integers(0, 10**11),
    st.integers(0, 10**10),
    st.integers(1, 4),
    st.floats(0.01, 1.0),
)
def test_nothing_goes_beyond_the_fraction(
    total: int, in_use: int, activations: int, reserve: int, sharers: int, fraction: float
) -> None:
    memory = RankMemory(0, 1, 0, total, in_use, 0, activations, reserve, sharers)
    everything = in_use + sharers * (kv_bytes(memory, fraction) + activations + reserve)
    assert total * fraction - sharers - 1 < everything <= total * fraction


def test_graphs_reserve_a_pool_of_the_largest_something_for_each_and_a_block() -> None:
    assert graph_reserve([], 10**9, 2048, 600_000, 7) == 0
    assert graph_reserve([1], 2048, 2048, 10, 7) == 1 + 10 + GRAPH_BYTES + 7
    assert graph_reserve([64, 1, 8], 2048 * 1000 - 5, 2048, 10, 7) == 64 * (1000 + 10) + 3 * GRAPH_BYTES + 7


@pytest.mark.parametrize(
    ("kv_memory", "local_size", "sequence", "available", "expected"),
    [
        (5e6, 2, 10**9, 10**12, 5_000_000),
        (0.9, 1, 10**6, 10**12, CPU_BUDGET),
        (0.9, 4, 10**6, 10**12, CPU_BUDGET // 4),
        (0.9, 4, 2 * GIB, 10**12, 2 * GIB),
        (0.5, 2, 10**6, 10**9, 250_000_000),
    ],
)
def test_on_a_cpu_the_cache_is_modest(
    kv_memory: float, local_size: int, sequence: int, available: int, expected: int
) -> None:
    assert host_budget(EngineConfig(model="m", kv_memory=kv_memory), local_size, sequence, available) == expected


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(0, 300), st.integers(1, 70), st.integers(1, 16))
def test_the_worst_step_is_full_and_a_step_that_ranks_may_be_sent(
    rows: int, more: int, max_model_len: int, block_size: int
) -> None:
    tokens = rows + more
    plan = worst_case_plan(rows, tokens, max_model_len, block_size)
    assert decode(encode(plan)) == plan
    assert plan.num_tokens == min(tokens, rows * max_model_len)
    assert plan.slots == plan.sample_rows == [start.slot for start in plan.starts] == list(range(rows))
    known = [len(start.token_ids) for start in plan.starts]
    assert max(known) == known[-1] == max_model_len
    assert [first + count for first, count in zip(plan.positions, plan.counts, strict=True)] == known
    assert min(plan.counts) >= 1
    assert [count == 1 for count in plan.counts] == [row < plan.num_decodes for row in range(rows)]
    # Each sequence has every block it needs, and all of them are the one there is.
    table = sorted(zip(plan.block_slots, plan.block_indices, strict=True))
    assert table == [(slot, i) for slot in range(rows) for i in range(-(-known[slot] // block_size))]
    assert set(plan.block_ids) == {0}


def test_all_ranks_get_what_the_poorest_has() -> None:
    asked = requirements(ranks=3)
    ranks = [gpu(asked, rank, activations=GIB) for rank in range(3)]
    alone = [kv_bytes(memory, 0.9) // memory.block for memory in ranks]
    assert count_blocks(asked, ranks) == min(alone)
    poor = dataclasses.replace(ranks[1], in_use=ranks[1].in_use + 20 * GIB)
    assert count_blocks(asked, [ranks[0], poor, ranks[2]]) == kv_bytes(poor, 0.9) // poor.block < min(alone)


def test_no_more_blocks_than_all_sequences_can_use() -> None:
    asked = requirements(max_model_len=1000, max_num_seqs=2)
    assert count_blocks(asked, [gpu(asked)]) == 2 * 63
    assert count_blocks(asked, [RankMemory(0, 10, host_budget=10**9)]) == 2 * 63
    generous = requirements(max_model_len=1000, max_num_seqs=2, kv_memory=70 * GIB)
    assert count_blocks(generous, [gpu(generous)]) == 2 * 63


def test_a_cpu_with_too_little_says_what_to_change() -> None:
    asked = requirements(max_model_len=100)
    with pytest.raises(
        ConfigError,
        match=r"room for 48 tokens \(35 bytes\).*max_model_len=100 needs 70 bytes on a rank: lower max_model_len to 48 "
        r"or raise kv_memory to at least 70 \(bytes\), or use more ranks",
    ):
        count_blocks(asked, [RankMemory(0, 10, host_budget=35)])
    with pytest.raises(ConfigError, match=r"room for 0 tokens \(5 bytes\).*on a rank: raise kv_memory to at least 70"):
        count_blocks(asked, [RankMemory(0, 10, host_budget=5)])


def test_weights_that_do_not_fit_are_refused_with_the_ranks_that_would_do() -> None:
    asked = requirements(element_bytes=4)
    with pytest.raises(ConfigError) as caught:
        count_blocks(asked, [gpu(asked)])
    text = str(caught.value)
    weights = QWQ_PARAMETERS * 4
    assert text.startswith(f"rank 0's weights of {weights:,} bytes do not fit: rank 0's GPU has {80 * GIB:,} bytes")
    assert text.endswith("set ranks to at least 2, or dtype to bfloat16")
    with pytest.raises(ConfigError, match="take a smaller model or GPUs with more memory"):
        count_blocks(asked, [gpu(asked, total=2 * GIB)])


def test_bytes_that_a_gpu_lacks_are_refused_with_those_it_has() -> None:
    asked = requirements(kv_memory=40 * GIB)
    memory = gpu(asked, activations=GIB)
    with pytest.raises(
        ConfigError, match=r"kv_memory=42949672960 \(bytes\) asks for more.*kv_memory to at most"
    ) as caught:
        count_blocks(asked, [memory])
    lower = int(re.search(r"at most (\d+) \(bytes\)", str(caught.value))[1])
    changed = requirements(kv_memory=lower)
    assert count_blocks(changed, [memory]) == lower // memory.block


def fewest(asked: MemoryRequirements, memory: RankMemory) -> int | None:
    """The fewest ranks above the present number, on GPUs like this one."""
    return fewest_ranks(asked, partial(like, asked, memory), len(asked.parts.shares) + 1)


def advised(text: str) -> list[dict[str, Any]]:
    """The changes that a message offers."""
    pattern = r"(\w+) (?:to at least|to at most|to|from \S+ to) (bfloat16|[\d.]+)"
    changes = text.rsplit("; set ", 1)[1].split(", or ")
    return [{name: _value(value) for name, value in re.findall(pattern, change)} for change in changes]


def _value(text: str) -> int | float | str:
    return text if text == "bfloat16" else int(text) if text.isdigit() else float(text)


def scaled(memory: RankMemory, old: EngineConfig, new: EngineConfig) -> RankMemory:
    """The memory of a step of fewer tokens and rows, whichever of the two its activations grow with."""
    keep = max(
        new.max_num_batched_tokens / old.max_num_batched_tokens,
        (new.max_num_seqs / old.max_num_seqs) if old.max_num_seqs > 1 else 0,
    )
    return dataclasses.replace(memory, activations=int(memory.activations * keep))


def after(
    asked: MemoryRequirements, memory: RankMemory, change: dict[str, Any]
) -> tuple[MemoryRequirements, list[RankMemory]]:
    """What the ranks find once a change is made."""
    config, elsewhere = asked.config, memory.in_use - memory.sharers * memory.weights
    element_bytes = 2 if change.get("dtype") == "bfloat16" else asked.element_bytes
    length = change.get("max_model_len", asked.max_model_len)
    config = dataclasses.replace(config, **change)
    changed = MemoryRequirements(config, partition(QWQ, config.ranks), element_bytes, length, asked.block_size)
    ranks = [
        gpu(
            changed,
            rank,
            memory.total,
            elsewhere,
            memory.sharers,
            activations=memory.activations,
            reserve=memory.reserve,
        )
        for rank in range(config.ranks)
    ]
    return changed, [scaled(one, asked.config, config) for one in ranks]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_each_change_that_is_advised_is_enough_by_itself(data: st.DataObject) -> None:
    ranks = data.draw(st.sampled_from([1, 1, 2, 3]))
    kv_memory = data.draw(st.sampled_from([0.9, 0.5, 0.97, 1 * GIB, 6 * GIB, 9 * GIB]))
    asked = requirements(
        ranks,
        data.draw(st.sampled_from([2, 4])),
        data.draw(st.sampled_from([4096, 32768])),
        kv_memory=kv_memory,
        max_num_seqs=data.draw(st.sampled_from([1, 64, 256])),
        max_num_batched_tokens=data.draw(st.sampled_from([256, 2048, 8192])),
    )
    memory = gpu(
        asked,
        total=data.draw(st.integers(20, 160)) * GIB,
        elsewhere=data.draw(st.integers(0, 4 * GIB)),
        activations=data.draw(st.integers(0, 8 * GIB)),
        reserve=data.draw(st.integers(0, GIB)),
        sharers=data.draw(st.sampled_from([1, 1, 2])),
    )
    try:
        count_blocks(asked, [memory])
    except ConfigError as error:
        text = str(error)
    else:
        return
    if "take a smaller model" in text:
        assert fewest(asked, memory) is None or memory.sharers > 1
        return
    changes = advised(text)
    assert len(changes) == text.count(", or ") + 1
    for change in changes:
        changed, found = after(asked, memory, change)
        assert count_blocks(changed, found) >= changed.blocks_of_sequence
        if "kv_memory" in change and change["kv_memory"] <= 1:
            assert change["kv_memory"] <= HIGHEST_FRACTION


def test_all_kinds_of_changes_are_advised_where_they_help() -> None:
    asked = requirements(element_bytes=4, max_num_batched_tokens=8192)
    memory = gpu(asked, total=160 * GIB, activations=16 * GIB)
    with pytest.raises(ConfigError) as caught:
        count_blocks(asked, [memory])
    names = [set(change) for change in advised(str(caught.value))]
    assert names == [
        {"ranks"},
        {"max_model_len"},
        {"kv_memory"},
        {"max_num_batched_tokens", "max_num_seqs"},
        {"dtype"},
    ]


def test_the_fewest_ranks_are_the_first_that_fit() -> None:
    asked = requirements()
    memory = gpu(asked, total=24 * GIB, activations=GIB)
    ranks = fewest(asked, memory)
    assert ranks is not None

    def fits(count: int) -> bool:
        changed, found = after(asked, memory, {"ranks": count})
        return all(kv_bytes(one, 0.9) >= changed.blocks_of_sequence * one.block for one in found)

    assert [fits(count) for count in range(1, ranks + 1)] == [False] * (ranks - 1) + [True]


def test_out_of_memory_names_values_from_and_to() -> None:
    config = EngineConfig(model="m", max_num_batched_tokens=8192, max_num_seqs=256)
    text = out_of_memory_advice(
        config, total=80 * GIB, kept=74 * GIB, elsewhere=2 * GIB, activations=6 * GIB, cache=10 * GIB
    )
    # 4 GiB are left of 7.5 that the step is taken to need.
    assert f"more than the {4 * GIB:,} that are left (the largest step took {6 * GIB:,}" in text
    assert text.endswith(
        "lower max_num_batched_tokens from 8192 to 4352 and max_num_seqs from 256 to 136, or kv_memory from 0.9 to 0.85"
    )


def test_out_of_memory_without_any_value_that_helps_advises_more_ranks() -> None:
    config = EngineConfig(model="m", max_num_batched_tokens=1, max_num_seqs=1, kv_memory=GIB)
    text = out_of_memory_advice(config, total=GIB, kept=GIB, elsewhere=0, activations=GIB, cache=GIB)
    assert text.endswith("left (the largest step took 1,073,741,824 when the engine started): use more ranks")


def test_of_a_few_bytes_left_the_advice_is_still_to_take_less() -> None:
    config = EngineConfig(model="m", max_num_batched_tokens=513, max_num_seqs=6, kv_memory=float(GIB))
    text = out_of_memory_advice(config, total=9 * GIB, kept=9 * GIB - 3, elsewhere=0, activations=0, cache=GIB)
    assert "from 513 to 384" in text


@given(st.data())
def test_after_the_advice_the_step_that_failed_fits(data: st.DataObject) -> None:
    total = data.draw(st.integers(8, 200)) * GIB
    cache = data.draw(st.integers(GIB, total // 2))
    kept = cache + data.draw(st.integers(0, total - cache))
    elsewhere = data.draw(st.integers(0, total - kept))
    activations = data.draw(st.integers(0, 16 * GIB))
    spare = data.draw(st.integers(0, GIB))
    config = EngineConfig(
        model="m",
        max_num_batched_tokens=data.draw(st.integers(512, 16384)),
        max_num_seqs=data.draw(st.integers(1, 512)),
        kv_memory=data.draw(st.one_of(st.just(float(cache)), st.floats(0.1, 1.0))),
    )
    left = total - kept - elsewhere
    needed = max(left, activations) * 1.25
    text = out_of_memory_advice(
        config, total=total, kept=kept, elsewhere=elsewhere, activations=activations, cache=cache, spare=spare
    )
    for name, value in re.findall(r"(\w+) from \S+ to ([\d.]+)", text):
        if name == "max_num_batched_tokens":
            assert needed * int(value) / config.max_num_batched_tokens <= left + 1
        elif name == "max_num_seqs":
            assert needed * (int(value) - 1) / config.max_num_seqs <= left
        elif config.kv_memory > 1:
            assert needed <= left + cache - int(value) + 1
        else:
            # What the lower fraction takes from the KV cache, beyond what the cache never took.
            assert needed <= left + (config.kv_memory - float(value)) * total - spare + 1


class _Host(LocalCollectives):
    """Rank 0 of a group whose other ranks say what it says, changed as `others` tell."""

    def __init__(self, others: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        super().__init__(torch.device("cpu"))
        self.size, self._others = 1 + len(others), others

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor]:
        return [x, *(other(x.clone()) for other in self._others)]


def _beside(mine: torch.Tensor) -> torch.Tensor:
    """Another rank, on the same GPU."""
    mine[1] += 1
    return mine


def _apart(mine: torch.Tensor) -> torch.Tensor:
    """Another rank, on a GPU of its own."""
    mine[:2] += 1
    return mine


def _fake_cuda(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    """A GPU whose memory never changes, but for a step that takes 3 GiB."""
    answers = {
        "empty_cache": lambda: None,
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: (free, total),
        "memory_allocated": lambda device: 5 * GIB,
        "memory_reserved": lambda device: 6 * GIB,
        "max_memory_reserved": lambda device: 9 * GIB,
        "get_device_properties": lambda device: SimpleNamespace(uuid="GPU-0"),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def _gpu_budget(asked: MemoryRequirements, *others: Callable[[torch.Tensor], torch.Tensor]) -> MemoryBudget:
    device = torch.device("cuda", 0)
    group = Group(0, 1 + len(others), 1, device, LocalCollectives(device), _Host(others), LocalControl())
    return MemoryBudget(asked, group, asked.parts.kv_elements_per_token(0) * asked.element_bytes)


@pytest.mark.parametrize(("others", "sharers"), [([], 1), ([_beside], 2), ([_apart], 1), ([_beside, _apart], 2)])
def test_a_gpu_is_measured_with_a_step_and_divided_among_its_ranks(
    others: list[Callable[[torch.Tensor], torch.Tensor]], sharers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_cuda(monkeypatch, 60 * GIB, 140 * GIB)
    asked = requirements(ranks=1 + len(others))
    budget = _gpu_budget(asked, *others)
    steps: list[int] = []
    assert budget.measure_step(lambda: steps.append(1)) == 3 * GIB
    assert len(steps) == 2
    block = 16 * asked.parts.kv_elements_per_token(0) * 2
    room = (int(140 * GIB * 0.9) - 80 * GIB) // sharers - 3 * GIB
    assert budget.agree_on_blocks() == room // block
    logits = 4 * len(asked.parts.shares[0].vocab)
    reserve = graph_reserve([64, 1], 3 * GIB, 2048, logits, block)
    assert budget.agree_on_blocks([64, 1]) == (room - reserve) // block


@pytest.mark.parametrize("kv_memory", [0.9, 0.95, 8 * GIB])
@pytest.mark.parametrize("elsewhere", [0, GIB])
def test_a_plan_with_the_recorded_peak_says_what_the_profiler_agrees_on(
    kv_memory: float, elsewhere: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requirements(ranks=2, kv_memory=kv_memory)
    total, peak = 80 * GIB, 3 * GIB
    _fake_cuda(monkeypatch, total - asked.weights(0) - elsewhere, total)
    budget = _gpu_budget(asked, _apart)
    assert budget.measure_step(lambda: None) == peak
    logits = 4 * len(asked.parts.shares[0].vocab)
    reserve = graph_reserve([8, 1], peak, 2048, logits, asked.block(0))
    planned = estimate_gpu(asked, 0, total, peak, reserve)
    planned = dataclasses.replace(planned, in_use=planned.in_use + elsewhere)
    assert budget.agree_on_blocks([8, 1]) == asked.blocks(planned)
    assert 0 < asked.blocks(planned) < asked.blocks_of_sequence * asked.config.max_num_seqs


def test_a_gpu_too_small_for_the_weights_is_refused_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_cuda(monkeypatch, 47 * GIB, 48 * GIB)
    with pytest.raises(ConfigError, match=r"rank 0's weights of .* do not fit.*set ranks to at least 2"):
        _gpu_budget(requirements()).check_before_loading()
    _gpu_budget(requirements(ranks=2), _apart).check_before_loading()


def test_a_step_without_memory_stops_the_engine_with_advice_and_while_it_is_built_is_a_wrong_setting(
    qwq_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = _parts(qwq_tiny)
    worker = assemble(parts, num_blocks=1)
    _fake_cuda(monkeypatch, 0, 80 * GIB)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CausalLM, "forward", fail)
    words = (
        r"out of GPU memory: .*lower max_num_batched_tokens from 96 to \d+ and max_num_seqs from 6 to \d, or kv_memory"
    )
    with pytest.raises(EngineStopped, match=words):
        worker.execute(worst_case_plan(6, 96, 64, worker.capacity.block_size))
    with pytest.raises(ConfigError, match=words):
        measure_largest_step(parts)


def _parts(folder: Path) -> WorkerParts:
    config = EngineConfig(
        model=str(folder), dtype="float32", max_model_len=64, max_num_seqs=6, max_num_batched_tokens=96
    )
    spec = spec_from_config(read_config(folder), str(folder))
    return load_parts(config, spec, folder, local_group(torch.device("cpu")))


def test_a_worker_runs_the_worst_step_and_goes_on_as_before(qwq_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts(qwq_tiny)
    worker = assemble(parts, num_blocks=parts.memory.agree_on_blocks())
    tokens = [3 * i % 1000 for i in range(50)]
    expected = sequence_logits(worker, tokens)
    rows: list[int] = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *args: rows.append(len(args[2])) or sample(*args))
    assert 0 <= measure_largest_step(parts) < GIB
    assert rows == [6, 6]
    assert torch.equal(sequence_logits(worker, tokens), expected)
