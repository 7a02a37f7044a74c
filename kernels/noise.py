"""Counter-based random numbers: a value depends on its key and counter alone, so any rank can make any part."""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB


def mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on an int64 tensor, in place (Steele, Lea, Flood, OOPSLA 2014)."""
    x.bitwise_xor_(_shift_right(x, 30)).mul_(_MULTIPLY_1)
    x.bitwise_xor_(_shift_right(x, 27)).mul_(_MULTIPLY_2)
    return x.bitwise_xor_(_shift_right(x, 31))


def uniform(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in (0, 1), of the broadcast shape of two int64 tensors; about 2^-41 is the smallest value."""
    bits = mix(mix(key.clone()) + (counter + 1) * _GOLDEN)
    return ((_shift_right(bits, 24).to(torch.float32) + 0.5) * 2.0**-40).clamp_(max=1 - 2.0**-24)


def gumbel(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel float32 noise: argmax(logits + gumbel) is a draw from softmax(logits).

    E = -log(1 - u) is exponential, precise where it is small, and -log E is Gumbel: the right tail, which decides
    the argmax over a large vocabulary, keeps its resolution.
    """
    return uniform(key, counter).neg_().log1p_().neg_().log_().neg_()


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def derive_seed(seed: int, index: int) -> int:
    """A seed for the index-th of something seeded by `seed`: a signed 64-bit integer, equal on every machine."""
    return int(mix(torch.tensor(seed, dtype=torch.int64) + (index + 1) * _GOLDEN % 2**63))
