"""Any number of ranks, nothing has to divide: the parts tile the model, and the bytes come out even."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.kernels.weight_formats import NAMES, get_weight_format
from phalanx.parallel.partition import Dimensions, Partition, PartitionError, partition

QWQ = Dimensions(40, 8, 128, 5120, 27648, 152064, 64, False)
SMOLLM2 = Dimensions(9, 3, 64, 576, 1536, 49152, 30, True)


TINY = Dimensions(40, 8, 16, 640, 1344, 1031, 4, False)


def _tiles(parts: Sequence[range], total: int) -> bool:
    return [i for part in parts for i in part] == list(range(total))


def _check_evenness(parts: Partition, weights: Sequence[float]) -> None:
    """Each unit of MLP columns went where it left the least held per weight.

    So when rank i got its last unit, no rank j was so light that the unit would have left it lighter than i:
    held_i / w_i <= (held_j + unit) / w_j. Ranks with their first unit alone were not chosen, and may hold more: their
    heads and vocabulary outweigh their share. The last rank may lack part of its last unit.
    """
    d, shares = parts.dimensions, parts.shares
    unit = 64 * 3 * d.hidden_size * d.num_layers  # the largest there is: small MLPs are dealt in smaller ones
    held = [parts.parameters(rank) for rank in range(len(shares))]
    for i, j in itertools.product(range(len(shares)), repeat=2):
        if len(shares[i].mlp) > 64:
            slack = 2 * unit if j == len(shares) - 1 else unit
            assert held[i] / weights[i] <= (held[j] + slack) / weights[j] * (1 + 1e-9)


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
    parts = partition(*case)
    _check(parts)
    assert parts.busiest_share >= 1.0
    assert parts == partition(*case)


@given(_cases())
@settings(max_examples=200, deadline=None)
def test_no_rank_ends_up_more_than_one_deal_of_columns_above_another(
    case: tuple[Dimensions, int, list[float] | None],
) -> None:
    _, ranks, weights = case
    _check_evenness(partition(*case), weights or [1.0] * ranks)


@given(_cases())
@settings(max_examples=100, deadline=None)
def test_heads_follow_the_kv_heads_as_whole_groups_or_one_kv_head_a_rank(
    case: tuple[Dimensions, int, list[float] | None],
) -> None:
    d, ranks, _ = case
    parts = partition(*case)
    if ranks <= d.num_kv_heads:
        assert _tiles([share.kv_heads for share in parts.shares], d.num_kv_heads)
        assert all(share.group == d.group for share in parts.shares)
        assert parts.kv_replicas == 1
    else:
        assert all(len(share.kv_heads) == 1 for share in parts.shares)
        assert parts.kv_replicas >= 2


@given(st.integers(1, 12), st.integers(1, 9), st.data())
def test_without_weights_no_kv_head_gets_two_ranks_more_than_another(kv: int, group: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(kv, kv * group))
    parts = partition(Dimensions(kv * group, kv, 64, 512, 4096, 1000, 2, False), ranks)
    holders = Counter(share.kv_heads.start for share in parts.shares)
    assert max(holders.values()) - min(holders.values()) <= 1


@given(_cases())
@settings(max_examples=100, deadline=None)
def test_vocabulary_rows_follow_the_weights_to_a_row_where_no_rank_is_below_one(
    case: tuple[Dimensions, int, list[float] | None],
) -> None:
    d, ranks, given_weights = case
    weights = given_weights or [1.0] * ranks
    due = [d.vocab_size * weight / sum(weights) for weight in weights]
    if min(due) >= 1:
        for share, rows in zip(partition(*case).shares, due, strict=True):
            assert abs(len(share.vocab) - rows) <= 1


@pytest.mark.parametrize("d", [QWQ, SMOLLM2, TINY])
def test_one_rank_holds_everything(d: Dimensions) -> None:
    parts = partition(d, 1)
    (share,) = parts.shares
    assert share.query_heads == range(d.num_query_heads)
    assert share.kv_heads == range(d.num_kv_heads)
    assert share.mlp == range(d.intermediate_size)
    assert share.vocab == range(d.vocab_size)
    assert (parts.busiest_share, parts.kv_replicas, share.group) == (1.0, 1, d.group)


@pytest.mark.parametrize("d", [QWQ, TINY])
@pytest.mark.parametrize("ranks", range(1, 41))
def test_forty_query_heads_are_cut_at_any_number_of_ranks(ranks: int, d: Dimensions) -> None:
    parts = partition(d, ranks)
    _check(parts)
    _check_evenness(parts, [1.0] * ranks)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_smollm2_with_three_kv_heads_is_cut_at_any_number_of_ranks(ranks: int) -> None:
    parts = partition(SMOLLM2, ranks)
    _check(parts)
    _check_evenness(parts, [1.0] * ranks)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_qwq_costs_at_most_a_hundredth_more_than_even_up_to_its_kv_heads(ranks: int) -> None:
    assert partition(QWQ, ranks).busiest_share <= 1.01


def test_eight_groups_on_three_ranks_go_three_three_two() -> None:
    assert [len(share.kv_heads) for share in partition(QWQ, 3).shares] == [3, 3, 2]


def test_mlp_columns_are_multiples_of_64_but_for_the_last_rank() -> None:
    for ranks in (2, 3, 5, 7, 8, 12):
        assert all(len(share.mlp) % 64 == 0 for share in partition(QWQ, ranks).shares[:-1])


def test_a_small_mlp_is_dealt_in_smaller_multiples_and_leaves_no_rank_without() -> None:
    columns = [len(share.mlp) for share in partition(TINY, 40).shares]
    assert all(count % 8 == 0 for count in columns)
    narrow = Dimensions(8, 8, 16, 64, 8, 100, 1, True)
    assert [len(share.mlp) for share in partition(narrow, 8).shares] == [1] * 8


def test_a_rank_with_fewer_heads_gets_more_mlp_columns() -> None:
    shares = partition(QWQ, 3).shares
    assert len(shares[2].mlp) > len(shares[0].mlp)


def test_parameters_add_up_to_the_whole_model_and_the_replicas() -> None:
    # QwQ-32B-Preview has 32,763,876,352 parameters; QKV biases (64 x 7168) are left out of a rank's count.
    biases = 64 * (5120 + 2 * 1024)
    assert partition(QWQ, 1).parameters(0) == 32_763_876_352 - biases
    assert partition(QWQ, 1).kv_elements_per_token(0) * 2 == 262_144


def test_the_busiest_share_counts_replicated_heads_as_a_cost() -> None:
    parts = partition(QWQ, 40)
    held = [parts.parameters(rank) for rank in range(40)]
    # 40 ranks hold 5 copies of all K and V projections between them: the mean is above 1/N of the model already.
    assert parts.busiest_share == max(held) * 40 / partition(QWQ, 1).parameters(0)
    assert parts.busiest_share > max(held) * 40 / sum(held) > 1


def test_weights_of_mixed_cards_decide_the_shares() -> None:
    parts = partition(QWQ, 2, [80, 48])
    held = [parts.parameters(rank) for rank in range(2)]
    assert held[0] / sum(held) == pytest.approx(80 / 128, abs=0.01)


def test_weights_decide_how_many_ranks_share_a_kv_head() -> None:
    parts = partition(Dimensions(8, 2, 64, 512, 4096, 1000, 2, False), 4, [3, 1, 1, 1])
    assert [share.kv_heads.start for share in parts.shares] == [0, 1, 1, 1]
    assert [len(share.query_heads) for share in parts.shares] == [4, 2, 1, 1]


def test_more_ranks_than_kv_heads_replicate_them() -> None:
    parts = partition(QWQ, 16)
    assert parts.kv_replicas == 2
    assert all(len(share.kv_heads) == 1 for share in parts.shares)


@pytest.mark.parametrize("ranks", [0, -1, 41])
def test_a_number_of_ranks_out_of_range_is_refused_by_name(ranks: int) -> None:
    with pytest.raises(PartitionError, match=rf"ranks={ranks} .*1 to 40"):
        partition(QWQ, ranks)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_that_are_no_positive_numbers_for_each_rank_are_refused(weights: list[float]) -> None:
    with pytest.raises(PartitionError, match="rank_weights"):
        partition(QWQ, 2, weights)


def test_more_ranks_than_rows_or_columns_are_refused_with_the_number_that_is_possible() -> None:
    with pytest.raises(PartitionError, match=r"ranks=8 .*1 to 5"):
        partition(Dimensions(8, 8, 16, 64, 5, 100, 1, True), 8)


@pytest.mark.parametrize("name", NAMES)
def test_mlp_columns_are_cut_where_the_weight_format_allows_it(name: str) -> None:
    weight_format = get_weight_format(name)
    narrow = Dimensions(8, 8, 16, 64, 64, 100, 1, True)
    shares = partition(narrow, 8, weight_format=weight_format).shares
    assert all(share.mlp.start % weight_format.column_cut == 0 for share in shares)
    assert all(len(share.mlp) == 8 for share in shares)
    uneven = partition(narrow, 7, [1, 2, 3, 4, 5, 6, 7], weight_format).shares
    assert all(share.mlp.start % weight_format.column_cut == 0 for share in uneven)
    assert partition(QWQ, 16, weight_format=weight_format) == partition(QWQ, 16)


def test_more_ranks_than_columns_that_the_format_can_part_are_refused() -> None:
    narrow = Dimensions(8, 8, 16, 64, 40, 100, 1, True)
    assert [len(share.mlp) for share in partition(narrow, 8).shares] == [5] * 8
    with pytest.raises(PartitionError, match=r"ranks=8 .*40 MLP columns in runs of 8, .*1 to 5"):
        partition(narrow, 8, weight_format=get_weight_format("int4"))


def test_query_heads_that_are_no_multiple_of_the_kv_heads_are_refused() -> None:
    with pytest.raises(PartitionError, match=r"9 query heads.*2 KV heads"):
        partition(Dimensions(9, 2, 16, 64, 128, 100, 1, True), 1)
