"""Adapters of FlashAttention 3 (Shah et al., arXiv:2407.08608) and 2 (Dao, arXiv:2307.08691): packages a user may have.

They are imported when a kernel is made. Neither writes to a tensor that it is given, so results are copied. Rules for
pages and lengths: hopper/flash_api_stable.cpp and csrc/flash_attn/flash_api.cpp in Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .attention import AttentionKernel, Rows

FLASH_ATTN_3_MODULES = (("flash_attn_interface", "flash_attn_config"), ("fa3_fwd_interface", "fa3_fwd_config"))
"""Where FlashAttention 3 may be, and what its build can do: the project's own build, and the fa3-fwd wheel of PyPI."""

LARGEST_TILE = 192
"""Query rows of FlashAttention 3's tiles, at most."""
SPLIT_QUERIES = 256
"""With more queries a step has work for all multiprocessors, and a float32 result for each split would be large."""
MAX_SPLITS = 128


class FlashAttention3(AttentionKernel):
    """flash_attn_with_kvcache on Hopper, prompts and decodes alike.

    Its fast loads (TMA) take pages of whole tiles of keys, 128 for heads of 64 and 128. A build without the slower
    loads, like fa3-fwd, takes TMA only where the longest query fills more than a tile, so it is given a longer one:
    the length is but a bound, the tiles to compute are found on the device.
    """

    name = "flash_attn_3"
    block_multiple = 128
    default_block_size = 128

    def __init__(self, multiprocessors: int) -> None:
        """`multiprocessors` of the device. Raises ImportError if the package is missing or cannot be loaded."""
        interface, flags = _flash_attn_3()
        self._attend = interface.flash_attn_with_kvcache
        self._tma_only = flags.get("FLASHATTENTION_DISABLE_PAGEDKV", False)
        self._multiprocessors = multiprocessors

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: Rows, out: torch.Tensor
    ) -> None:
        """Attention as AttentionKernel.__call__. Its result is copied into `out`."""
        kv_heads = k_cache.shape[2]
        longest = max(rows.max_q, LARGEST_TILE * kv_heads // q.shape[1] + 1) if self._tma_only else rows.max_q
        result = self._attend(
            q,
            k_cache,
            v_cache,
            cache_seqlens=rows.seqused_k,
            page_table=rows.block_table,
            cu_seqlens_q=rows.cu_q,
            max_seqlen_q=longest,
            causal=True,
            num_splits=self._splits(q.shape[0], kv_heads),
        )
        out.copy_(result)

    def _splits(self, queries: int, kv_heads: int) -> int:
        """Parts that a row's keys are cut into, at most: with rows enough the device cuts less. 0: as it likes."""
        if queries > SPLIT_QUERIES:
            return 1
        # Its own choice is to fill the multiprocessors, but counts the tiles of max_seqlen_q, which may be too long.
        return max(1, min(MAX_SPLITS, self._multiprocessors // kv_heads)) if self._tma_only else 0


class FlashAttention2(AttentionKernel):
    """flash_attn_varlen_func for prompts, and flash_attn_with_kvcache, which splits the keys, for rows of one query."""

    name = "flash_attn_2"
    block_multiple = 256
    default_block_size = 256

    def __init__(self) -> None:
        """Raises ImportError if the package is missing or cannot be loaded."""
        self._flash_attn: Any = importlib.import_module("flash_attn")
        self._rows: Rows | None = None
        self._cu_k: torch.Tensor | None = None

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: Rows, out: torch.Tensor
    ) -> None:
        """Attention as AttentionKernel.__call__. Its result is copied into `out`."""
        if rows.max_q == 1:
            result = self._flash_attn.flash_attn_with_kvcache(
                q.unsqueeze(1),
                k_cache,
                v_cache,
                cache_seqlens=rows.seqused_k,
                block_table=rows.block_table,
                causal=True,
            ).squeeze(1)
        else:
            result = self._flash_attn.flash_attn_varlen_func(
                q,
                k_cache,
                v_cache,
                cu_seqlens_q=rows.cu_q,
                cu_seqlens_k=self._cumulative_keys(rows),
                max_seqlen_q=rows.max_q,
                max_seqlen_k=rows.max_k,
                causal=True,
                block_table=rows.block_table,
            )
        out.copy_(result)

    def _cumulative_keys(self, rows: Rows) -> torch.Tensor | None:
        """(R + 1,) int32. All layers of a step bring the same rows: it is made once for them."""
        if rows is not self._rows:
            self._rows = rows
            self._cu_k = torch.nn.functional.pad(rows.seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
        return self._cu_k


def _flash_attn_3() -> tuple[Any, dict[str, bool]]:
    """FlashAttention 3's module, and its build flags; older builds have none. ImportError names the first module."""
    missing = None
    for module, config in FLASH_ATTN_3_MODULES:
        try:
            interface = importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing = missing or error
            continue
        try:
            return interface, importlib.import_module(config).CONFIG["build_flags"]
        except ModuleNotFoundError:
            return interface, {}
    assert missing is not None
    raise missing
