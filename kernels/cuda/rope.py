"""The steps between a projection and attention, in Triton: head norms, rotary embedding, storing K and V.

Pools are (blocks, block_size, kv_heads, head_dim), contiguous. They may exceed 2^31 elements, so offsets in them are
64-bit numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..attention import HeadNorms

__all__ = ["rotate_and_store", "store_kv"]

_HEADS = 16
"""Heads in a program: with halves of 64 elements of 16 bits, each of 128 threads loads 16 bytes of either half."""
_BLOCK = 1024


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write keys and values (T, kv_heads, head_dim) to the pools, at the tokens' indices `slot_mapping`, int64 (T,).

    A token with an index below 0 is not written. Raises ValueError for pools of another shape or layout.
    """
    size = _token_size(k_cache, v_cache)
    if k.shape != (len(slot_mapping), *k_cache.shape[2:]) or v.shape != k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (k, v, k_cache, slot_mapping))
        raise ValueError(f"keys, values, pool and slot mapping do not fit each other: {shapes}")

    k = k.flatten(1)
    v = v.flatten(1)
    if k.numel():
        grid = len(slot_mapping), triton.cdiv(size, _BLOCK)
        _store_kv[grid](k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), SIZE=size, BLOCK=_BLOCK)


def rotate_and_store(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: HeadNorms | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Do what AttentionBackend.rotate_and_store does, in one pass.

    The queries (T, heads, head_dim) are a view of `qkv`, where they replace what was there; keys and values go to the
    pools, at the indices `slot_mapping`, int64 (T,). A token with an index below 0 is not stored.

    Normalised heads are rounded to the projection's dtype before they are rotated. The rotation is computed in float32
    and rounded once. `cos` and `sin` (T, 1, head_dim) are RotaryEmbedding's; only their first half is read, as the
    second repeats it. Raises ValueError for shapes and layouts that do not fit.
    """
    kv_heads, head_dim = k_cache.shape[2:]
    size = _token_size(k_cache, v_cache)
    heads, rest = divmod(qkv.shape[1] - 2 * size, head_dim)
    tokens = qkv.shape[0]

    if heads < 0 or rest or head_dim % 2 or cos.shape != (tokens, 1, head_dim) or slot_mapping.shape != (tokens,):
        shapes = ", ".join(str(tuple(x.shape)) for x in (qkv, cos, k_cache, slot_mapping))
        raise ValueError(f"projection, tables, pool and slot mapping do not fit each other: {shapes}")
    if qkv.stride(1) != 1 or cos.stride() != sin.stride() or cos.stride(2) != 1:
        raise ValueError("numbers of a token's projection and of its tables must be adjacent")

    if tokens:
        # The grid has programs of query heads and, behind them, of key and value heads. Without norms any pointer does.
        block = min(_HEADS, triton.next_power_of_2(max(heads, kv_heads)))
        _rotate_and_store[(tokens, triton.cdiv(heads, block) + triton.cdiv(kv_heads, block))](
            qkv,
            cos,
            sin,
            norms.query if norms else cos,
            norms.key if norms else cos,
            k_cache,
            v_cache,
            slot_mapping,
            qkv.stride(0),
            cos.stride(0),
            norms.eps if norms else 0.0,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            NORMED=norms is not None,
            BLOCK_H=block,
        )
    return qkv.view(tokens, heads + 2 * kv_heads, head_dim)[:, :heads]


def _token_size(k_cache: torch.Tensor, v_cache: torch.Tensor) -> int:
    """Elements that a pool has for a token."""
    if k_cache.ndim != 4 or v_cache.shape != k_cache.shape or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(
            f"pools are {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; they must be contiguous and "
            "(blocks, block_size, kv_heads, head_dim)"
        )
    return int(k_cache.shape[2] * k_cache.shape[3])


@triton.jit
def _store_kv(k, v, k_cache, v_cache, slot_mapping, k_stride, v_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, part of its keys and values)."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(slot_mapping + token)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = offsets < tl.where(index >= 0, SIZE, 0)
    keys = tl.load(k + token * k_stride + offsets, present)
    values = tl.load(v + token * v_stride + offsets, present)
    tl.store(k_cache + index * SIZE + offsets, keys.to(k_cache.dtype.element_ty), present)
    tl.store(v_cache + index * SIZE + offsets, values.to(v_cache.dtype.element_ty), present)


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    q_norm,
    k_norm,
    k_cache,
    v_cache,
    slot_mapping,
    qkv_stride,
    table_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (token, BLOCK_H of its heads): the first programs take query heads, the others key and value heads."""
    query_blocks: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    d = tl.arange(0, triton.next_power_of_2(HALF))
    row = qkv + token * qkv_stride
    table = token * table_stride + d
    c = tl.load(cos + table, d < HALF, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table, d < HALF, 0.0).to(tl.float32)[None, :]

    if block < query_blocks:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        present = (head < HEADS)[:, None] & (d < HALF)[None, :]
        queries = row + (head * HEAD_DIM)[:, None] + d[None, :]
        left, right = _rotated(queries, present, c, s, q_norm, eps, d, HALF, NORMED)
        tl.store(queries, left.to(qkv.dtype.element_ty), present)
        tl.store(queries + HALF, right.to(qkv.dtype.element_ty), present)
    else:
        index = tl.load(slot_mapping + token)
        head = (block - query_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        present = (head < tl.where(index >= 0, KV_HEADS, 0))[:, None] & (d < HALF)[None, :]
        inside = (head * HEAD_DIM)[:, None] + d[None, :]
        left, right = _rotated(row + HEADS * HEAD_DIM + inside, present, c, s, k_norm, eps, d, HALF, NORMED)
        values = row + (HEADS + KV_HEADS) * HEAD_DIM + inside
        offsets = index * (KV_HEADS * HEAD_DIM) + inside
        tl.store(k_cache + offsets, left.to(k_cache.dtype.element_ty), present)
        tl.store(k_cache + offsets + HALF, right.to(k_cache.dtype.element_ty), present)
        tl.store(v_cache + offsets, tl.load(values, present).to(v_cache.dtype.element_ty), present)
        tl.store(v_cache + offsets + HALF, tl.load(values + HALF, present).to(v_cache.dtype.element_ty), present)


@triton.jit
def _rotated(pointers, present, c, s, norm, eps, d, HALF: tl.constexpr, NORMED: tl.constexpr):
    """The two halves [heads, HALF] of the heads at `pointers`, normalised if NORMED, and rotated; float32."""
    left = tl.load(pointers, present, 0.0).to(tl.float32)
    right = tl.load(pointers + HALF, present, 0.0).to(tl.float32)
    if NORMED:
        dtype: tl.constexpr = pointers.dtype.element_ty
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF) + eps)[:, None]
        weight = tl.load(norm + d, d < HALF, 0.0).to(tl.float32)[None, :]
        left = (left * scale * weight).to(dtype).to(tl.float32)
        weight = tl.load(norm + HALF + d, d < HALF, 0.0).to(tl.float32)[None, :]
        right = (right * scale * weight).to(dtype).to(tl.float32)
    return left * c - right * s, right * c + left * s
