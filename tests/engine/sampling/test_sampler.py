"""One rank's sampler against a plain dense computation, and against transformers' own processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.sampling.logprobs import key_token_ids, key_values, log_sum_exp, token_keys, top_keys
from phalanx.engine.sampling.sampler import INVALID_TOKEN, Sampler, SampleRow
from phalanx.engine.scheduling.step_plan import SlotSampling
from phalanx.kernels.sampling import gumbel
from phalanx.parallel.collectives.local import LocalCollectives
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def _sampler(vocab_size: int, candidates: int = 64) -> Sampler:
    return Sampler(LocalCollectives(torch.device("cpu")), range(vocab_size), vocab_size, candidates)


def _row(prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), **sampling: Any) -> SampleRow:
    token_ids = np.array([*prompt, *output], dtype=np.int32)
    return SampleRow(SlotSampling(**sampling), token_ids, len(prompt), len(token_ids))


def _sample(
    logits: torch.Tensor, rows: list[SampleRow], candidates: int = 64
) -> tuple[list[int], list[TokenLogprobs | None]]:
    result = _sampler(logits.shape[1], candidates).sample(logits.clone(), rows)
    assert result is not None
    return result


def _logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def _processed(logits: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """One row's logits after bias, penalties and mask, in double precision, token by token."""
    sampling, output = row.sampling, row.token_ids[row.prompt_length :].tolist()
    result = logits.double().clone()
    for token, bias in zip(sampling.bias_token_ids, sampling.bias_values, strict=True):
        result[token] += bias
    for token in set(row.token_ids.tolist()):
        value = float(result[token])
        result[token] = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
    for token in set(output):
        result[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    if len(output) < sampling.min_tokens:
        for token in sampling.end_token_ids:
            result[token] = -torch.inf
    return result


def _kept(processed: torch.Tensor, sampling: SlotSampling) -> list[int]:
    """Token ids that top-k, top-p and min-p leave, the likeliest first, in double precision."""
    order = sorted(range(len(processed)), key=lambda token: (-float(processed[token]), token))
    if sampling.top_k:
        order = order[: sampling.top_k]
    probabilities = (processed[order] / sampling.temperature).softmax(0)
    if sampling.top_p < 1:
        order = order[: 1 + int((probabilities.cumsum(0) < sampling.top_p).sum())]
    return [token for token, p in zip(order, probabilities, strict=False) if p >= sampling.min_p * probabilities[0]]


def _expected(logits: torch.Tensor, row: SampleRow) -> int:
    sampling, processed = row.sampling, _processed(logits, row)
    if sampling.temperature == 0:
        return int(processed.argmax())
    kept = torch.tensor(sorted(_kept(processed, sampling)))
    noise = gumbel(torch.tensor([sampling.seed]), (row.position << 32) + kept)
    return int(kept[(processed[kept] / sampling.temperature + noise).argmax()])


# ---- which token


def test_greedy_takes_the_likeliest_token_of_each_row() -> None:
    logits = _logits(7, 20_011)
    assert _sample(logits, [_row()] * 7)[0] == logits.argmax(dim=1).tolist()


def test_rows_of_every_kind_in_one_batch_get_the_tokens_of_the_dense_computation() -> None:
    rows = [
        _row(temperature=0.0),
        _row(temperature=0.8, seed=1),
        _row(temperature=1.0, top_k=20, seed=2),
        _row(temperature=1.3, top_p=0.9, seed=3),
        _row(temperature=0.6, min_p=0.05, seed=4),
        _row(temperature=0.0, prompt=(3, 3, 5), output=(9, 9, 2), repetition_penalty=1.3),
        _row(temperature=1.0, output=(9, 9, 2), presence_penalty=0.5, frequency_penalty=0.4, seed=5),
        _row(temperature=0.9, top_k=40, top_p=0.8, min_p=0.1, seed=-6, bias_token_ids=(4, 7), bias_values=(3.0, -3.0)),
        _row(temperature=1.0, min_tokens=3, end_token_ids=(8, 11), top_p=0.95, seed=2**62),
    ]
    logits = _logits(len(rows), 3_000)
    assert _sample(logits, rows)[0] == [_expected(logits[i], row) for i, row in enumerate(rows)]


_samplings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 3, 50, 64, 65, 500, 10_000]),
        "top_p": st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.2, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 1.1, -0.6]),
        "frequency_penalty": st.sampled_from([0.0, 0.7, -0.4]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "min_tokens": st.sampled_from([0, 2, 30]),
        "end_token_ids": st.sampled_from([(), (0,), (5, 17)]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    drawn=st.lists(_samplings, min_size=1, max_size=5),
    vocab_size=st.sampled_from([18, 64, 700, 9_000]),
    scale=st.sampled_from([0.05, 1.0, 4.0]),
    candidates=st.sampled_from([2, 64]),
    seed=st.integers(0, 2**31),
)
def test_any_settings_give_the_token_of_the_dense_computation(
    drawn: list[dict[str, Any]], vocab_size: int, scale: float, candidates: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = [
        _row(
            random.integers(0, vocab_size, 6).tolist(),
            random.integers(0, vocab_size, random.integers(0, 12)).tolist(),
            bias_token_ids=tuple(range(i)),
            bias_values=tuple(random.uniform(-5, 5, i).astype(np.float32).tolist()),
            **sampling,
        )
        for i, sampling in enumerate(drawn)
    ]
    logits = _logits(len(rows), vocab_size, seed, scale)
    tokens, _ = _sample(logits, rows, candidates)
    for i, row in enumerate(rows):
        if row.sampling.top_p == 1.0 or row.sampling.temperature == 0.0:
            assert tokens[i] == _expected(logits[i], row)
        else:
            # A token's place at the very edge of a nucleus is a matter of rounding.
            wider = row.sampling.top_p * 1.00001
            narrower = row.sampling.top_p * 0.99999
            edges = [SampleRow(_replace(row, top_p=top_p), *_rest(row)) for top_p in (wider, narrower)]
            assert tokens[i] in {_expected(logits[i], edge) for edge in (row, *edges)}


def _replace(row: SampleRow, **changes: Any) -> SlotSampling:
    names = SlotSampling.__struct_fields__
    return SlotSampling(**{**{name: getattr(row.sampling, name) for name in names}, **changes})


def _rest(row: SampleRow) -> tuple[Any, int, int]:
    return row.token_ids, row.prompt_length, row.position


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "temperature", "penalty"),
    [
        (50, 1.0, 0.0, 1.0, 1.0),
        (0, 0.9, 0.0, 0.7, 1.2),
        (0, 1.0, 0.08, 1.4, 1.0),
        (30, 0.8, 0.05, 0.9, 1.3),
        (200, 0.97, 0.0, 1.5, 0.9),
    ],
)
def test_the_kept_tokens_and_their_probabilities_are_those_of_transformers(
    top_k: int, top_p: float, min_p: float, temperature: float, penalty: float
) -> None:
    logits, prompt = _logits(1, 1_500, seed=top_k), [3, 77, 500, 3]
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = processors(torch.tensor([prompt]), logits.clone())[0].log_softmax(0)

    # The sampler names no more tokens than were asked for, so ask for all.
    row = _row(
        prompt,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        logprobs=1_500,
        processed_logprobs=True,
        seed=11,
    )
    token, logprobs = (result[0] for result in _sample(logits, [row]))
    assert logprobs is not None
    assert expected[token].isfinite()
    assert set(logprobs.top_token_ids) == set(expected.isfinite().nonzero().flatten().tolist())
    assert logprobs.top_logprobs == pytest.approx(expected[logprobs.top_token_ids].tolist(), abs=1e-5)


# ---- distributions


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 1.0, "top_p": 0.85},
        {"temperature": 1.2, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("varying", ["seed", "position"])
def test_draws_follow_the_distribution(sampling: dict[str, Any], varying: str) -> None:
    vocab_size, batch, draws = 40, 500, 20_000
    logits = _logits(1, vocab_size, seed=5, scale=1.5)
    probabilities = torch.zeros(vocab_size, dtype=torch.float64)
    kept = _kept(logits[0].double(), SlotSampling(**sampling))
    probabilities[kept] = (logits[0, kept].double() / sampling["temperature"]).softmax(0)
    sampler, counts, tokens = _sampler(vocab_size), torch.zeros(vocab_size, dtype=torch.float64), np.zeros(2, np.int32)
    for start in range(0, draws, batch):
        rows = [
            SampleRow(SlotSampling(**sampling, seed=i if varying == "seed" else 99), tokens, 2, position)
            for i in range(start, start + batch)
            for position in (i if varying == "position" else 2,)
        ]
        result = sampler.sample(logits.repeat(batch, 1), rows)
        assert result is not None
        counts += torch.bincount(torch.tensor(result[0]), minlength=vocab_size)
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * draws
    # Cells too small for the approximation are put together.
    small = expected < 10
    observed = torch.cat((counts[~small], counts[small].sum().reshape(1)))
    expected = torch.cat((expected[~small], expected[small].sum().reshape(1)))
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    # Wilson-Hilferty: a standard normal value; beyond 4 in one of 30,000.
    normal = ((chi_square / degrees) ** (1 / 3) - 1 + 2 / (9 * degrees)) / (2 / (9 * degrees)) ** 0.5
    assert normal < 4


def test_a_row_draws_the_same_whatever_its_neighbours_and_its_place() -> None:
    rows = [
        _row(temperature=1.0, seed=1),
        _row(temperature=0.0),
        _row(temperature=1.0, top_p=0.95, seed=2),
        _row(temperature=1.0, top_p=0.999, seed=3, logprobs=2),
        _row(temperature=1.0, top_k=30, seed=4, output=(5, 6), presence_penalty=1.0),
    ]
    logits = _logits(len(rows), 5_000, scale=2.0)
    alone = [_sample(logits[i : i + 1], [row])[0][0] for i, row in enumerate(rows)]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 3], [3, 1]):
        assert _sample(logits[order], [rows[i] for i in order])[0] == [alone[i] for i in order]


def test_draws_differ_between_seeds_and_between_positions() -> None:
    logits = torch.zeros(1, 10_000)
    by_seed = {_sample(logits, [_row(temperature=1.0, seed=seed)])[0][0] for seed in range(20)}
    by_position = {_sample(logits, [_row(output=[0] * n, temperature=1.0)])[0][0] for n in range(20)}
    assert len(by_seed) > 15
    assert len(by_position) > 15


# ---- edges


def test_equal_logits_go_to_the_lower_token_id() -> None:
    logits = torch.full((3, 9_000), -1.0)
    logits[0, [8_999, 4_500, 77]] = 2.0
    logits[1] = 0.0
    logits[1, ::3] = -0.0
    assert _sample(logits, [_row()] * 3)[0] == [77, 0, 0]


@pytest.mark.parametrize("candidates", [2, 5, 64])
def test_ties_at_the_edge_of_top_k_keep_the_lower_token_ids(candidates: int) -> None:
    logits = torch.zeros(1, 5_000)
    logits[0, 4_000] = 1.0
    row = _row(temperature=1.0, top_k=4, logprobs=20, processed_logprobs=True)
    logprobs = _sample(logits, [row], candidates)[1][0]
    assert logprobs is not None
    assert logprobs.top_token_ids == [4_000, 0, 1, 2]


@pytest.mark.parametrize("candidates", [1, 64])
def test_a_flat_distribution_keeps_its_whole_nucleus(candidates: int) -> None:
    vocab_size = 20_000
    row = _row(temperature=1.0, top_p=0.999, logprobs=vocab_size, processed_logprobs=True)
    logprobs = _sample(torch.zeros(1, vocab_size), [row], candidates)[1][0]
    assert logprobs is not None
    assert len(logprobs.top_token_ids) == pytest.approx(0.999 * vocab_size, abs=1)
    assert logprobs.top_token_ids[0] == 0


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    logits = _logits(1, 300)
    for seed in range(10):
        with_top_k = _sample(logits, [_row(temperature=1.5, top_k=10**9, seed=seed)])[0]
        assert with_top_k == _sample(logits, [_row(temperature=1.5, seed=seed)])[0]


def test_the_likeliest_token_is_kept_however_small_top_p_is() -> None:
    logits = _logits(1, 300, scale=0.01)
    assert _sample(logits, [_row(temperature=1.0, top_p=1e-12)])[0] == [int(logits.argmax())]


def test_bias_of_plus_and_minus_100_forces_and_forbids_a_token() -> None:
    logits = _logits(2, 500)
    best = int(logits[1].argmax())
    rows = [
        _row(temperature=1.0, bias_token_ids=(123,), bias_values=(100.0,)),
        _row(temperature=0.0, bias_token_ids=(best,), bias_values=(-100.0,)),
    ]
    tokens, _ = _sample(logits, rows)
    assert tokens[0] == 123
    assert tokens[1] == int(logits[1].topk(2).indices[1])


def test_end_tokens_are_masked_until_min_tokens_are_out() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 7] = 50.0
    settings_ = {"min_tokens": 2, "end_token_ids": (7,)}
    assert _sample(logits, [_row(output=(5,), **settings_)])[0] == [0]
    assert _sample(logits, [_row(output=(5, 5), **settings_)])[0] == [7]


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-10])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = _logits(2, 1_000)
    rows = [_row(temperature=temperature), _row(temperature=temperature, top_p=0.9)]
    assert _sample(logits, rows)[0] == logits.argmax(dim=1).tolist()


def test_an_immense_temperature_is_uniform_over_the_tokens_that_are_possible() -> None:
    logits = _logits(1, 50)
    tokens = {
        _sample(logits, [_row(temperature=1e300, seed=seed, min_tokens=5, end_token_ids=(3,))])[0][0]
        for seed in range(400)
    }
    assert tokens == set(range(50)) - {3}


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 100, "min_p": 0.1}],
)
def test_a_row_of_nan_or_infinity_is_marked_and_its_neighbours_are_not(bad: float, sampling: dict[str, Any]) -> None:
    logits = _logits(3, 9_000)
    expected = _sample(logits, [_row(**sampling, logprobs=1)] * 3)
    logits[1, 8_000] = bad
    tokens, logprobs = _sample(logits, [_row(**sampling, logprobs=1)] * 3)
    assert tokens == [expected[0][0], INVALID_TOKEN, expected[0][2]]
    assert logprobs == [expected[1][0], None, expected[1][2]]


def test_a_batch_of_nothing_but_nan_is_marked() -> None:
    logits = torch.full((2, 9_000), torch.nan)
    for sampling in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1}):
        assert _sample(logits, [_row(**sampling)] * 2)[0] == [INVALID_TOKEN] * 2


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_row_that_leaves_no_token_possible_is_marked(sampling: dict[str, Any]) -> None:
    logits = torch.full((2, 9_000), -torch.inf)
    logits[1, 5] = 0.0
    for processed in (False, True):
        rows = [_row(**sampling, logprobs=2, processed_logprobs=processed)] * 2
        tokens, logprobs = _sample(logits, rows)
        assert tokens == [INVALID_TOKEN, 5]
        assert logprobs == [None, TokenLogprobs(5, 0.0, 1, [5], [0.0])]


def test_an_empty_batch_gives_nothing() -> None:
    assert _sample(torch.zeros(0, 10), []) == ([], [])
    assert _sampler(10).prompt_logprobs(torch.zeros(0, 10), np.empty(0, np.int32), 1) == []


def test_candidates_below_one_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="candidates=0"):
        _sampler(10, candidates=0)


def test_a_shard_that_does_not_fit_the_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=12"):
        Sampler(LocalCollectives(torch.device("cpu")), range(10), 12)


# ---- log-probabilities


def _assert_logprobs(found: TokenLogprobs | None, expected: torch.Tensor, token: int, count: int) -> None:
    assert found is not None
    assert found.token_id == token
    assert found.logprob == pytest.approx(float(expected[token]), abs=1e-5)
    assert found.rank == 1 + int((expected > expected[token]).sum())
    top = expected.topk(count)
    assert found.top_token_ids == top.indices.tolist()
    assert found.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.7, "seed": 3}, {"temperature": 1.7, "top_p": 0.8}])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_raw_logprobs_are_of_the_logits_before_any_processing(sampling: dict[str, Any], count: int) -> None:
    logits = _logits(2, 30_000, scale=5.0)
    likeliest = logits[0].topk(3).indices.tolist()
    edited = _row(output=likeliest, repetition_penalty=1.5, presence_penalty=1.0, **sampling, logprobs=count)
    tokens, logprobs = _sample(logits, [edited, _row(**sampling, logprobs=count)])
    for i in range(2):
        _assert_logprobs(logprobs[i], logits[i].double().log_softmax(0), tokens[i], count)


def test_processed_logprobs_of_greedy_and_plain_sampling_are_after_penalties_and_temperature() -> None:
    logits = _logits(2, 4_000)
    common = {"output": (4, 5), "repetition_penalty": 1.5, "logprobs": 5, "processed_logprobs": True}
    rows = [_row(**common), _row(**common, temperature=0.7)]
    tokens, logprobs = _sample(logits, rows)
    for i, temperature in enumerate((1.0, 0.7)):
        expected = (_processed(logits[i], rows[i]) / temperature).log_softmax(0)
        _assert_logprobs(logprobs[i], expected, tokens[i], 5)


def test_processed_logprobs_of_truncated_sampling_are_over_the_kept_tokens() -> None:
    logits = _logits(1, 4_000)
    for seed in range(5):
        row = _row(temperature=1.4, top_k=6, logprobs=20, processed_logprobs=True, seed=seed)
        tokens, logprobs = _sample(logits, [row])
        kept = logits[0].topk(6)
        expected = (kept.values.double() / 1.4).log_softmax(0).tolist()
        place = kept.indices.tolist().index(tokens[0])
        found = logprobs[0]
        assert found is not None
        assert (found.rank, found.top_token_ids) == (place + 1, kept.indices.tolist())
        assert found.top_logprobs == pytest.approx(expected, abs=1e-5)
        assert found.logprob == pytest.approx(expected[place], abs=1e-5)


def test_rows_that_ask_for_no_logprobs_get_none() -> None:
    _, logprobs = _sample(_logits(2, 100), [_row(), _row(logprobs=0)])
    assert logprobs[0] is None
    assert logprobs[1] is not None
    assert logprobs[1].top_token_ids == []


@pytest.mark.parametrize("count", [0, 1, 20])
def test_prompt_logprobs_are_of_the_tokens_that_follow(count: int) -> None:
    logits, following = _logits(4, 5_000, scale=6.0), [4_999, 0, 17, 17]
    found = _sampler(5_000).prompt_logprobs(logits, np.array(following, dtype=np.int32), count)
    assert found is not None
    for i in range(4):
        _assert_logprobs(found[i], logits[i].double().log_softmax(0), following[i], count)


def test_the_log_sum_exp_of_large_logits_keeps_its_precision() -> None:
    logits = _logits(3, 50_000) + 40.0
    for temperature in (0.3, 1.0, 2.0):
        divisor = torch.full((3, 1), temperature)
        found = log_sum_exp(logits, divisor)
        expected = (logits.double() / divisor.double()).logsumexp(1)
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


# ---- keys


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=30), st.integers(0, 2**31 - 40))
def test_keys_sort_by_value_and_then_by_lower_token_id(values: list[float], first: int) -> None:
    tensor, ids = torch.tensor(values, dtype=torch.float32), torch.arange(first, first + len(values))
    keys = token_keys(tensor, ids)
    assert torch.equal(key_values(keys), tensor)
    assert torch.equal(key_token_ids(keys), ids)
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert keys.argsort(descending=True).tolist() == expected


def test_the_last_token_is_found_once_when_the_last_block_is_not_full() -> None:
    values = torch.zeros(1, 64 * 20 + 5)
    values[0, -1] = 1.0
    assert key_token_ids(top_keys(values, 0, 3)).tolist() == [[64 * 20 + 4, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 3_000),
    count=st.sampled_from([1, 2, 7, 64]),
    levels=st.sampled_from([2, 30, 10**6]),
    seed=st.integers(0, 2**31),
)
def test_the_top_keys_are_those_of_a_full_sort(size: int, count: int, levels: int, seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, levels, (2, size)).astype(np.float32))
    values[0, 0] = -torch.inf
    keys = top_keys(values, 1_000, count)
    assert keys.shape == (2, count)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    real = min(size, count)
    assert torch.equal(key_token_ids(keys)[:, :real], order + 1_000)
    assert torch.equal(key_values(keys)[:, :real], values.gather(1, order))
    assert (key_values(keys)[:, real:] == -torch.inf).all()


# ---- tokens that stay on the device


@pytest.mark.parametrize("kinds", ["greedy", "noisy", "narrow", "wide", "mixed"])
def test_choose_leaves_on_the_device_what_sample_returns(kinds: str) -> None:
    kind: dict[str, dict[str, Any]] = {
        "greedy": {},
        "noisy": {"temperature": 0.8},
        "narrow": {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
        "wide": {"temperature": 3.0, "top_p": 0.99},
    }
    order = list(kind) * 2 if kinds == "mixed" else [kinds] * 5
    rows = [_row(seed=i, **kind[name]) for i, name in enumerate(order)]
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(3))
    logits[1] = torch.nan
    logits[3] = -torch.inf
    expected, _ = _sample(logits, rows, 16)
    tokens, logprobs = _sampler(300, 16).choose(logits.clone(), rows)
    assert tokens.tolist() == expected
    assert tokens[1] == tokens[3] == INVALID_TOKEN
    assert logprobs == [None] * len(rows)
