"""The paged KV cache's memory: the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.huge_pages import LEAST_BYTES, empty


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one rank: for each layer (blocks, block_size, kv_heads, width of a head), zero-initialised.

    Width and dtype are the attention backend's cache_head().
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        layers: int,
        kv_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = (num_blocks, block_size, kv_heads, width)
        pools = [_zeros(shape, dtype, device) for _ in range(2 * layers)]
        return cls(pools[:layers], pools[layers:])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Large memory on a CPU is zero by itself, and costs nothing until it is used.
    pool = empty(shape, dtype, device)
    return pool if device.type == "cpu" and pool.nbytes >= LEAST_BYTES else pool.zero_()
