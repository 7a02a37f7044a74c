"""Rotary position embedding (Su et al., arXiv:2104.09864) and its scalings, with the formulas transformers uses."""

from __future__ import annotations

import math

import torch


class RotaryEmbedding:
    """Cosines and sines of positions, for heads of `head_dim` elements.

    `kind` is default, linear, dynamic, yarn (arXiv:2309.00071) or llama3 (Llama 3.1's). The others are the fields of
    the checkpoint's rope parameters.
    """

    def __init__(
        self,
        *,
        head_dim: int,
        max_position: int,
        table_length: int,
        dtype: torch.dtype,
        device: torch.device,
        kind: str,
        theta: float,
        factor: float,
        original_max_position: int,
        beta_fast: float,
        beta_slow: float,
        attention_factor: float | None,
        mscale: float | None,
        mscale_all_dim: float | None,
        truncate: bool,
        low_freq_factor: float,
        high_freq_factor: float,
    ) -> None:
        self.dynamic = kind == "dynamic"
        self._dtype = dtype
        self._head_dim = head_dim
        self._theta = theta
        self._factor = factor
        self._max_position = max_position

        original = original_max_position or max_position
        frequencies = _default_frequencies(head_dim, theta)
        self._scale = 1.0
        if kind == "linear":
            frequencies = frequencies / factor
        elif kind == "llama3":
            frequencies = _llama3_frequencies(frequencies, factor, low_freq_factor, high_freq_factor, original)
        elif kind == "yarn":
            ramp = _yarn_ramp(head_dim, theta, beta_fast, beta_slow, original, truncate)
            frequencies = frequencies / factor * ramp + frequencies * (1 - ramp)
            self._scale = _yarn_attention_factor(factor, attention_factor, mscale, mscale_all_dim)

        # Dynamic scaling has no table: its frequencies depend on the lengths of a step's sequences.
        if not self.dynamic:
            angles = torch.outer(torch.arange(table_length, dtype=torch.float32), frequencies)
            self._cos, self._sin = (table.to(device) for table in self._tables(angles))

    def __call__(self, positions: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each (T, 1, head_dim) in the model's dtype, for int64 positions (T,): what apply_rope takes.

        `lengths` (T,) are the known lengths of the tokens' sequences: dynamic scaling chooses its base by them, where
        transformers uses the longest position it has seen.
        """
        if self.dynamic:
            return self._tables(positions.float().unsqueeze(-1) * self._dynamic_frequencies(lengths))
        return self._cos[positions], self._sin[positions]

    def _dynamic_frequencies(self, lengths: torch.Tensor) -> torch.Tensor:
        seen = lengths.clamp(min=self._max_position).double().unsqueeze(-1)
        stretch = self._factor * seen / self._max_position - (self._factor - 1)
        base = self._theta * stretch ** (self._head_dim / (self._head_dim - 2))
        exponents = torch.arange(0, self._head_dim, 2, dtype=torch.float64, device=lengths.device) / self._head_dim
        return (1.0 / base**exponents).float()

    def _tables(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = angles.unsqueeze(-2)
        cos = (angles.cos() * self._scale).to(self._dtype)
        sin = (angles.sin() * self._scale).to(self._dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads (T, heads, head_dim) by tables (T, 1, head_dim): the halves of a head are the pairs' components.

    The second half of `sin` is negated: (x1 cos - x2 sin, x2 cos + x1 sin) is then x cos - (x2, x1) sin on whole heads.
    """
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin, value=-1)


def _default_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def _llama3_frequencies(
    frequencies: torch.Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original: int
) -> torch.Tensor:
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    is_low = wavelengths > original / low_freq_factor
    is_high = wavelengths < original / high_freq_factor
    return torch.where(is_low, frequencies / factor, torch.where(is_high, frequencies, blended))


def _yarn_ramp(
    head_dim: int, theta: float, beta_fast: float, beta_slow: float, original: int, truncate: bool
) -> torch.Tensor:
    """1 where a dimension is interpolated, 0 where it is kept, linear between."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def _yarn_attention_factor(
    factor: float, attention_factor: float | None, mscale: float | None, mscale_all_dim: float | None
) -> float:
    if attention_factor is not None:
        return attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)
