"""The common part of the Triton kernels of paged attention: the walk over a row's keys, and the checks before a launch.

A tile is BLOCK_N keys of one KV head. Pools are (blocks, block_size, kv_heads, head_dim), contiguous. They may exceed
2^31 elements, so offsets in them are 64-bit numbers. A pool is given as a pointer, or as a tensor descriptor for the
GPU's unit that copies whole tiles to shared memory (TMA, since sm_90): see tile_descriptors.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["attend_keys", "multiprocessors", "shape_constants", "tile_descriptors"]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
MIN_BLOCK_SIZE = 16
MAX_HEAD_DIM = 256


@triton.jit
def attend_keys(
    queries,
    last_seen,
    k_cache,
    v_cache,
    kv_head,
    table,
    begin,
    full,
    end,
    keys,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr = False,
):
    """Attention of queries [M, D] over tiles `begin` to `end`: (result [M, D], log2 of the sum of weights [M]).

    Both are float32. D is HEAD_DIM or the next power of two, with zeros. `table` stands at the row, which has `keys`
    keys. A query sees positions up to its last_seen [M]: all of those before tile `full`, and one at least of tile
    `begin`. `CAUSAL`: some see fewer keys than others. Without tiles the result is zero.

    What a query does not see changes no bit of its result, were it infinite or NaN. A query that sees such a key or
    value gets a result that is not finite.
    """
    M: tl.constexpr = queries.shape[0]
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, queries.shape[1]], tl.float32)

    # 0 times what is infinite or NaN is NaN. So the row ends before the first such value of the tiles that not all
    # queries see, and the queries that do see it become NaN.
    if CAUSAL:
        keys = _first_poisoned(v_cache, kv_head, table, full, end, keys, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        # Of a number the interpreter makes no bfloat16, of a tensor it does.
        nan = tl.full([1, 1], float("nan"), tl.float32).to(queries.dtype)
        queries = tl.where((last_seen >= keys)[:, None], nan, queries)

    # A tile's blocks are looked up while the tile before it is computed, so that its loads need not wait for them.
    blocks = _look_up(table, begin * BLOCK_N, keys, BLOCK_SIZE, BLOCK_N)
    for tile in range(begin, full):
        first = tile * BLOCK_N
        k = _load_tile(k_cache, kv_head, blocks, first, keys, False, False, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        v = _load_tile(v_cache, kv_head, blocks, first, keys, False, True, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        blocks = _look_up(table, first + BLOCK_N, keys, BLOCK_SIZE, BLOCK_N)
        peak, total, acc = _attend_tile(queries, k, v, first, last_seen, peak, total, acc, False, HEAD_DIM)

    # The last tiles, of which some keys are not visible to all queries, or are past the row's end.
    for tile in range(full, end):
        first = tile * BLOCK_N
        k = _load_tile(k_cache, kv_head, blocks, first, keys, True, False, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        v = _load_tile(v_cache, kv_head, blocks, first, keys, True, True, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        blocks = _look_up(table, first + BLOCK_N, keys, BLOCK_SIZE, BLOCK_N)
        peak, total, acc = _attend_tile(queries, k, v, first, last_seen, peak, total, acc, True, HEAD_DIM)

    total = tl.where(total == 0.0, 1.0, total)
    return acc / total[:, None], peak + tl.log2(total)


@triton.jit
def _first_poisoned(
    v_cache,
    kv_head,
    table,
    full,
    end,
    keys,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first position of tiles `full` to `end` whose value is infinite or NaN; `keys` if there is none.

    A pass of its own: within the walk over the keys, where registers are scarce, to replace such values made prefill
    of heads of 128 spill up to 124 bytes a thread on sm_80.
    """
    found = keys
    for tile in range(full, end):
        first = tile * BLOCK_N
        blocks = _look_up(table, first, keys, BLOCK_SIZE, BLOCK_N)
        v = _load_tile(v_cache, kv_head, blocks, first, keys, True, True, KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N)
        finite = tl.min((tl.abs(v.to(tl.float32)) < float("inf")).to(tl.int32), 1)
        n = first + tl.arange(0, BLOCK_N)
        found = tl.minimum(found, tl.min(tl.where(finite == 1, keys, n), 0))
    return found


@triton.jit
def _look_up(table, first, keys, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of each position of a tile; one number if the tile lies in one block. 0 past the row's end."""
    if BLOCK_N <= BLOCK_SIZE:
        blocks = tl.load(table + first // BLOCK_SIZE, first < keys, 0)
    else:
        n = first + tl.arange(0, BLOCK_N)
        blocks = tl.load(table + n // BLOCK_SIZE, n < keys, 0)
    return blocks


@triton.jit
def _load_tile(
    pool,
    kv_head,
    blocks,
    first,
    end,
    MASKED: tl.constexpr,
    VALUES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys or values [BLOCK_N, D] of positions first to first + BLOCK_N, whose blocks are known.

    `MASKED`: some may be from `end` on. These are zero, as what a block's last owner left there may be NaN. (Of keys
    that come as a whole tile it is enough that nobody sees their scores.)
    """
    n = first + tl.arange(0, BLOCK_N)
    inside = n < end
    column = kv_head * HEAD_DIM

    if isinstance(pool, tl.tensor_descriptor):
        tile = pool.load([blocks * BLOCK_SIZE + first % BLOCK_SIZE, column])
        if MASKED and VALUES:
            tile = tl.where(inside[:, None], tile, 0.0)
    else:
        d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
        entries = blocks.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
        offsets = (entries * (KV_HEADS * HEAD_DIM))[:, None] + d
        pool += column
        if d.shape[1] != HEAD_DIM:
            tile = tl.load(pool + offsets, inside[:, None] & (d < HEAD_DIM), 0.0)
        elif MASKED:
            tile = tl.load(pool + offsets, inside[:, None], 0.0)
        else:
            tile = tl.load(pool + offsets)
    return tile


@triton.jit
def _attend_tile(queries, k, v, first, last_seen, peak, total, acc, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A step of the online softmax (Milakov and Gimelshein, arXiv:1805.02867) in powers of two.

    peak and total [M] are the largest score and the sum of weights so far, acc [M, D] the weighted values. Scores are
    scaled as they are subtracted: a multiplication of each alone would take as long as another exponential.
    """
    scale: tl.constexpr = LOG2_E * HEAD_DIM**-0.5
    scores = _dot(queries, tl.trans(k), tl.zeros([queries.shape[0], k.shape[0]], tl.float32))
    if MASKED:
        visible = (first + tl.arange(0, k.shape[0]))[None, :] <= last_seen[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    correction = tl.exp2(peak - new_peak)
    acc = _dot(weights.to(v.dtype), v, acc * correction[:, None])
    return new_peak, total * correction + tl.sum(weights, 1), acc


@triton.jit
def _dot(a, b, acc):
    """acc + a @ b in float32. The interpreter's products of bfloat16 are wrong, so it multiplies float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def tile_descriptors(k_cache: torch.Tensor, v_cache: torch.Tensor, block_n: int) -> list[TensorDescriptor]:
    """Describe pools (blocks, block_size, kv_heads, head_dim) as rows of a token's heads: a tile takes one head's part.

    A tile lies in one block: block_n is at most block_size. head_dim is a power of two.
    """
    blocks, block_size, kv_heads, head_dim = k_cache.shape
    shape = [blocks * block_size, kv_heads * head_dim]
    strides = [kv_heads * head_dim, 1]
    return [TensorDescriptor(pool, shape, strides, [block_n, head_dim]) for pool in (k_cache, v_cache)]


def shape_constants(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> dict[str, int]:
    """The kernels' constants for these queries (T, heads, head_dim) and pools.

    Raises ValueError for a block size, a head size or a layout that the kernels do not take.
    """
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(
            f"block_size={block_size} is not a power of two of at least {MIN_BLOCK_SIZE}, which the Triton attention "
            "kernels need: set block_size to one, or attention=torch"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"heads of {head_dim} elements are larger than {MAX_HEAD_DIM}, the most that the Triton attention kernels "
            "take: set attention=torch"
        )

    if q.shape != out.shape or q.shape[1] % kv_heads or q.shape[2] != head_dim or v_cache.shape != k_cache.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k_cache, v_cache, out))
        raise ValueError(f"queries, keys, values and output do not fit each other: {shapes}")
    if q.stride()[1:] != (head_dim, 1) or not all(x.is_contiguous() for x in (k_cache, v_cache, out)):
        raise ValueError("a token's queries must be adjacent; keys, values and output must be contiguous")
    return {"KV_HEADS": kv_heads, "GROUP": q.shape[1] // kv_heads, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of a GPU's multiprocessors; 1 for a CPU, where the interpreter runs one program after another."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
