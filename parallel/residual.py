"""The residual stream: the sum of what all layers have made, from which each reads through a norm."""

from __future__ import annotations

import torch

from ..kernels.norm import rms_norm
from .collectives.base import Collectives


class Residual:
    """`total` is float32 (T, H): bfloat16 would lose most here. What a row-parallel layer made last may be missing.

    That part is summed over the ranks and added when the next layer norms the stream: one pass over memory does both.
    """

    def __init__(self, embedded: torch.Tensor) -> None:
        """`embedded` (T, H) are the tokens' embeddings, of any dtype; not modified unless float32."""
        self.total = embedded.float()
        self._part: tuple[torch.Tensor, torch.Tensor | None, Collectives] | None = None

    def defer_all_reduce(self, partial: torch.Tensor, bias: torch.Tensor | None, collectives: Collectives) -> None:
        """Add the sum of all ranks' `partial` (T, H), and `bias` (H,), by the next norm(). `partial` is given away."""
        self.materialize()
        self._part = partial, bias, collectives

    def materialize(self) -> torch.Tensor:
        """Add what is missing now, and return `total`."""
        part, self._part = self._part, None
        if part is not None:
            partial, bias, collectives = part
            collectives.add_reduced(partial, self.total)
            if bias is not None:
                self.total.add_(bias)
        return self.total

    def norm(self, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        """RMSNorm of the stream, (T, H) in `dtype`; nothing is missing from then on. `weight` is float32 (H,)."""
        part, self._part = self._part, None
        if part is None or not len(self.total):
            return rms_norm(self.total, weight, eps, dtype)
        partial, bias, collectives = part
        return collectives.add_reduced_norm(partial, bias, self.total, weight, eps, dtype)

    def select(self, rows: torch.Tensor) -> Residual:
        """The stream of some tokens, int64 (R,)."""
        chosen = Residual(self.total[rows])
        if self._part is not None:
            partial, bias, collectives = self._part
            chosen._part = partial[rows], bias, collectives
        return chosen
