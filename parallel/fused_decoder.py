"""A rank's decoder layers and last norm on a CPU, without Python between their parts: with few tokens that is a tenth
of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import cpu
from ..kernels.attention import AttentionMetadata, HeadNorms
from ..kernels.cpu.attention import cache_shape
from ..kernels.weight_formats.packed import PackedWeight
from .collectives.base import Collectives

Projection = tuple[PackedWeight, torch.Tensor | None]
"""A weight and its bias, if it has one."""

SUBLAYERS = ("attention", "mlp")
"""A layer's, in order."""


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weights. Norms are float32 (hidden,)."""

    attention_norm: torch.Tensor
    qkv: Projection
    head_norms: HeadNorms | None
    output: Projection
    mlp_norm: torch.Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True)
class LogitsIndices:
    """The tokens of a step that logits are computed of, if these are not all: int64 (C,), ascending indices.

    `plan` is the attention backend's of them alone, each a row of its own, if the backend has_fused_decoder; it is good
    as long as `metadata`.
    """

    tokens: torch.Tensor
    metadata: AttentionMetadata | None
    plan: Any


class FusedDecoder:
    """The layers of one rank over one cache of CpuAttention, and the norm after them.

    Sublayer 2 i is layer i's attention, 2 i + 1 its MLP.
    """

    def __init__(
        self,
        layers: Sequence[PackedLayer],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        *,
        last_norm: torch.Tensor,
        heads: int,
        hidden: int,
        eps: float,
        dtype: torch.dtype,
        collectives: Collectives,
    ) -> None:
        """`keys` and `values` are the layers' pools; `last_norm` is float32 (hidden,), as all norms' weights.

        `heads` counts this rank's query heads; `eps` is of all norms.
        """
        self._sublayers = range(2 * len(layers))
        self._last_attention = self._sublayers[-2]
        self._kept = layers, keys, values  # whose memory is used by address
        self._last_norm = last_norm
        self._eps = eps
        self._collectives = collectives
        self._dtype = dtype

        # A bias of each sublayer. Among several ranks it is added to the sum of what they made.
        self._biases = [bias for layer in layers for _, bias in (layer.output, layer.down)]
        alone = collectives.size == 1
        reducer = None if any(bias is not None for bias in self._biases) else collectives.reducer
        self._all_at_once = alone or reducer is not None

        block_size, kv_heads, head_dim, int8_cache = cache_shape(keys[0])
        shape = hidden, heads, kv_heads, head_dim, block_size, int8_cache
        self._native = cpu.native.FusedDecoder(cpu.DTYPES[dtype], *shape, eps, *(reducer or (0, 0)))
        for layer, k_pool, v_pool in zip(layers, keys, values, strict=True):
            head_norms = layer.head_norms
            self._native.add_layer(
                layer.attention_norm.data_ptr(),
                _addresses(layer.qkv),
                cpu.address(head_norms.query if head_norms else None),
                cpu.address(head_norms.key if head_norms else None),
                _addresses(layer.output, alone),
                layer.mlp_norm.data_ptr(),
                _addresses(layer.gate_up),
                _addresses(layer.down, alone),
                k_pool.data_ptr(),
                v_pool.data_ptr(),
            )

    def run(
        self,
        total: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        plan: Any,
        logits_indices: LogitsIndices | None = None,
        trace: Callable[[str], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, hidden) after the last norm, of the residual stream `total`, float32 (T, hidden).

        The layers, one after the other, add to `total`. Attention stores the tokens' keys and values at `slot_mapping`
        (T,) and attends by `plan`, of CpuAttention.plan(); `cos` and `sin` are RotaryEmbedding's. With `logits_indices`
        the result is of these tokens alone, for the last layer makes nothing but keys and values of the others. A
        `trace` is called with the name of each sublayer when it is done. Without one all are one call, if nothing has
        to happen between them. Raises CollectiveError when a rank is lost.
        """
        step = cos.data_ptr(), sin.data_ptr(), slot_mapping.data_ptr(), plan
        partial = None if self._collectives.size == 1 else torch.empty(total.shape, dtype=self._dtype)

        # The tokens that go on through the last layer's MLP, and the stream that they go on in: none, unless chosen.
        chosen = None
        choice = (-1, 0, 0, plan)
        if logits_indices is not None:
            tokens = logits_indices.tokens
            chosen = total.new_empty(len(tokens), total.shape[1])
            choice = len(chosen), tokens.data_ptr(), chosen.data_ptr(), logits_indices.plan

        all_at_once = self._all_at_once and trace is None
        for piece in [self._sublayers] if all_at_once else [range(i, i + 1) for i in self._sublayers]:
            addresses = total.data_ptr(), cpu.address(partial)
            self._native.run(piece.start, piece.stop, *addresses, len(total), *step, *choice)
            if chosen is not None and self._last_attention in piece:
                total = chosen
            if not self._all_at_once:
                self._all_reduce(piece.start, partial, total)
            if trace is not None:
                trace(SUBLAYERS[piece.start % 2])
        return self._norm(total)

    def _norm(self, total: torch.Tensor) -> torch.Tensor:
        hidden = torch.empty(total.shape, dtype=self._dtype)
        shape = *total.shape, cpu.DTYPES[self._dtype]
        cpu.native.norm(total.data_ptr(), self._last_norm.data_ptr(), self._eps, hidden.data_ptr(), *shape)
        return hidden

    def _all_reduce(self, sublayer: int, partial: torch.Tensor | None, total: torch.Tensor) -> None:
        """Add the sum of all ranks' `partial`, and the sublayer's bias, to `total`."""
        if partial is None or not len(total):
            return
        self._collectives.add_reduced(partial[: len(total)], total)
        bias = self._biases[sublayer]
        if bias is not None:
            total.add_(bias)


def _addresses(projection: Projection, with_bias: bool = True) -> tuple[Any, int]:
    weight, bias = projection
    return weight.native, cpu.address(bias if with_bias else None)
