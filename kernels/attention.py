"""Paged attention: the interface every backend has, and the backend of plain torch operations for any device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .norm import rms_norm
from .rope import apply_rope


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of a step stand. Rows are sequences: `num_decodes` rows of one token each, then prompt chunks.

    Tensors are on the step's device; tuples are for the host. T tokens, R rows, B blocks of the longest row.
    """

    num_decodes: int
    slot_mapping: torch.Tensor  # (T,) int64: index of each token's K and V in the pool, block * block_size + offset
    block_table: torch.Tensor  # (R, B) int64; entries past a row's end are 0
    cu_q: torch.Tensor  # (R + 1,) int32: cumulative query tokens
    seqused_k: torch.Tensor  # (R,) int32: tokens in the cache, this step's included
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    block_size: int


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm weights, float32 (head_dim,), of query and key heads, which are normalised before they are rotated."""

    query: torch.Tensor
    key: torch.Tensor
    eps: float


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache, keys and values (blocks, block_size, kv_heads, head_dim) per layer.

    How a block's elements stand inside it is the backend's own affair. Queries of a row sit at the end of its keys.
    Query heads are grouped: head h reads KV head h // (heads / kv_heads).
    """

    name: str
    block_multiple: int
    """Block sizes must be a multiple of this."""
    default_block_size: int
    supports_graph: bool
    has_fused_decoder = False
    """Whether parallel/fused_decoder.py takes this backend's plans and cache."""
    reason = ""
    """Why backend_selector.choose_backend chose it, in one line."""

    def cache_head(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Elements that the pool has for one head's key or value of one token, and their dtype."""
        return head_dim, dtype

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> Any:
        """Host-side preparation, once a step, shared by all layers. Its result is good until the next plan()."""

    @abstractmethod
    def attend(self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: Any) -> torch.Tensor:
        """Attention of queries (T, heads, head_dim) over the cache, which holds this step's tokens too. Same shape."""

    @abstractmethod
    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values (T, kv_heads, head_dim) to the pool, at their indices `slot_mapping` (T,)."""

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: HeadNorms | None,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Rotate a projection's heads, store its keys and values, and return its queries as attend() wants them.

        `qkv` is (T, (heads + 2 kv_heads) * head_dim), the result (T, heads, head_dim). Query and key heads are
        normalised, if there are norms, and rotated by RotaryEmbedding's tables; keys and values go to the pool, at the
        indices `slot_mapping` (T,). `qkv` may be overwritten, and the result may be a view of it.
        """
        kv_heads, head_dim = k_cache.shape[2:]
        all_heads = qkv.shape[1] // head_dim
        heads = qkv.view(-1, all_heads, head_dim)
        q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
        if norms is not None:
            q = rms_norm(q, norms.query, norms.eps, q.dtype)
            k = rms_norm(k, norms.key, norms.eps, k.dtype)
        self.store_kv(apply_rope(k, cos, sin), v, k_cache, v_cache, slot_mapping)
        return apply_rope(q, cos, sin)


@dataclass(frozen=True)
class _DecodeBucket:
    """Decode rows of similar length, padded to the longest of them."""

    rows: torch.Tensor | None  # (b,) int64; None: all decode rows in order
    blocks: torch.Tensor  # (b * blocks,) int64
    mask: torch.Tensor  # (b, 1, 1, keys) bool, True where a key is visible


@dataclass(frozen=True)
class _Chunk:
    """One prompt chunk: its tokens in the batch, its blocks, and the mask if it does not start at position 0."""

    first: int
    last: int
    keys: int
    blocks: torch.Tensor
    mask: torch.Tensor | None


class TorchAttention(AttentionBackend):
    """torch's scaled_dot_product_attention over gathered blocks. On a CPU this is torch's FlashAttention kernel."""

    name = "torch"
    block_multiple = 1
    default_block_size = 16
    supports_graph = False

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values as AttentionBackend.store_kv, by two copies along the pools' flattened positions."""
        k_cache.flatten(0, 1).index_copy_(0, slot_mapping, k)
        v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)

    def plan(self, metadata: AttentionMetadata) -> tuple[list[_DecodeBucket], list[_Chunk], int]:
        """The buckets of the decode rows, the prompt chunks, and the number of decode rows."""
        chunks = []
        first = metadata.num_decodes
        for row in range(metadata.num_decodes, len(metadata.query_lengths)):
            queries, keys = metadata.query_lengths[row], metadata.key_lengths[row]
            blocks = metadata.block_table[row, : -(-keys // metadata.block_size)]
            mask = None
            if queries != keys:
                visible = torch.arange(keys - queries, keys, device=blocks.device).unsqueeze(-1)
                mask = torch.arange(keys, device=blocks.device) <= visible
            chunks.append(_Chunk(first, first + queries, keys, blocks, mask))
            first += queries
        return self._decode_buckets(metadata), chunks, metadata.num_decodes

    def _decode_buckets(self, metadata: AttentionMetadata) -> list[_DecodeBucket]:
        # Rows share a bucket when their block counts round up to the same power of two: at most half of it is padding.
        by_size: dict[int, list[int]] = {}
        for row in range(metadata.num_decodes):
            blocks = -(-metadata.key_lengths[row] // metadata.block_size)
            by_size.setdefault((blocks - 1).bit_length(), []).append(row)

        buckets = []
        for rows in by_size.values():
            count = -(-max(metadata.key_lengths[row] for row in rows) // metadata.block_size)
            index = None if len(by_size) == 1 else torch.tensor(rows, device=metadata.block_table.device)
            table = metadata.block_table[: metadata.num_decodes] if index is None else metadata.block_table[index]
            lengths = metadata.seqused_k[: metadata.num_decodes] if index is None else metadata.seqused_k[index]
            keys = torch.arange(count * metadata.block_size, device=table.device)
            mask = (keys < lengths.unsqueeze(-1)).view(len(rows), 1, 1, -1)
            buckets.append(_DecodeBucket(index, table[:, :count].reshape(-1), mask))
        return buckets

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: tuple[list[_DecodeBucket], list[_Chunk], int],
    ) -> torch.Tensor:
        """Attention as AttentionBackend.attend, one call for each bucket of decode rows and each prompt chunk."""
        buckets, chunks, num_decodes = plan
        kv_heads, head_dim = k_cache.shape[2:]
        out = torch.empty_like(q)

        for bucket in buckets:
            queries = q[:num_decodes] if bucket.rows is None else q[bucket.rows]
            count = queries.shape[0]
            # What is past a row's end may be infinite or NaN, which neither a mask nor a weight of 0 takes away.
            k, v = (
                cache.index_select(0, bucket.blocks)
                .view(count, -1, kv_heads, head_dim)
                .transpose(1, 2)
                .masked_fill_(~bucket.mask.transpose(2, 3), 0)
                for cache in (k_cache, v_cache)
            )
            # The query heads of a group stand where query positions usually do, so each key is read once a group.
            result = scaled_dot_product_attention(
                queries.view(count, kv_heads, -1, head_dim), k, v, attn_mask=bucket.mask
            ).reshape(count, -1, head_dim)
            if bucket.rows is None:
                out[:num_decodes] = result
            else:
                out[bucket.rows] = result

        for chunk in chunks:
            k = k_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.keys]
            v = v_cache.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.keys]
            result = scaled_dot_product_attention(
                q[chunk.first : chunk.last].transpose(0, 1).unsqueeze(0),
                k.nan_to_num(0, 0, 0).transpose(0, 1).unsqueeze(0),
                v.nan_to_num(0, 0, 0).transpose(0, 1).unsqueeze(0),
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                enable_gqa=True,
            )[0].transpose(0, 1)
            out[chunk.first : chunk.last] = result + _seen_nan(k, v, chunk.last - chunk.first, q.shape[1])
        return out


def _seen_nan(k: torch.Tensor, v: torch.Tensor, queries: int, heads: int) -> torch.Tensor:
    """What each of a row's last `queries` tokens has to add to its attention (queries, heads, head_dim): 0, or NaN.

    Keys and values that are infinite or NaN are multiplied as 0, since 0 times them would be NaN for the tokens before
    them, which do not see them. For the tokens that do, the result is not a number.
    """
    poison = (v - v) + (k - k).sum(-1, keepdim=True)
    return poison.cumsum(0)[-queries:].repeat_interleave(heads // v.shape[1], dim=1)
