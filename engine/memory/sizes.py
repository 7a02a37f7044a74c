"""How many bytes weights, KV cache and activations of one rank take, by the model's shape: pure arithmetic."""

from __future__ import annotations

from ...kernels.weight_formats import get_weight_format
from ...parallel.partition import Partition
from ..config import EngineConfig

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one element, by dtype."""
KV_SCALE_BYTES = 4
"""Bytes of the scale of one head's key or value of one token, in a KV cache of int8."""
RUNTIME_BYTES = 2**29
"""What a rank's process takes beside tensors: a CUDA context or libraries, communication buffers, workspaces."""


def weight_bytes(parts: Partition, rank: int, quantization: str, element_bytes: int) -> int:
    """Bytes of a rank's weights, of `element_bytes` each where they are not quantized.

    The layers' matrices are in the quantization's format, and the head is in that format's format for heads. A table of
    embeddings is quantized only where it is also the head. (Every row of a layer counts with hidden_size columns. The
    norms, less than a thousandth, are counted like the layers.)
    """
    d = parts.dimensions
    weight_format = get_weight_format(quantization)
    vocab = len(parts.shares[rank].vocab)
    rows = parts.parameters(rank) // d.hidden_size - vocab * (1 if d.tied_embeddings else 2)

    embeddings = 0 if d.tied_embeddings else vocab * d.hidden_size * element_bytes
    head = weight_format.for_head().nbytes(vocab, d.hidden_size, element_bytes)
    return weight_format.nbytes(rows, d.hidden_size, element_bytes) + head + embeddings


def head_bytes(head_dim: int, kv_cache_dtype: str, element_bytes: int) -> int:
    """Bytes of one head's key, or value, of one token: `kv_cache_dtype` is EngineConfig's."""
    return head_dim + KV_SCALE_BYTES if kv_cache_dtype == "int8" else head_dim * element_bytes


def kv_token_bytes(parts: Partition, rank: int, bytes_of_head: int) -> int:
    """Bytes that a rank keeps for each token, over all layers, if a head's key takes `bytes_of_head`."""
    return parts.kv_elements_per_token(rank) // parts.dimensions.head_dim * bytes_of_head


def activation_bytes(parts: Partition, rank: int, config: EngineConfig, element_bytes: int) -> int:
    """Bytes that a rank needs for one full step and its runtime: a generous estimate.

    For each of max_num_batched_tokens: the float32 residual and its normalised float32 copy, three hidden vectors (a
    block's input, its output, one in the all-reduce), and the larger of attention (q, k, v, the rotated q and k, the
    output) and MLP (gate, up, their product). For each of max_num_seqs: this rank's logits, and three float32 copies
    of them while sampling. And RUNTIME_BYTES. Activations have `element_bytes` each unless stated otherwise.
    """
    d = parts.dimensions
    share = parts.shares[rank]
    attention = 3 * (len(share.query_heads) + len(share.kv_heads)) * d.head_dim
    token = (2 * 4 + 3 * element_bytes) * d.hidden_size + element_bytes * max(attention, 3 * len(share.mlp))
    row = (element_bytes + 3 * 4) * len(share.vocab)
    return config.max_num_batched_tokens * token + config.max_num_seqs * row + RUNTIME_BYTES
