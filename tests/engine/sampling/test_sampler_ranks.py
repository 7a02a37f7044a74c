"""The sampler over several ranks, here threads: the same results as one rank, whatever the cut of the vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.sampling import penalties
from phalanx.engine.sampling import sampler as sampler_module
from phalanx.engine.sampling.sampler import INVALID_TOKEN, Sampler, SampleRow
from phalanx.engine.sampling.token_counts import TokenCounts
from phalanx.engine.scheduling.step_plan import SlotSampling, SlotStart
from phalanx.parallel.collectives.base import Collectives

T = TypeVar("T")
MARK = 0.125


class Exchange:
    """What the threads of one group share: a place for each rank's tensor, and a record of the operations."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.slots = [torch.empty(0)] * size
        self.operations: list[tuple[str, int]] = []


class ThreadCollectives(Collectives):
    """Collectives of ranks that are threads; refuses what a real group would hang on."""

    def __init__(self, exchange: Exchange, rank: int) -> None:
        self._exchange = exchange
        self.rank, self.size = rank, exchange.size

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _swap(self, operation: str, x: torch.Tensor) -> list[torch.Tensor]:
        self._exchange.slots[self.rank] = x.clone()
        if self.rank == 0:
            self._exchange.operations.append((operation, x.numel()))
        self.barrier()
        parts = list(self._exchange.slots)
        self.barrier()
        kinds = {(operation, tuple(part.shape), part.dtype) for part in parts}
        assert len(kinds) == 1, f"ranks disagree: {kinds}"
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._swap("all_reduce", x)).sum(dim=0)

    def gather(self, x: torch.Tensor, dst: int = 0) -> list[torch.Tensor] | None:
        parts = self._swap("gather", x)
        return parts if self.rank == dst else None

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        return self._swap("broadcast", x)[src].clone()

    def barrier(self) -> None:
        self._exchange.barrier.wait()

    def close(self) -> None:
        return


def run_threads(exchange: Exchange, work: Callable[[Collectives], T]) -> list[T]:
    """`work` on every rank; its results in rank order."""

    def run(rank: int) -> T:
        try:
            return work(ThreadCollectives(exchange, rank))
        except BaseException:
            exchange.barrier.abort()
            raise

    with ThreadPoolExecutor(exchange.size) as pool:
        futures = [pool.submit(run, rank) for rank in range(exchange.size)]
    return [future.result() for future in futures]


def _sample(
    sizes: Sequence[int], logits: torch.Tensor, rows: list[SampleRow], candidates: int = 64
) -> tuple[list[int], list[TokenLogprobs | None], list[tuple[str, int]]]:
    """Tokens, log-probabilities and the operations of one step with the vocabulary cut into shards of `sizes`."""
    exchange = Exchange(len(sizes))

    def work(collectives: Collectives) -> tuple[list[int], list[TokenLogprobs | None]] | None:
        start = sum(sizes[: collectives.rank])
        shard = range(start, start + sizes[collectives.rank])
        sampler = Sampler(collectives, shard, sum(sizes), candidates)
        return sampler.sample(logits[:, shard.start : shard.stop].clone(), rows)

    first, *others = run_threads(exchange, work)
    assert first is not None
    assert others == [None] * len(others)
    return *first, exchange.operations[1:]


def _row(output: Sequence[int] = (), **sampling: Any) -> SampleRow:
    token_ids = np.array([1, 2, *output], dtype=np.int32)
    return SampleRow(SlotSampling(**sampling), token_ids, 2, len(token_ids))


def _logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _cut(vocab_size: int, ranks: int) -> list[int]:
    """Shards as even as can be, the larger ones first."""
    return [vocab_size // ranks + (rank < vocab_size % ranks) for rank in range(ranks)]


MIXED_ROWS = [
    _row(),
    _row(temperature=1.0, seed=1),
    _row(temperature=1.0, top_k=50, seed=2, logprobs=3, processed_logprobs=True),
    _row(temperature=1.2, top_p=0.97, seed=3, logprobs=2),
    _row(temperature=0.7, min_p=0.02, seed=4),
    _row(temperature=0.9, top_k=300, top_p=0.9, seed=-5, logprobs=0, processed_logprobs=True),
    _row((7, 7, 4_000), repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=-0.3, logprobs=4),
    _row((7,), temperature=1.0, seed=6, min_tokens=4, end_token_ids=(3, 4_100), logprobs=5, processed_logprobs=True),
    _row(temperature=0.8, seed=7, bias_token_ids=(0, 2_500, 4_101), bias_values=(9.0, 9.5, 9.0), top_p=0.99),
]


def _assert_same_logprobs(found: Sequence[TokenLogprobs | None], expected: Sequence[TokenLogprobs | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.token_id, a.rank, a.top_token_ids) == (b.token_id, b.rank, b.top_token_ids)
            assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=1e-5)


@pytest.mark.parametrize("candidates", [2, 64])
@pytest.mark.parametrize(
    "sizes",
    [_cut(4_102, ranks) for ranks in range(2, 9)] + [[1, 4_100, 1], [10, 4_000, 60, 32], [64, 65, 3_973]],
    ids=str,
)
def test_every_cut_gives_the_tokens_and_logprobs_of_one_rank(sizes: list[int], candidates: int) -> None:
    logits = _logits(len(MIXED_ROWS), 4_102)
    expected_tokens, expected_logprobs, _ = _sample([4_102], logits, MIXED_ROWS)
    tokens, logprobs, _ = _sample(sizes, logits, MIXED_ROWS, candidates)
    assert tokens == expected_tokens
    _assert_same_logprobs(logprobs, expected_logprobs)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=5),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 100, 10_000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.1]),
    candidates=st.sampled_from([1, 4, 64]),
    levels=st.sampled_from([3, 50, 10_000]),
    seed=st.integers(0, 2**31),
)
def test_any_cut_and_any_number_of_candidates_agree_even_with_ties(
    *,
    sizes: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    candidates: int,
    levels: int,
    seed: int,
) -> None:
    vocab_size = sum(sizes)
    random = np.random.default_rng(seed)
    # Few levels make many equal logits.
    logits = torch.from_numpy(random.integers(0, levels, (3, vocab_size)).astype(np.float32)) * (6 / levels)
    rows = [
        _row(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed + i, logprobs=i)
        for i in range(3)
    ]
    expected_tokens, expected_logprobs, _ = _sample([vocab_size], logits, rows)
    tokens, logprobs, _ = _sample(sizes, logits, rows, candidates)
    assert tokens == expected_tokens
    _assert_same_logprobs(logprobs, expected_logprobs)


def test_equal_logits_on_different_ranks_go_to_the_lower_token_id() -> None:
    logits = torch.zeros(2, 1_000)
    logits[1, [998, 600, 301]] = 1.0
    tokens, _, _ = _sample([300, 300, 400], logits, [_row()] * 2)
    assert tokens == [0, 301]


def test_a_greedy_batch_is_one_gather_of_two_numbers_a_row() -> None:
    _, _, operations = _sample(_cut(1_000, 3), _logits(5, 1_000), [_row()] * 5)
    assert operations == [("gather", 10)]


def test_plain_sampling_and_a_small_top_k_are_one_gather() -> None:
    rows = [_row(temperature=1.0), _row(temperature=1.0, top_k=64, top_p=0.9)]
    _, _, operations = _sample(_cut(1_000, 3), _logits(2, 1_000), rows)
    assert [name for name, _ in operations] == ["gather"]


def test_a_nucleus_within_the_candidates_gathers_no_whole_row() -> None:
    logits = _logits(3, 1_000, scale=8.0)
    _, _, operations = _sample(_cut(1_000, 3), logits, [_row(temperature=1.0, top_p=0.9)] * 3)
    assert [name for name, _ in operations] == ["gather", "broadcast"]


def test_only_the_undecided_rows_are_gathered_whole() -> None:
    logits = _logits(3, 1_000, scale=8.0)
    logits[1] *= 0.01
    _, _, operations = _sample([300, 300, 400], logits, [_row(temperature=1.0, top_p=0.9)] * 3)
    assert operations == [("gather", 3 * 65), ("broadcast", 3), ("gather", 400)]


def test_nan_on_one_rank_marks_its_row_alone() -> None:
    logits = _logits(len(MIXED_ROWS), 4_102)
    expected_tokens, expected_logprobs, _ = _sample([4_102], logits, MIXED_ROWS)
    for bad in range(len(MIXED_ROWS)):
        broken = logits.clone()
        broken[bad, 3_333] = torch.nan
        tokens, logprobs, _ = _sample(_cut(4_102, 3), broken, MIXED_ROWS)
        assert tokens == [INVALID_TOKEN if i == bad else token for i, token in enumerate(expected_tokens)]
        _assert_same_logprobs(logprobs, [None if i == bad else e for i, e in enumerate(expected_logprobs)])


@pytest.mark.parametrize("ranks", [{0, 1, 2}, {0}, {2}])
@pytest.mark.parametrize("counted", [False, True])
def test_a_row_whose_logits_cannot_be_edited_has_no_token_wherever_the_error_is(
    monkeypatch: pytest.MonkeyPatch, ranks: set[int], counted: bool
) -> None:
    logits = _logits(len(MIXED_ROWS), 4_102)
    sizes = _cut(4_102, 3)
    starts = [sum(sizes[:rank]) for rank in range(3)]
    plain = penalties.mask_others

    def broken(logits: torch.Tensor, vocab: range, sampling: SlotSampling) -> None:
        if sampling.bias_values == (MARK,) and starts.index(vocab.start) in ranks:
            raise IndexError("a defect")
        plain(logits, vocab, sampling)

    monkeypatch.setattr(penalties, "mask_others", broken)
    for bad in range(len(MIXED_ROWS)):
        rows = list(MIXED_ROWS)
        marked = msgspec.structs.replace(rows[bad].sampling, bias_token_ids=(5,), bias_values=(MARK,))
        rows[bad] = replace(rows[bad], sampling=marked)

        def work(collectives: Collectives, rows: list[SampleRow] = rows) -> Any:
            vocab = range(starts[collectives.rank], starts[collectives.rank] + sizes[collectives.rank])
            counts = TokenCounts(len(rows), vocab, torch.device("cpu")) if counted else None
            for slot, row in enumerate(rows if counts is not None else ()):
                counts.start(SlotStart(slot, row.prompt_length, row.token_ids.tolist(), row.sampling))
            each = [replace(row, slot=slot) for slot, row in enumerate(rows)]
            sampler = Sampler(collectives, vocab, 4_102, token_counts=counts)
            result = sampler.sample(logits[:, vocab.start : vocab.stop].clone(), each)
            return result, sampler.take_failures(), sampler.take_failures()

        expected_tokens, expected_logprobs, _ = _sample([4_102], logits, MIXED_ROWS)
        (result, failures, again), *others = run_threads(Exchange(3), work)
        tokens, logprobs = result
        assert tokens == [INVALID_TOKEN if i == bad else token for i, token in enumerate(expected_tokens)]
        _assert_same_logprobs(logprobs, [None if i == bad else e for i, e in enumerate(expected_logprobs)])
        assert [set(failures), *(set(other[1]) for other in others)] == [
            {bad} if rank in ranks else set() for rank in range(3)
        ]
        assert again == {}


@pytest.mark.parametrize("name", ["kept_logprobs", "top_keys"])
def test_a_row_that_rank_0_cannot_decide_has_no_token(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows = [_row(temperature=1.0, top_p=0.99, logprobs=1, processed_logprobs=True), _row(temperature=1.0), _row()]
    logits = _logits(3, 1_000, scale=0.1)
    expected, _, operations = _sample(_cut(1_000, 3), logits, rows)
    assert ("gather", 334) in operations  # the first row is decided over the whole vocabulary
    plain = getattr(sampler_module, name)

    def broken(values: torch.Tensor, *args: Any) -> Any:
        if name == "kept_logprobs" or values.shape == (1, 1_000):
            raise IndexError("a defect")
        return plain(values, *args)

    monkeypatch.setattr(sampler_module, name, broken)
    tokens, logprobs, again = _sample(_cut(1_000, 3), logits, rows)
    assert tokens == [INVALID_TOKEN, *expected[1:]]
    assert logprobs == [None] * 3
    assert again == operations


def test_a_shard_that_is_masked_whole_takes_no_part() -> None:
    logits = _logits(3, 600)
    logits[:, 200:400] = -torch.inf
    rows = [_row(logprobs=3), _row(temperature=1.0, logprobs=3), _row(temperature=1.0, top_p=0.99, logprobs=3)]
    tokens, logprobs, _ = _sample([200, 200, 200], logits, rows)
    expected_tokens, expected_logprobs, _ = _sample([600], logits, rows)
    assert tokens == expected_tokens
    _assert_same_logprobs(logprobs, expected_logprobs)


def test_prompt_logprobs_over_ranks_are_those_of_the_whole_vocabulary() -> None:
    sizes, logits, following = [400, 1, 599], _logits(4, 1_000), np.array([999, 400, 0, 5], dtype=np.int32)
    exchange = Exchange(len(sizes))

    def work(collectives: Collectives) -> list[TokenLogprobs] | None:
        start = sum(sizes[: collectives.rank])
        stop = start + sizes[collectives.rank]
        sampler = Sampler(collectives, range(start, stop), 1_000)
        return sampler.prompt_logprobs(logits[:, start:stop].clone(), following, 20)

    found, *others = run_threads(exchange, work)
    assert found is not None
    assert others == [None, None]
    assert [name for name, _ in exchange.operations[1:]] == ["all_reduce", "gather"]
    for i, expected in enumerate(logits.double().log_softmax(1)):
        top = expected.topk(20)
        assert found[i].rank == 1 + int((expected > expected[following[i]]).sum())
        assert found[i].logprob == pytest.approx(float(expected[following[i]]), abs=1e-5)
        assert found[i].top_token_ids == top.indices.tolist()
        assert found[i].top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("shards", [[range(0, 5), range(6, 10)], [range(5, 10), range(0, 5)]])
def test_shards_with_gaps_or_out_of_order_are_refused(shards: list[range]) -> None:
    def work(collectives: Collectives) -> str:
        with pytest.raises(ConfigError) as caught:
            Sampler(collectives, shards[collectives.rank], 10)
        return str(caught.value)

    assert all("vocab_size=10" in message for message in run_threads(Exchange(2), work))


@pytest.mark.parametrize("sizes", [[60], [20, 40], [1, 1, 58]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_words_and_allowed_tokens_hold_on_any_cut_of_the_vocabulary(sizes: list[int], temperature: float) -> None:
    logits = torch.randn(3, 60, generator=torch.Generator().manual_seed(5)) * 3
    best = logits.argmax(dim=1).tolist()
    output = np.array([1, 2, 7, 8], dtype=np.int32)
    samplings = [
        SlotSampling(temperature=temperature, seed=3, bad_words=((7, 8, best[0]), (9, best[0] - 1))),
        SlotSampling(temperature=temperature, seed=3, allowed_token_ids=(0, 59), logprobs=2),
        SlotSampling(temperature=temperature, seed=3, top_k=2, bad_words=((best[2],),)),
    ]
    rows = [SampleRow(sampling, output, 2, 4) for sampling in samplings]

    def work(collectives: Collectives) -> Any:
        start = sum(sizes[: collectives.rank])
        vocab = range(start, start + sizes[collectives.rank])
        sampler = Sampler(collectives, vocab, 60)
        return sampler.sample(logits[:, vocab.start : vocab.stop].clone(), rows)

    result = run_threads(Exchange(len(sizes)), work)[0]
    assert result is not None
    tokens, entries = result
    assert tokens[0] != best[0]
    assert tokens[1] in (0, 59)
    assert tokens[2] != best[2]
    assert (
        tokens == run_threads(Exchange(1), lambda one: Sampler(one, range(60), 60).sample(logits.clone(), rows))[0][0]
    )

    # Log-probabilities stay those of the model.
    assert entries[1].logprob == pytest.approx(float(logits[1].log_softmax(0)[tokens[1]]), abs=1e-5)
    assert entries[1].top_token_ids == logits[1].topk(2).indices.tolist()
