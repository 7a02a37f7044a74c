"""The counter-based noise: what it depends on, and that it has the distribution it claims."""

from __future__ import annotations

import math

import pytest
import torch
from phalanx.kernels.sampling import gumbel, mix, uniform


def _counters(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count).unsqueeze(0)


def _keys(*keys: int) -> torch.Tensor:
    return torch.tensor(keys).unsqueeze(1)


def test_mix_is_the_finaliser_of_splitmix64() -> None:
    mask = 2**64 - 1

    def expected(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    values = [0, 1, -1, 2**62, -(2**63), 2**63 - 1, 123456789, -987654321]
    mixed = mix(torch.tensor(values))
    assert [value & mask for value in mixed.tolist()] == [expected(value & mask) for value in values]


def test_a_value_depends_on_its_key_and_counter_alone() -> None:
    whole = gumbel(_keys(7, -3), _counters(10_000, 5 << 32))
    for start, stop in ((0, 1), (1, 78), (17, 9_999), (9_990, 10_000)):
        part = gumbel(_keys(-3), _counters(stop - start, (5 << 32) + start))
        assert torch.equal(part, whole[1:, start:stop])
    scattered = torch.tensor([[9, 4_321, 3, 8_888]])
    assert torch.equal(gumbel(_keys(7), scattered + (5 << 32)), whole[:1].gather(1, scattered))


def test_the_key_and_the_counter_are_not_modified() -> None:
    key, counter = _keys(1, 2), _counters(8)
    gumbel(key, counter)
    assert torch.equal(key, _keys(1, 2))
    assert torch.equal(counter, _counters(8))


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_uniform_values_are_within_the_open_unit_interval_and_evenly_spread(key: int) -> None:
    values = uniform(_keys(key), _counters(200_000)).squeeze(0)
    assert values.min() > 0
    assert values.max() < 1
    counts = torch.histc(values, bins=100, min=0, max=1).double()
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()
    # 99 degrees of freedom: beyond 160 in one of 10,000.
    assert chi_square < 160


def test_gumbel_values_have_the_mean_and_variance_of_the_standard_gumbel_distribution() -> None:
    values = gumbel(_keys(*range(20)), _counters(50_000)).double()
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(0.5772156649, abs=0.006)
    assert values.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


def test_the_right_tail_is_resolved_as_finely_as_the_rest() -> None:
    values = gumbel(_keys(*range(20)), _counters(100_000)).flatten()
    top = values.topk(200).values
    # The largest of 2,000,000 is near log(2,000,000), and no two of the largest are the same.
    assert 12 < top[0] < 25
    assert len(top.unique()) == 200


def test_neighbouring_keys_and_counters_are_uncorrelated() -> None:
    values = uniform(_keys(*range(400)), _counters(400)).double() - 0.5
    scale = 12 / values.numel()
    assert abs((values[1:] * values[:-1]).sum().item() * scale) < 0.015
    assert abs((values[:, 1:] * values[:, :-1]).sum().item() * scale) < 0.015


def test_different_keys_give_different_values() -> None:
    values = gumbel(_keys(0, 1, -1, 1 << 32), _counters(1_000))
    for i in range(4):
        for j in range(i):
            assert (values[i] == values[j]).float().mean() < 0.01
