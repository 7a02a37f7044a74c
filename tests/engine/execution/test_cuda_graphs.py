"""Sizes of CUDA graphs, what the setting becomes, and static padded batches, without a GPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phalanx.engine.execution.cuda_graphs import DecodeGraphs, EagerRecorder, choose_graphs, graph_sizes
from phalanx.engine.execution.slot_table import SlotTable
from phalanx.engine.models.forward_batch import ForwardBatch
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart, StepPlan
from phalanx.kernels.host_copies import copy_together

BLOCK = 4
MAX_LEN = 32
DUMMY = 50
CPU = torch.device("cpu")


@given(st.integers(1, 5000))
def test_every_number_of_rows_has_a_size_that_wastes_little(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_num_seqs
    for below, size in itertools.pairwise(sizes):
        worst = size - (below + 1)
        assert worst <= max(3, size // 5)


def test_there_are_few_sizes() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(7) == (1, 2, 4, 7)
    assert graph_sizes(33) == (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 33)
    assert len(graph_sizes(256)) == 22
    with pytest.raises(ValueError, match="max_num_seqs=0 must be at least 1"):
        graph_sizes(0)


@pytest.mark.parametrize(
    ("setting", "device", "fits", "collectives_fit", "expected"),
    [
        ("auto", "cuda", True, True, "all"),
        ("auto", "cuda", False, True, "none"),
        ("auto", "cuda", True, False, "none"),
        ("auto", "cpu", True, True, "none"),
        ("none", "cuda", True, True, "none"),
        ("all", "cuda", True, True, "all"),
        ("lazy", "cuda", True, True, "lazy"),
        ("lazy", "cpu", True, True, r"graphs=lazy cannot be: device=cpu has none.*set graphs=none"),
        ("all", "cuda", False, True, r"graphs=all cannot be: attention=torch cannot be captured.*attention=triton"),
        ("all", "cuda", True, False, r"graphs=all cannot be: these ranks' collectives cannot.*a GPU for each"),
        ("eager", "cpu", True, False, "eager"),
        ("eager", "cuda", False, True, r"graphs=eager cannot be: attention=torch asks for the lengths"),
    ],
)
def test_what_becomes_of_the_setting(
    setting: str, device: str, fits: bool, collectives_fit: bool, expected: str
) -> None:
    facts: dict[str, Any] = {"device": device, "attention": "triton" if fits else "torch", "fits": fits}
    if expected in ("none", "all", "lazy", "eager"):
        chosen, reason = choose_graphs(setting, **facts, collectives_fit=collectives_fit)
        assert chosen == expected
        assert reason
    else:
        with pytest.raises(ValueError, match=expected):
            choose_graphs(setting, **facts, collectives_fit=collectives_fit)


def _decode_plan(step: int, slots: list[int], positions: list[int], **changes: Any) -> StepPlan:
    values: dict[str, Any] = {
        "step": step,
        "starts": [],
        "token_slots": [],
        "token_ids": [],
        "block_slots": [],
        "block_indices": [],
        "block_ids": [],
        "slots": slots,
        "positions": positions,
        "counts": [1] * len(slots),
        "num_decodes": len(slots),
        "sample_rows": list(range(len(slots))),
    }
    return StepPlan(**{**values, **changes})


def _started(lengths: list[int]) -> tuple[SlotTable, list[StepPlan]]:
    """A table with a sequence of `lengths[i]` tokens in slot i, and the plan that decodes the last token of each."""
    table = SlotTable(8, MAX_LEN, BLOCK, CPU, dummy_block=DUMMY)
    starts, block_slots, block_indices, block_ids = [], [], [], []
    for slot, length in enumerate(lengths):
        starts.append(SlotStart(slot, length, [100 * slot + i for i in range(length)], SlotSampling()))
        for index in range(-(-length // BLOCK)):
            block_slots.append(slot)
            block_indices.append(index)
            block_ids.append(7 * slot + index)
    positions = [length - 1 for length in lengths]
    changes = {"starts": starts, "block_slots": block_slots, "block_indices": block_indices, "block_ids": block_ids}
    return table, [_decode_plan(1, list(range(len(lengths))), positions, **changes)]


def test_a_padded_batch_ends_in_rows_of_one_token_in_the_dummy_block() -> None:
    table, (plan,) = _started([3, 9, 6])
    table.apply(plan)
    batch = table.batch(plan, pad_to=5)
    attention = batch.attention
    assert attention.num_decodes == 5
    assert attention.seqused_k.tolist() == [3, 9, 6, 1, 1]
    assert attention.cu_q.tolist() == [0, 1, 2, 3, 4, 5]
    assert attention.slot_mapping.tolist() == [2, (7 + 2) * BLOCK, (14 + 1) * BLOCK + 1, DUMMY * BLOCK, DUMMY * BLOCK]
    assert attention.block_table[3:, 0].tolist() == [DUMMY, DUMMY]
    assert batch.token_ids.tolist() == [2, 108, 205, 0, 0]
    assert batch.positions.tolist() == [2, 8, 5, 0, 0]
    assert batch.sample_tokens.tolist() == [0, 1, 2]
    assert len(batch.sample_rows) == 3


def test_rows_that_are_not_told_their_token_take_the_one_last_sampled_in_their_slot() -> None:
    table, (plan,) = _started([3, 9, 6])
    table.apply(plan)
    table.batch(plan)
    table.remember(torch.tensor([0, 2]), torch.tensor([41, -1]))
    ahead = _decode_plan(2, [2, 0, 1], [6, 3, 8])
    table.apply(ahead)
    batch = table.batch(ahead, pad_to=4)
    assert batch.token_ids.tolist() == [0, 41, 108, 0]  # an invalid token is computed as token 0
    assert batch.lengths.tolist() == [7, 4, 9, 1]
    assert [row.position for row in batch.sample_rows] == [7, 4, 9]
    told = _decode_plan(3, [0], [5], token_slots=[0, 0], token_ids=[41, 42])
    table.apply(told)
    assert table.batch(told).sample_rows[0].token_ids.tolist() == [0, 1, 2, 41, 42]


def test_arrays_copied_together_arrive_as_they_were() -> None:
    import numpy as np

    arrays = [
        np.arange(7, dtype=np.int32),
        np.arange(12, dtype=np.int64).reshape(3, 4)[:, 1:3],
        np.array([True, False, True]),
        np.zeros((0, 5), dtype=np.int64),
        np.array([-5], dtype=np.int64),
    ]
    for array, tensor in zip(arrays, copy_together(arrays, CPU), strict=True):
        assert tensor.shape == array.shape
        assert (tensor.numpy() == array).all()
        assert tensor.numpy().dtype == array.dtype


def _graphs(sizes: tuple[int, ...], seen: list[ForwardBatch]) -> DecodeGraphs:
    def compute(batch: ForwardBatch) -> torch.Tensor:
        """Something of everything a model reads, row by row."""
        seen.append(batch)
        attention = batch.attention
        first = attention.block_table.gather(1, ((attention.seqused_k.long() - 1) // BLOCK).unsqueeze(1)).squeeze(1)
        columns = batch.token_ids, batch.positions, batch.lengths, attention.slot_mapping, attention.seqused_k.long()
        return torch.stack((*columns, first), dim=1).float()

    blocks = -(-MAX_LEN // BLOCK)
    return DecodeGraphs(
        compute, EagerRecorder(), sizes, max_blocks=blocks, block_size=BLOCK, dummy_block=DUMMY, device=CPU
    )


def test_a_replay_computes_what_the_batch_says_whatever_stood_there_before() -> None:
    seen: list[ForwardBatch] = []
    graphs = _graphs((1, 2, 4, 8), seen)
    assert graphs.missing == [8, 4, 2, 1]
    assert graphs.size_for(3) is None
    for size in graphs.missing:
        graphs.capture(size)
    assert graphs.missing == []
    assert [graphs.size_for(rows) for rows in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]
    assert graphs.size_for(9) is None
    table, (everyone,) = _started([3, 9, 6, 32, 17])
    table.apply(everyone)
    for plan in (everyone, _decode_plan(2, [1], [8]), _decode_plan(3, [4, 0, 2], [16, 2, 5])):
        size = graphs.size_for(len(plan.slots))
        assert size is not None
        got = graphs.run(table.batch(plan, size))
        assert got.shape[0] == size
        rows = [
            [
                100 * slot + position,
                position,
                position + 1,
                (7 * slot + position // BLOCK) * BLOCK + position % BLOCK,
                position + 1,
                7 * slot + position // BLOCK,
            ]
            for slot, position in zip(plan.slots, plan.positions, strict=True)
        ]
        padding = [[0, 0, 1, DUMMY * BLOCK, 1, DUMMY]] * (size - len(rows))
        assert got.tolist() == rows + padding
    graphs.close()
    assert graphs.size_for(1) is None


def test_a_capture_writes_to_the_dummy_block_alone() -> None:
    """Between two steps of others, what an earlier batch left in the static tensors must not be stored anywhere."""
    seen: list[ForwardBatch] = []
    graphs = _graphs((2, 4), seen)
    graphs.capture(4)
    table, (plan,) = _started([3, 9, 6])
    table.apply(plan)
    graphs.run(table.batch(plan, 4))
    seen.clear()
    graphs.capture(2)
    (batch,) = seen
    assert batch.attention.slot_mapping.tolist() == [DUMMY * BLOCK] * 2
    assert batch.attention.seqused_k.tolist() == [1, 1]
