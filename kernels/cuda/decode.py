"""Attention of rows of one query over a paged cache: split-KV decoding in Triton (Flash-Decoding, Dao et al., 2023).

The query heads of a KV head are packed into one tile, so that each key and value is read once. A row's keys are cut
into splits, one program each, and a second kernel merges their results. The grid hangs on shapes alone; each program
finds its range of keys from the row's length on the device. So a captured CUDA graph is good for any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .paged import INTERPRETED, attend_keys, multiprocessors, shape_constants

__all__ = ["decode_attention", "plan_splits"]

MAX_SPLITS = tl.constexpr(128)
MIN_KEYS = tl.constexpr(128)
"""A row is not cut into smaller splits than this to fill the GPU: merging them would take as long."""
LONG_KEYS = tl.constexpr(4096)
"""Nor into longer ones where the GPU is full anyway, lest one program is still busy when all others are done."""
FILLING_PROGRAMS = 2
"""Programs a multiprocessor that keep it busy."""
MOST_PROGRAMS = 32
"""Programs a multiprocessor, at most, that splitting makes: also those that find nothing to do take a moment."""
MAX_HEADS = 32
"""Query heads in a program; larger groups take several, each of which reads their keys."""
MERGED_AT_ONCE = 16


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    seqused_k: torch.Tensor,
    out: torch.Tensor,
    max_k: int,
    splits: int | None = None,
) -> None:
    """Attention of queries (R, heads, head_dim) over pools (blocks, block_size, kv_heads, head_dim) into `out`.

    Row r's query sees its seqused_k[r] keys, which stand in the blocks block_table[r]; both are int32, the table is
    (R, B), max_k bounds seqused_k. Without keys the result is zero. The others have one dtype, bfloat16, float16 or
    float32. `splits` is the number that the grid may cut a row into, by default that of plan_splits().

    Raises ValueError for a block size, a head size or a layout that the kernels do not take.
    """
    constants = shape_constants(q, k_cache, v_cache, out)
    rows, heads, head_dim = q.shape
    block_h = min(MAX_HEADS, max(16, triton.next_power_of_2(constants["GROUP"])))
    programs = constants["KV_HEADS"] * triton.cdiv(constants["GROUP"], block_h)

    fill = splits or 1
    if splits is None:
        splits, fill = plan_splits(rows * programs, multiprocessors(q.device), max_k)

    # Each split leaves its result here, for merge_kernel. A row of one split needs none.
    parts = rows * heads * splits if splits > 1 else 0
    partial = torch.empty(parts * head_dim, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)

    tensors = (q, k_cache, v_cache, block_table, seqused_k, out, partial, partial_lse)
    decode_kernel[(programs, splits, rows)](
        *tensors,
        q.stride(0),
        block_table.stride(0),
        splits,
        fill,
        **constants,
        BLOCK_H=block_h,
        **decode_options(head_dim, q.element_size()),
    )
    if splits > 1:
        merge_kernel[(heads, rows)](partial, partial_lse, seqused_k, out, splits, fill, head_dim, MERGED_AT_ONCE)


def plan_splits(programs: int, multiprocessors: int, max_k: int) -> tuple[int, int]:
    """(splits of the grid, splits that fill the GPU) for rows of up to max_k keys and `programs` programs a split.

    They follow from shapes alone, so they hold for every replay of a CUDA graph. A row uses _splits_used() of them.
    """
    fill = min(MAX_SPLITS.value, triton.cdiv(FILLING_PROGRAMS * multiprocessors, programs))
    most = max(fill, min(MAX_SPLITS.value, MOST_PROGRAMS * multiprocessors // programs))
    wanted = max(min(fill, triton.cdiv(max_k, MIN_KEYS.value)), triton.cdiv(max_k, LONG_KEYS.value))
    return min(most, wanted), fill


def decode_options(head_dim: int, element_size: int) -> dict[str, int]:
    """BLOCK_N and the launch options: two tiles on their way while one is computed, and two programs at a time.

    A tile has up to 16 KiB of keys and as much of values. float32 takes no tensor cores but many registers,
    of which the interpreter has enough.
    """
    block_n = 16 if element_size > 2 and not INTERPRETED.value else min(64, 8192 // triton.next_power_of_2(head_dim))
    return {"BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}


@triton.jit
def _splits_used(keys, splits, fill):
    """The number of splits that a row of so many keys uses: none without keys, one for each MIN_KEYS at most."""
    wanted = tl.maximum(tl.minimum(tl.cdiv(keys, MIN_KEYS), fill), tl.cdiv(keys, LONG_KEYS))
    return tl.minimum(wanted, splits)


@triton.jit(
    do_not_specialize=["table_stride", "splits", "fill"],
    do_not_specialize_on_alignment=["block_table", "seqused_k"],
)
def decode_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    seqused_k,
    out,
    partial,
    partial_lse,
    q_stride,
    table_stride,
    splits,
    fill,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (heads' tile, split, row). A row of one split is finished here; others leave parts (row, head, split)."""
    split, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = tl.load(seqused_k + row)
    used = _splits_used(keys, splits, fill)
    if split >= tl.maximum(used, 1):
        return

    head_tiles: tl.constexpr = (GROUP + BLOCK_H - 1) // BLOCK_H
    kv_head = tl.program_id(0) // head_tiles
    in_group = tl.program_id(0) % head_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * GROUP + in_group
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    present = (in_group < GROUP)[:, None] & (d < HEAD_DIM)
    queries = tl.load(q + row * q_stride + (head * HEAD_DIM)[:, None] + d, present, 0.0)
    tiles = tl.cdiv(keys, BLOCK_N)
    begin = tiles * split // tl.maximum(used, 1)
    result, lse = attend_keys(
        queries,
        tl.zeros([BLOCK_H], tl.int32) + (keys - 1),
        k_cache,
        v_cache,
        kv_head,
        block_table + row * table_stride,
        begin,
        begin,
        tiles * (split + 1) // tl.maximum(used, 1),
        keys,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
    )

    head_row = row * (KV_HEADS * GROUP) + head
    if used <= 1:
        tl.store(out + (head_row * HEAD_DIM)[:, None] + d, result.to(out.dtype.element_ty), present)
    else:
        head_row = head_row * splits + split
        tl.store(partial + (head_row * HEAD_DIM)[:, None] + d, result, present)
        tl.store(partial_lse + head_row, lse, in_group < GROUP)


@triton.jit(do_not_specialize=["splits", "fill"], do_not_specialize_on_alignment=["seqused_k"])
def merge_kernel(partial, partial_lse, seqused_k, out, splits, fill, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr):
    """Program (head, row): its splits' results, weighted by their sums of weights. Rows of one split are done."""
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    used = _splits_used(tl.load(seqused_k + row), splits, fill)
    if used <= 1:
        return

    head_row = row * tl.num_programs(0) + head
    s = tl.arange(0, MAX_SPLITS)
    lse = tl.load(partial_lse + head_row * splits + s, s < used, float("-inf"))
    peak = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - peak), 0)

    # The results' weighted sum, BLOCK_S splits at a time.
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    acc = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for first in range(0, used, BLOCK_S):
        part = head_row * splits + first + tl.arange(0, BLOCK_S)
        mine = first + tl.arange(0, BLOCK_S) < used
        weights = tl.exp2(tl.load(partial_lse + part, mine, float("-inf")) - peak)
        present = mine[:, None] & (d < HEAD_DIM)[None, :]
        acc += tl.sum(weights[:, None] * tl.load(partial + (part * HEAD_DIM)[:, None] + d[None, :], present, 0.0), 0)
    tl.store(out + head_row * HEAD_DIM + d, (acc / total).to(out.dtype.element_ty), d < HEAD_DIM)
