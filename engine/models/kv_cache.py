"""The paged KV cache's memory: the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.huge_pages import LEAST_BYTES, empty


@dataclass(frozen=True)
class CacheLayout:
    """How one rank keeps keys and values. `width` (elements of a head) and `dtype` are the backend's cache_head()."""

    block_size: int
    layers: int
    kv_heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes that the keys and values of one token take in all layers."""
        return 2 * self.layers * self.kv_heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one rank: for each layer (blocks, block_size, kv_heads, width of a head), zero-initialised."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(cls, num_blocks: int, layout: CacheLayout) -> KVCache:
        """Allocate `num_blocks` blocks of `layout`, on its device."""
        shape = num_blocks, layout.block_size, layout.kv_heads, layout.width
        pools = [_zeros(shape, layout.dtype, layout.device) for _ in range(2 * layout.layers)]
        return cls(pools[: layout.layers], pools[layout.layers :])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Large memory on a CPU is zero by itself, and costs nothing until it is used.
    pool = empty(shape, dtype, device)
    return pool if device.type == "cpu" and pool.nbytes >= LEAST_BYTES else pool.zero_()
