"""What runs on a GPU, run on a CPU by Triton's interpreter: the engine's answers are those of the CPU's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.errors import ConfigError
from phalanx.engine.execution import slot_table
from phalanx.engine.execution.cuda_graphs import DecodeGraphs
from phalanx.engine.sampling import penalties, token_counts, truncation
from phalanx.kernels import cpu, cuda, host_copies
from phalanx.tests.engine import programs
from phalanx.tests.engine.conftest import CONFIG

SMALL: dict[str, Any] = {**CONFIG, "max_model_len": 128, "max_num_seqs": 5}
TEN: dict[str, Any] = {"max_tokens": 5, "ignore_eos": True}
SAMPLINGS = [
    SamplingParams(temperature=0, **TEN),
    SamplingParams(temperature=0.9, seed=2, top_k=20, top_p=0.8, **TEN),
    SamplingParams(temperature=0.9, seed=1, **TEN),
]
PROMPTS = [[5] * 20 + [9, 8, 7], [11, 12] * 20, [3]]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels instead of the C++ ones, and a batch's tensors in one copy, as on a GPU."""
    monkeypatch.setattr(cpu, "native", None)
    for module in (slot_table, token_counts, penalties, truncation):
        monkeypatch.setattr(module, "to_device", host_copies.copy_together)
    cuda.interpret(True)
    yield
    cuda.interpret(False)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    with LLM(str(tiny), **SMALL) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SAMPLINGS)]


@pytest.mark.parametrize(
    "changes",
    [{"graphs": "none", "overlap": False}, {"graphs": "eager", "overlap": True}],
    ids=str,
)
def test_tritons_kernels_padded_batches_and_overlap_change_no_answer(
    tiny: Path, interpreted: None, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    replayed: list[int] = []
    run = DecodeGraphs.run

    def counted(self: DecodeGraphs, step: slot_table.ForwardBatch) -> Any:
        replayed.append(len(step.token_ids))
        return run(self, step)

    monkeypatch.setattr(DecodeGraphs, "run", counted)
    with LLM(str(tiny), **{**SMALL, "attention": "triton", **changes}) as llm:
        outputs = llm.generate(PROMPTS, SAMPLINGS)
        status = llm.status()
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert status.free_blocks == status.total_blocks
    # Which sizes depends on when the requests come in.
    assert bool(replayed) == (changes["graphs"] == "eager")
    assert set(replayed) <= {1, 2, 4, 5}
    assert "attention=triton" in status.report[0]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_graphs_captured_while_serving_change_no_answer_and_are_the_same_on_every_rank(
    run_ranks: Callable[..., list[Any]], tiny: Path, expected: list[list[int]], ranks: int
) -> None:
    calls = [(PROMPTS, SAMPLINGS), (PROMPTS, SAMPLINGS)]
    config = {**SMALL, "attention": "triton", "overlap": True}
    results = run_ranks(ranks, programs.generate_with_lazy_graphs, str(tiny), calls, config)
    for answers, captured in results:
        assert captured == [5, 4, 2, 1][: len(captured)]
        assert len(captured) >= 3
        assert captured == results[0][1]
        for answer in answers:
            assert [output.outputs[0].token_ids for output in answer] == expected


def test_graphs_are_refused_where_there_can_be_none(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"graphs=all cannot be: device=cpu has none.*graphs=none"):
        LLM(str(tiny), **{**SMALL, "graphs": "all"})
    with pytest.raises(ConfigError, match=r"graphs='some' is not supported.*auto, none, all, lazy, eager"):
        LLM(str(tiny), **{**SMALL, "graphs": "some"})
    with pytest.raises(ConfigError, match="overlap=2 must be true, false or null"):
        LLM(str(tiny), **{**SMALL, "overlap": 2})
