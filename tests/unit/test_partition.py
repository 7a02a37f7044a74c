"""Any number of ranks, nothing has to divide: the parts tile the model, and the bytes come out even."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.parallel.partition import Dimensions, Partition, PartitionError, partition

QWQ = Dimensions(40, 8, 128, 5120, 27648, 152064, 64, False)
SMOLLM2 = Dimensions(9, 3, 64, 576, 1536, 49152, 30, True)


def _tiles(parts: Sequence[range], total: int) -> bool:
    return [i for part in parts for i in part] == list(range(total))


def _check(parts: Partition) -> None:
    d, shares = parts.dimensions, parts.shares
    assert _tiles([share.query_heads for share in shares], d.num_query_heads)
    assert _tiles([share.mlp for share in shares], d.intermediate_size)
    assert _tiles([share.vocab for share in shares], d.vocab_size)
    for share in shares:
        assert min(map(len, (share.query_heads, share.kv_heads, share.mlp, share.vocab))) >= 1
        # Every query head finds its own KV head where a kernel with a constant group size looks for it.
        for i, head in enumerate(share.query_heads):
            assert share.kv_heads[i // share.group] == head // d.group
    assert sorted({head for share in shares for head in share.kv_heads}) == list(range(d.num_kv_heads))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Dimensions, int, list[float] | None]:
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 9))
    ranks = draw(st.integers(1, kv_heads * group))
    d = Dimensions(
        num_query_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 64, 128])),
        hidden_size=draw(st.integers(64, 4096)),
        intermediate_size=draw(st.integers(ranks, 20000)),
        vocab_size=draw(st.integers(ranks, 200000)),
        num_layers=draw(st.integers(1, 80)),
        tied_embeddings=draw(st.booleans()),
    )
    weights = draw(st.none() | st.lists(st.floats(0.1, 10), min_size=ranks, max_size=ranks))
    return d, ranks, weights


@given(_cases())
@settings(max_examples=300, deadline=None)
def test_any_partition_tiles_the_model_with_regular_groups(case: tuple[Dimensions, int, list[float] | None]) -> None:
    _check(partition(*case))


@pytest.mark.parametrize("ranks", range(1, 41))
def test_qwq_is_cut_to_within_one_step_of_the_mlp_deal_at_any_number_of_ranks(ranks: int) -> None:
    parts = partition(QWQ, ranks)
    _check(parts)
    held = [parts.parameters(rank) for rank in range(ranks)]
    # MLP columns even out what heads leave uneven, in steps of 64: no rank is further above the mean than one step.
    assert max(held) - sum(held) / ranks <= 64 * QWQ.num_layers * 3 * QWQ.hidden_size


@pytest.mark.parametrize("ranks", range(1, 10))
def test_smollm2_with_three_kv_heads_is_cut_at_any_number_of_ranks(ranks: int) -> None:
    parts = partition(SMOLLM2, ranks)
    _check(parts)
    assert parts.busiest_share <= 1.08


def test_eight_groups_on_three_ranks_go_three_three_two() -> None:
    assert [len(share.kv_heads) for share in partition(QWQ, 3).shares] == [3, 3, 2]


def test_mlp_columns_are_multiples_of_64_but_for_the_last_rank() -> None:
    for ranks in (2, 3, 5, 7, 8, 12):
        assert all(len(share.mlp) % 64 == 0 for share in partition(QWQ, ranks).shares[:-1])


def test_a_rank_with_fewer_heads_gets_more_mlp_columns() -> None:
    shares = partition(QWQ, 3).shares
    assert len(shares[2].mlp) > len(shares[0].mlp)


def test_parameters_add_up_to_the_whole_model_and_the_replicas() -> None:
    # QwQ-32B-Preview has 32,763,876,352 parameters; QKV biases (64 x 7168) are left out of a rank's count.
    biases = 64 * (5120 + 2 * 1024)
    assert partition(QWQ, 1).parameters(0) == 32_763_876_352 - biases
    assert partition(QWQ, 1).kv_elements_per_token(0) * 2 == 262_144


def test_weights_of_mixed_cards_decide_the_shares() -> None:
    parts = partition(QWQ, 2, [80, 48])
    held = [parts.parameters(rank) for rank in range(2)]
    assert held[0] / sum(held) == pytest.approx(80 / 128, abs=0.01)


def test_more_ranks_than_kv_heads_replicate_them() -> None:
    parts = partition(QWQ, 16)
    assert parts.kv_replicas == 2
    assert all(len(share.kv_heads) == 1 for share in parts.shares)


@pytest.mark.parametrize("ranks", [0, -1, 41])
def test_a_number_of_ranks_out_of_range_is_refused_by_name(ranks: int) -> None:
    with pytest.raises(PartitionError, match=rf"ranks={ranks} .*1 to 40"):
        partition(QWQ, ranks)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, float("nan")]])
def test_weights_that_are_no_positive_numbers_for_each_rank_are_refused(weights: list[float]) -> None:
    with pytest.raises(PartitionError, match="rank_weights"):
        partition(QWQ, 2, weights)
