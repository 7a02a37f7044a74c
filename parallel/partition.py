"""The part of a model that each rank holds: pure arithmetic, for any number of ranks up to the query heads.

While there are at most as many ranks as KV heads, the unit is a KV head with its group of query heads. Above that,
KV heads are replicated and the query heads of each are split among its ranks. MLP columns even out the bytes; they are
cut where the weight format allows it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.weight_formats import PLAIN_PANELS, WeightFormat

COLUMN_MULTIPLE = 64
"""MLP columns are dealt in multiples of this, which kernels like, except at the end and where an MLP is too small."""
UNITS_PER_RANK = 4
"""An MLP is too small if it has fewer multiples a rank than this: then smaller powers of two are dealt, down to the
least that the weight format allows."""


class PartitionError(ValueError):
    """No such partition; the message names the value, the range and the setting."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that a partition depends on, in elements."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    tied_embeddings: bool

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_query_heads // self.num_kv_heads


@dataclass(frozen=True)
class RankShard:
    """One rank's part. Its query heads are spread evenly over its KV heads, in order."""

    rank: int
    query_heads: range
    kv_heads: range
    mlp: range
    vocab: range

    @property
    def group(self) -> int:
        """Query heads of each of this rank's KV heads."""
        return len(self.query_heads) // len(self.kv_heads)


@dataclass(frozen=True)
class Partition:
    """Every rank's share."""

    dimensions: Dimensions
    shares: tuple[RankShard, ...]

    def parameters(self, rank: int) -> int:
        """Weights that `rank` holds, in elements: its parts of every matrix, and the layers' norms, which all hold.

        Biases and per-head norms are left out: they come to less than 0.01% of a model.
        """
        share = self.shares[rank]
        fixed = _fixed_parameters(self.dimensions, share.query_heads, share.kv_heads, share.vocab)
        return fixed + len(share.mlp) * _column_parameters(self.dimensions)

    def kv_elements_per_token(self, rank: int) -> int:
        """Elements of keys and values that `rank` keeps for each token, over all layers."""
        d = self.dimensions
        return 2 * d.num_layers * len(self.shares[rank].kv_heads) * d.head_dim

    @property
    def busiest_share(self) -> float:
        """The busiest rank's weights over 1/N of the model's, >= 1.0: what unevenness and replicated weights cost."""
        d = self.dimensions
        whole = _fixed_parameters(d, range(d.num_query_heads), range(d.num_kv_heads), range(d.vocab_size))
        whole += d.intermediate_size * _column_parameters(d)
        return max(self.parameters(share.rank) for share in self.shares) * len(self.shares) / whole

    @property
    def kv_replicas(self) -> int:
        """Ranks that hold the most replicated KV head."""
        heads = [share.kv_heads.start for share in self.shares if len(share.kv_heads) == 1]
        return max((heads.count(head) for head in heads), default=1)


def partition(
    dimensions: Dimensions,
    ranks: int,
    weights: Sequence[float] | None = None,
    weight_format: WeightFormat = PLAIN_PANELS,
) -> Partition:
    """Cut a model over `ranks`, evenly or in proportion to `weights` (one positive number a rank).

    No rank that was dealt MLP columns beyond its first unit ends up, in parameters per weight, more than one unit of
    columns above any other (two above the last, which may lack part of a unit).
    MLP columns are cut where `weight_format` allows it.
    Raises PartitionError unless 1 <= ranks <= num_query_heads and every rank can have some of each matrix.
    """
    d = dimensions
    if d.num_kv_heads < 1 or d.num_query_heads % d.num_kv_heads:
        raise PartitionError(
            f"{d.num_query_heads} query heads are no multiple of {d.num_kv_heads} KV heads: the model's config is wrong"
        )
    if not 1 <= ranks <= d.num_query_heads:
        raise PartitionError(
            f"ranks={ranks} is out of range: this model has {d.num_query_heads} query heads, so set ranks to 1 to "
            f"{d.num_query_heads}"
        )

    # Each rank needs a row of the vocabulary, a run of MLP columns and a query head.
    cut = weight_format.column_cut
    most = min(d.vocab_size, -(-d.intermediate_size // cut), d.num_query_heads)
    if most < ranks:
        runs = f" in runs of {cut}" if cut > 1 else ""
        raise PartitionError(
            f"ranks={ranks} is above what can be dealt: with a vocabulary of {d.vocab_size} and {d.intermediate_size} "
            f"MLP columns{runs}, set ranks to 1 to {most}"
        )

    shares = [1.0] * ranks if weights is None else [float(weight) for weight in weights]
    if len(shares) != ranks or not all(0 < weight < math.inf for weight in shares):
        raise PartitionError(f"rank_weights={shares} must be {ranks} positive numbers, one for each of ranks={ranks}")

    # The columns come last: they even out what heads and vocabulary leave uneven.
    heads = _deal_heads(d, shares)
    vocab = _ranges(_deal(d.vocab_size, shares))
    mlp = _ranges(_deal_columns(d, shares, heads, vocab, cut))
    return Partition(d, tuple(RankShard(rank, *heads[rank], mlp[rank], vocab[rank]) for rank in range(ranks)))


def _column_parameters(d: Dimensions) -> int:
    """Elements of one MLP column over all layers: of the gate, the up and the down projection."""
    return 3 * d.hidden_size * d.num_layers


def _deal_heads(d: Dimensions, weights: list[float]) -> list[tuple[range, range]]:
    """(query heads, KV heads) of each rank."""
    ranks = len(weights)
    if ranks <= d.num_kv_heads:
        kv = _ranges(_deal(d.num_kv_heads, weights))
        return [(range(heads.start * d.group, heads.stop * d.group), heads) for heads in kv]
    result = []
    first = 0
    for head, holders in enumerate(_holders(d, weights)):
        queries = _ranges(_deal(d.group, weights[first : first + holders]), head * d.group)
        result += [(part, range(head, head + 1)) for part in queries]
        first += holders
    return result


def _holders(d: Dimensions, weights: list[float]) -> list[int]:
    """The number of consecutive ranks that hold each KV head: shares as even as the ranks' weights allow."""
    holders = []
    first = 0
    left = sum(weights)  # of the ranks from `first` on
    for head in range(d.num_kv_heads):
        heads_after = d.num_kv_heads - head - 1
        target = left / (heads_after + 1)
        count = 1
        held = weights[first]

        # One more rank, while that brings this head's weight nearer its due and leaves a rank for each head after it.
        while (
            count < d.group
            and len(weights) - first - count > heads_after
            and abs(held + weights[first + count] - target) <= abs(held - target)
        ):
            held += weights[first + count]
            count += 1

        # The heads after this one can take no more than their query heads.
        while len(weights) - first - count > heads_after * d.group:
            held += weights[first + count]
            count += 1

        holders.append(count)
        first += count
        left -= held
    return holders


def _deal_columns(
    d: Dimensions, weights: list[float], heads: list[tuple[range, range]], vocab: list[range], cut: int
) -> list[int]:
    """MLP columns of each rank: every unit goes where it leaves the least weight held per rank weight.

    A unit is a multiple of `cut`, a power of two. Units are alike, so that this greedy deal has the lightest possible
    busiest rank.
    """
    multiple = COLUMN_MULTIPLE
    while multiple > cut and d.intermediate_size // multiple < UNITS_PER_RANK * len(weights):
        multiple //= 2
    units = -(-d.intermediate_size // multiple)
    unit = multiple * _column_parameters(d)

    # Every rank has one unit. The heap has each rank's load as it would be with one more.
    held = [_fixed_parameters(d, *heads[rank], vocab[rank]) + unit for rank in range(len(weights))]
    dealt = [1] * len(weights)
    loads = [((held[rank] + unit) / weight, rank) for rank, weight in enumerate(weights)]
    heapq.heapify(loads)
    for _ in range(units - len(weights)):
        rank = loads[0][1]
        dealt[rank] += 1
        held[rank] += unit
        heapq.heapreplace(loads, ((held[rank] + unit) / weights[rank], rank))

    # The last rank's last unit lacks what the columns lack of whole units.
    counts = [count * multiple for count in dealt]
    counts[-1] -= units * multiple - d.intermediate_size
    return counts


def _deal(count: int, weights: list[float]) -> list[int]:
    """`count` things in proportion to the weights, at least one each: largest remainders first, then lower ranks."""
    spare = count - len(weights)
    ideal = [count * weight / sum(weights) for weight in weights]
    above = [max(0.0, share - 1) for share in ideal]
    scale = spare / sum(above) if sum(above) else 0.0
    dealt = [1 + int(share * scale) for share in above]
    by_remainder = sorted(range(len(weights)), key=lambda i: (dealt[i] - 1 - above[i] * scale, i))
    for i in range(count - sum(dealt)):
        dealt[by_remainder[i % len(weights)]] += 1
    return dealt


def _ranges(counts: list[int], first: int = 0) -> list[range]:
    result = []
    for count in counts:
        result.append(range(first, first + count))
        first += count
    return result


def _fixed_parameters(d: Dimensions, query_heads: range, kv_heads: range, vocab: range) -> int:
    """Elements of a rank with these heads and vocabulary rows, its MLP columns not counted."""
    attention = 2 * (len(query_heads) + len(kv_heads)) * d.head_dim
    tables = (1 if d.tied_embeddings else 2) * len(vocab)
    norms = 2 * d.num_layers + 1
    return (d.num_layers * attention + tables + norms) * d.hidden_size
