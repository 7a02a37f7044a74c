"""Attention of prompt chunks over a paged cache: FlashAttention-2 (Dao, arXiv:2307.08691) in Triton.

Rows have any number of queries, which sit at the end of the row's keys. A tile of queries takes the query heads of a KV
head together, so that keys and values are read once a group: its BLOCK_M lines are (query, head) pairs in order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .paged import INTERPRETED, attend_keys, shape_constants, tile_descriptors

__all__ = ["prefill_attention"]


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_q: torch.Tensor,
    seqused_k: torch.Tensor,
    out: torch.Tensor,
    max_q: int,
    tma: bool | None = None,
) -> None:
    """Causal attention of queries (T, heads, head_dim) over pools (blocks, block_size, kv_heads, head_dim) into `out`.

    Row r's queries are cu_q[r] to cu_q[r + 1], max_q at most; they are the last of its seqused_k[r] keys, which stand
    in the blocks block_table[r]. These are int32, the table is (R, B). The others have one dtype, bfloat16, float16 or
    float32. `tma` copies whole tiles at once, where tma_fits(); by default on GPUs that gain by it.

    Raises ValueError for a block size, a head size or a layout that the kernel does not take.
    """
    constants = shape_constants(q, k_cache, v_cache, out)
    head_dim = q.shape[2]
    element_size = q.element_size()

    if tma is None:
        tma = gains_by_tma(q.device)
    tma = tma and tma_fits(head_dim, element_size, constants["BLOCK_SIZE"])

    options = prefill_options(head_dim, element_size, tma)
    tiles = triton.cdiv(max_q * constants["GROUP"], options["BLOCK_M"])
    pools = tile_descriptors(k_cache, v_cache, options["BLOCK_N"]) if tma else (k_cache, v_cache)
    prefill_kernel[(constants["KV_HEADS"], tiles, len(seqused_k))](
        q,
        *pools,
        block_table,
        cu_q,
        seqused_k,
        out,
        q.stride(0),
        block_table.stride(0),
        **constants,
        **options,
    )


TMA_BLOCK_N = 128


def tma_fits(head_dim: int, element_size: int, block_size: int) -> bool:
    """Whether tiles can be copied as a whole: each lies in one block, and three of keys and values fit the GPU."""
    return block_size % TMA_BLOCK_N == 0 and head_dim in (64, 128) and element_size == 2


@functools.cache
def gains_by_tma(device: torch.device) -> bool:
    """Whether the GPU's unit that copies tiles (TMA) makes prefill faster.

    It does on sm_90. Later GPUs have one too, but were not measured.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def prefill_options(head_dim: int, element_size: int, tma: bool) -> dict[str, int]:
    """BLOCK_M, BLOCK_N and the launch options, which fit the registers and the shared memory of GPUs since sm_80.

    With `tma` they fit sm_90. float32 takes no tensor cores but many registers; it is for comparisons. The
    interpreter has registers enough.
    """
    if tma:
        return {"BLOCK_M": 128, "BLOCK_N": TMA_BLOCK_N, "num_warps": 8, "num_stages": 3}
    if element_size > 2 and not INTERPRETED.value:
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_table", "cu_q", "seqused_k"],
)
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    cu_q,
    seqused_k,
    out,
    q_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (KV head, queries' tile, row), the tiles with most keys first. Programs past the row's end do nothing."""
    kv_head = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(cu_q + row).to(tl.int64)
    count = (tl.load(cu_q + row + 1) - start).to(tl.int32)
    line = (tl.cdiv(count * GROUP, BLOCK_M) - 1 - tl.program_id(1)) * BLOCK_M
    if line < 0:
        return

    keys = tl.load(seqused_k + row)
    first = line // GROUP
    lines = line + tl.arange(0, BLOCK_M)
    query = lines // GROUP - first
    head = kv_head * GROUP + lines % GROUP
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    present = (lines < count * GROUP)[:, None] & (d < HEAD_DIM)
    offsets = (query * q_stride + head * HEAD_DIM)[:, None] + d
    queries = tl.load(q + (start + first) * q_stride + offsets, present, 0.0)

    # Tiles before the first query's position are visible to all queries: they need no mask.
    seen = keys - count + first  # by the first query: the positions up to this one
    result, _ = attend_keys(
        queries,
        seen + query,
        k_cache,
        v_cache,
        kv_head,
        block_table + row * table_stride,
        0,
        (seen + 1) // BLOCK_N,
        tl.cdiv(tl.minimum(seen + (line + BLOCK_M - 1) // GROUP - first + 1, keys), BLOCK_N),
        keys,
        KV_HEADS,
        HEAD_DIM,
        BLOCK_SIZE,
        BLOCK_N,
        CAUSAL=True,
    )

    offsets = ((query * (KV_HEADS * GROUP) + head) * HEAD_DIM)[:, None] + d
    tl.store(out + (start + first) * (KV_HEADS * GROUP * HEAD_DIM) + offsets, result.to(out.dtype.element_ty), present)
