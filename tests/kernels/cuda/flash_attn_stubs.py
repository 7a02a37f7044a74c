"""Stand-ins for FlashAttention 3 and 2 that refuse what the real functions refuse, and compute by the definition.

Signatures are those of flash-attn 2.8.3 and fa3-fwd 0.0.3, checks those of csrc/flash_attn/flash_api.cpp and
hopper/flash_api_stable.cpp in Dao-AILab/flash-attention, with their words. Checks for a CUDA device are left out. What
the real functions would silently read or skip, like queries beyond max_seqlen_q, is refused too.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from phalanx.kernels.reference import paged_attention


class Calls(list[dict[str, Any]]):
    """The arguments of each call, by name."""

    def take(self) -> list[dict[str, Any]]:
        calls, self[:] = list(self), []
        return calls


def _check(condition: object, message: str) -> None:
    if not condition:
        raise RuntimeError(message)  # what TORCH_CHECK raises


def _check_int32(name: str, tensor: torch.Tensor, size: int) -> None:
    _check(tensor.dtype == torch.int32, f"{name} must have dtype torch.int32")
    _check(tensor.is_contiguous(), f"{name} must be contiguous")
    _check(tensor.shape == (size,), f"{name} must have shape ({size},)")


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, table_name: str) -> None:
    """What mha_fwd of FlashAttention 3 and mha_varlen_fwd and mha_fwd_kvcache of 2 check alike, of a paged cache."""
    _check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    _check(k.dtype == q.dtype, "query and key must have the same dtype")
    _check(v.dtype == q.dtype, "query and value must have the same dtype")
    for x in (q, k, v):
        _check(x.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    _check(table.dtype == torch.int32, f"{table_name} must have dtype torch.int32")
    _check(table.stride(-1) == 1, f"{table_name} must have contiguous last dimension")
    heads, head_size = q.shape[-2:]
    _check(head_size <= 256, "FlashAttention forward only supports head dimension at most 256")
    _check(head_size % 8 == 0, "head_size should be a multiple of 8")
    _check(heads % k.shape[2] == 0, "Number of heads in key/value must divide number of heads in query")
    _check(k.dim() == 4 and k.shape == v.shape, "k must have shape (num_pages, page_size, num_heads_k, head_size)")
    _check(k.shape[3] == head_size, "k must have shape (num_pages, page_size, num_heads_k, head_size)")


def _compute(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    query_lengths: list[int],
    key_lengths: list[int],
) -> torch.Tensor:
    assert sum(query_lengths) == q.shape[0]
    assert max(key_lengths) <= table.shape[1] * k.shape[1], "keys beyond the row's pages"
    assert 0 <= int(table.min()) <= int(table.max()) < k.shape[0], "a page outside the pool"
    return paged_attention(q, k, v, table.long(), query_lengths, key_lengths).to(q.dtype)


def _tile_size_fwd_sm90(head_size: int, causal: bool) -> tuple[int, int]:
    """(kBlockM, kBlockN) of hopper/tile_size.h, for two bytes an element and loads by TMA."""
    if head_size <= 64:
        return 192, 128 if causal else 192
    if head_size <= 96:
        return 192, 144
    if head_size <= 128:
        return 128, 128 if causal else 176
    return 128, 112 if head_size <= 192 else 80


def flash_attn_3(calls: Calls, *, disabled: tuple[str, ...] = ()) -> Callable[..., torch.Tensor]:
    """flash_attn_with_kvcache of hopper/flash_attn_interface.py; `disabled`: FLASHATTENTION_DISABLE_* of the build."""

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
        scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
    ):  # fmt: skip
        calls.append({"page_table": page_table, "max_seqlen_q": max_seqlen_q, "num_splits": num_splits})
        assert causal
        _check_inputs(q, k_cache, v_cache, page_table, "page_table")
        _check(max_seqlen_q is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
        _check(type(max_seqlen_q) is int and type(num_splits) is int, "Expected a value of type 'int'")
        batch_size = len(cu_seqlens_q) - 1
        _check_int32("cu_seqlens_q", cu_seqlens_q, batch_size + 1)
        _check_int32("seqused_k", cache_seqlens, batch_size)
        _check(page_table.shape[0] == batch_size, "batch_size must be equal to batch_size_k")
        _check(q.dim() == 3, "q must have 3 dimensions")  # CHECK_SHAPE(q, total_q, num_heads, head_size)
        _check(num_splits <= 256, "num_splits > 256 not supported")
        head_size, page_size = q.shape[2], k_cache.shape[1]
        # "causal=true is the same as causal=false in this case ... Special case of hdim 128"
        tile_m, tile_n = _tile_size_fwd_sm90(head_size, max_seqlen_q > 1 or 64 < head_size <= 128)
        # get_pagedkv_tma(): page_size % kBlockN == 0 && seqlen_q * (h / h_k) > kBlockM
        tma = page_size % tile_n == 0 and max_seqlen_q * (q.shape[1] // k_cache.shape[2]) > tile_m
        _check("PAGEDKV" not in disabled or tma, "This flash attention build does not support paged KV.")
        _check("FP16" not in disabled or q.dtype != torch.float16, "This flash attention build does not support FP16.")
        query_lengths = cu_seqlens_q.diff().tolist()
        assert max(query_lengths) <= max_seqlen_q, "queries beyond max_seqlen_q are skipped"
        return _compute(q, k_cache, v_cache, page_table, query_lengths, cache_seqlens.tolist())

    return flash_attn_with_kvcache


def flash_attn_2(calls: Calls) -> dict[str, Callable[..., torch.Tensor]]:
    """flash_attn_varlen_func and flash_attn_with_kvcache of flash_attn/flash_attn_interface.py."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append({"function": "varlen", "cu_seqlens_k": cu_seqlens_k})
        assert causal
        _check_inputs(q, k, v, block_table, "block_table")
        _check(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
        _check(type(max_seqlen_q) is int and type(max_seqlen_k) is int, "incompatible function arguments")
        batch_size = cu_seqlens_q.numel() - 1
        _check(batch_size > 0, "batch size must be positive")
        _check_int32("cu_seqlens_q", cu_seqlens_q, batch_size + 1)
        _check_int32("cu_seqlens_k", cu_seqlens_k, batch_size + 1)
        _check(block_table.shape[0] == batch_size, "block_table must have shape (batch_size, max_num_blocks_per_seq)")
        _check(q.dim() == 3, "q must have shape (total_q, num_heads, head_size)")
        query_lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max(query_lengths) <= max_seqlen_q
        assert max(key_lengths) <= max_seqlen_k
        return _compute(q, k, v, block_table, query_lengths, key_lengths)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
        return_softmax_lse=False,
    ):  # fmt: skip
        calls.append({"function": "kvcache", "block_table": block_table, "num_splits": num_splits})
        assert causal
        _check_inputs(q, k_cache, v_cache, block_table, "block_table")
        _check(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
        _check(q.dim() == 4, "q must have shape (batch_size, seqlen_q, num_heads, head_size_og)")
        batch_size, queries = q.shape[:2]
        _check(batch_size > 0, "batch size must be positive")
        _check_int32("seqlens_k", cache_seqlens, batch_size)
        _check(block_table.shape[0] == batch_size, "block_table must have shape (batch_size, max_num_blocks_per_seq)")
        rows = [queries] * batch_size
        return _compute(q.flatten(0, 1), k_cache, v_cache, block_table, rows, cache_seqlens.tolist()).view(q.shape)

    return {function.__name__: function for function in (flash_attn_varlen_func, flash_attn_with_kvcache)}


def _install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def remove_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package were installed: importing one raises ModuleNotFoundError."""
    for name in ("flash_attn_interface", "flash_attn_config", "fa3_fwd_interface", "fa3_fwd_config", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)


def install_flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The project's own build, with all there is; older ones have no flash_attn_config."""
    calls = Calls()
    _install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=flash_attn_3(calls))
    return calls


def install_fa3_fwd(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The wheel fa3-fwd 0.0.3, whose flags are those of its fa3_fwd_config.py."""
    calls = Calls()
    disabled = ("PAGEDKV", "FP16")
    _install(monkeypatch, "fa3_fwd_interface", flash_attn_with_kvcache=flash_attn_3(calls, disabled=disabled))
    flags = {f"FLASHATTENTION_DISABLE_{name}": name in disabled for name in ("PAGEDKV", "FP16", "SPLIT", "VARLEN")}
    _install(monkeypatch, "fa3_fwd_config", CONFIG={"build_flags": flags})
    return calls


def install_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    _install(monkeypatch, "flash_attn", **flash_attn_2(calls))
    return calls
