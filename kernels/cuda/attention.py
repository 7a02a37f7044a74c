"""Paged attention on NVIDIA GPUs: a backend of two kernels, one for rows of one token and one for prompt chunks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..attention import AttentionBackend, AttentionMetadata, HeadNorms

__all__ = ["AttentionKernel", "CudaAttention", "Rows", "TritonDecode", "TritonPrefill"]


TRITON_BLOCK_SIZE = 128
"""The keys that prefill takes at a time: they then lie in one block, looked up once and copied as a whole."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, decodes or prompt chunks, for their kernel. Tensors are int32, on the device."""

    block_table: torch.Tensor  # (R, B)
    cu_q: torch.Tensor  # (R + 1,): cumulative query tokens, from 0
    seqused_k: torch.Tensor  # (R,): tokens in the cache, this step's included
    max_q: int  # the longest row's query tokens; 1 for decodes
    max_k: int  # an upper bound of seqused_k


class AttentionKernel(ABC):
    """One way to compute rows of one kind."""

    name: str
    block_multiple: int
    """Block sizes must be a multiple of this."""
    default_block_size: int

    @abstractmethod
    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: Rows, out: torch.Tensor
    ) -> None:
        """Causal attention of the rows' queries (T, heads, head_dim) into `out`, which has their shape.

        Pools are (blocks, block_size, kv_heads, head_dim). Queries of a row sit at the end of its keys.
        """


class TritonDecode(AttentionKernel):
    """Split-KV decoding in Triton (decode.py), for head sizes up to 256. Block sizes must be powers of two."""

    name = "triton"
    block_multiple = 16
    default_block_size = TRITON_BLOCK_SIZE

    def __init__(self) -> None:
        from .decode import decode_attention

        self._attend = decode_attention

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: Rows, out: torch.Tensor
    ) -> None:
        """Raises ValueError for a block size or a head size that the kernel does not take."""
        self._attend(q, k_cache, v_cache, rows.block_table, rows.seqused_k, out, rows.max_k)


class TritonPrefill(AttentionKernel):
    """FlashAttention-2 in Triton (prefill.py), for head sizes up to 256. Block sizes must be powers of two."""

    name = "triton"
    block_multiple = 16
    default_block_size = TRITON_BLOCK_SIZE

    def __init__(self) -> None:
        from .prefill import prefill_attention

        self._attend = prefill_attention

    def __call__(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, rows: Rows, out: torch.Tensor
    ) -> None:
        """Raises ValueError for a block size or a head size that the kernel does not take."""
        self._attend(q, k_cache, v_cache, rows.block_table, rows.cu_q, rows.seqused_k, out, rows.max_q)


class CudaAttention(AttentionBackend):
    """`decode` computes rows of one token, `prefill` prompt chunks. A CUDA graph may capture a step of decodes."""

    supports_graph = True

    def __init__(self, decode: AttentionKernel, prefill: AttentionKernel) -> None:
        self._decode = decode
        self._prefill = prefill

        same = decode.name == prefill.name
        self.name = decode.name if same else f"{prefill.name} for prompts, {decode.name} for decodes"
        self.block_multiple = math.lcm(decode.block_multiple, prefill.block_multiple)
        self.default_block_size = max(decode.default_block_size, prefill.default_block_size)

    def plan(self, metadata: AttentionMetadata) -> tuple[Rows | None, Rows | None]:
        """The step's decodes and prompt chunks, None where it has none.

        The host reads only the shapes of the decodes: a captured graph replays them with other lengths.
        """
        first = metadata.num_decodes
        table = metadata.block_table.to(torch.int32)
        cu_q = metadata.cu_q
        seqused_k = metadata.seqused_k

        decodes = chunks = None
        if first:
            capacity = table.shape[1] * metadata.block_size
            decodes = Rows(table[:first], cu_q[: first + 1], seqused_k[:first], 1, capacity)
        if first < len(seqused_k):
            longest = max(metadata.query_lengths[first:]), max(metadata.key_lengths[first:])
            chunks = Rows(table[first:], cu_q[first:] - first, seqused_k[first:], *longest)
        return decodes, chunks

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: tuple[Rows | None, Rows | None],
    ) -> torch.Tensor:
        """Attention as AttentionBackend.attend: decodes come first, each kind goes to its own kernel."""
        decodes, chunks = plan
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        first = 0 if decodes is None else len(decodes.seqused_k)
        if decodes is not None:
            self._decode(q[:first], k_cache, v_cache, decodes, out[:first])
        if chunks is not None:
            self._prefill(q[first:], k_cache, v_cache, chunks, out[first:])
        return out

    def store_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values as AttentionBackend.store_kv, in Triton (rope.py)."""
        from .rope import store_kv

        store_kv(k, v, k_cache, v_cache, slot_mapping)

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
        """As AttentionBackend.rotate_and_store, in one pass in Triton (rope.py)."""
        from .rope import rotate_and_store

        return rotate_and_store(qkv, cos, sin, norms, k_cache, v_cache, slot_mapping)
