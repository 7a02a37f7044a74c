"""Qwen2, Qwen3 and Llama: a pre-norm decoder with grouped-query attention and SwiGLU, of parallel layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels.attention import AttentionBackend, AttentionMetadata, HeadNorms
from ...kernels.rope import RotaryEmbedding
from ...parallel.collectives.base import Collectives
from ...parallel.fused_decoder import FusedDecoder, LogitsIndices, PackedLayer
from ...parallel.layers import (
    ColumnParallelLinear,
    GatedLinear,
    LogitsLinear,
    ReplicatedNorm,
    Residual,
    RowParallelLinear,
    ShardedWeight,
    VocabParallelEmbedding,
)
from ...parallel.loading.checkpoint import WeightSlice
from ...parallel.partition import RankShard
from .forward_batch import ForwardBatch
from .kv_cache import KVCache
from .spec import ModelSpec

Trace = Callable[[str], None]
"""Called with the name of each part of a forward pass when it is done: embedding, each layer's attention, mlp; norm."""


@dataclass(frozen=True)
class Build:
    """What every layer of one rank's model is built from."""

    spec: ModelSpec
    share: RankShard
    collectives: Collectives
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device

    @property
    def placement(self) -> dict[str, Any]:
        """Keyword arguments of every layer: dtype and device."""
        return {"dtype": self.dtype, "device": self.device}

    def norm(self, name: str, size: int) -> ReplicatedNorm:
        """Make an RMS norm over `size` elements, named `name` in the checkpoint."""
        return ReplicatedNorm(name, size, self.spec.rms_norm_eps, self.dtype, self.device)


@dataclass(frozen=True)
class Step:
    """What the layers share during one forward pass."""

    cos: torch.Tensor
    sin: torch.Tensor
    slot_mapping: torch.Tensor
    attention_plan: Any
    logits_indices: LogitsIndices | None = None
    """None: all tokens."""
    trace: Trace | None = None


class Attention(nn.Module):
    """Grouped-query attention of this rank's heads, from the residual stream through a norm, and back into it."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec = build.spec
        share = build.share
        dim = build.spec.head_dim
        query_rows = _features(share.query_heads, dim)
        kv_rows = _features(share.kv_heads, dim)
        query_size = spec.num_query_heads * dim
        kv_size = spec.num_kv_heads * dim
        self.backend = build.attention
        self.heads = len(share.query_heads)

        parts = [
            ShardedWeight("q_proj", query_rows, query_size),
            ShardedWeight("k_proj", kv_rows, kv_size),
            ShardedWeight("v_proj", kv_rows, kv_size),
        ]
        self.qkv = ColumnParallelLinear(spec.hidden_size, parts, bias=spec.qkv_bias, **build.placement)
        self.output = RowParallelLinear(
            "o_proj",
            query_rows,
            query_size,
            spec.hidden_size,
            bias=spec.output_bias,
            collectives=build.collectives,
            **build.placement,
        )

        self.q_norm = build.norm("q_norm", dim) if spec.qk_norm else None
        self.k_norm = build.norm("k_norm", dim) if spec.qk_norm else None

    @property
    def head_norms(self) -> HeadNorms | None:
        """The norms of each query and key head; None for a model without them."""
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def forward(
        self, norm: ReplicatedNorm, residual: Residual, step: Step, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        """Add the attention of the normed stream to `residual` (T, hidden_size); writes keys and values to the caches.

        The caches are (blocks, block_size, kv_heads, width of a head).
        """
        q = self.backend.rotate_and_store(
            self.qkv(norm(residual)), step.cos, step.sin, self.head_norms, k_cache, v_cache, step.slot_mapping
        )
        self.output(self.backend.attend(q, k_cache, v_cache, step.attention_plan).flatten(1), residual)


class MLP(nn.Module):
    """SwiGLU of this rank's columns, from the residual stream through a norm, and back into it."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        spec = build.spec
        columns = build.share.mlp
        parts = [ShardedWeight(name, columns, spec.intermediate_size) for name in ("gate_proj", "up_proj")]
        self.gate_up = GatedLinear(spec.hidden_size, parts, bias=spec.mlp_bias, **build.placement)
        self.down = RowParallelLinear(
            "down_proj",
            columns,
            spec.intermediate_size,
            spec.hidden_size,
            bias=spec.mlp_bias,
            collectives=build.collectives,
            **build.placement,
        )

    def forward(self, norm: ReplicatedNorm, residual: Residual) -> None:
        """Add the MLP of the normed stream to `residual` (T, hidden_size)."""
        self.down(self.gate_up(norm(residual)), residual)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind its norm. Both add to the residual stream."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.input_norm = build.norm("input_layernorm", build.spec.hidden_size)
        self.attention = Attention(build)
        self.mlp_norm = build.norm("post_attention_layernorm", build.spec.hidden_size)
        self.mlp = MLP(build)

    def forward(
        self,
        residual: Residual,
        step: Step,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        selected: torch.Tensor | None = None,
    ) -> Residual:
        """Add attention and MLP to `residual` (T, hidden_size), and write the tokens' keys and values to the caches.

        Returns it; or, with `selected`, int64 (R,), the stream of these tokens, to which alone the MLP is added.
        """
        self.attention(self.input_norm, residual, step, k_cache, v_cache)
        if selected is not None:
            residual = residual.select(selected)
        if step.trace is not None:
            step.trace("attention")

        if len(residual.total):
            self.mlp(self.mlp_norm, residual)
        if step.trace is not None:
            step.trace("mlp")
        return residual

    @property
    def packed(self) -> PackedLayer | None:
        """What FusedDecoder needs of this layer; None if not all of its projections are packed."""
        attention = self.attention
        mlp = self.mlp
        qkv = attention.qkv.packed
        output = attention.output.packed
        gate_up = mlp.gate_up.packed
        down = mlp.down.packed
        if qkv is None or output is None or gate_up is None or down is None:
            return None

        return PackedLayer(
            self.input_norm.weight,
            (qkv, attention.qkv.bias),
            attention.head_norms,
            (output, attention.output.bias),
            self.mlp_norm.weight,
            (gate_up, mlp.gate_up.bias),
            (down, mlp.down.bias),
        )

    def weight_slices(self, prefix: str) -> Iterator[WeightSlice]:
        """What this rank reads of the layer from a checkpoint, whose names for it begin with `prefix`."""
        yield from self.input_norm.weight_slices(prefix)
        for name, block in (("self_attn", self.attention), ("mlp", self.mlp)):
            for layer in block.children():
                assert isinstance(layer, ColumnParallelLinear | RowParallelLinear | ReplicatedNorm)
                yield from layer.weight_slices(f"{prefix}{name}.")
        yield from self.mlp_norm.weight_slices(prefix)


class CausalLM(nn.Module):
    """One rank's part of a decoder language model; weights are uninitialised until its weight_slices are filled."""

    def __init__(self, build: Build, max_model_len: int) -> None:
        super().__init__()
        spec = build.spec
        share = build.share
        self.spec = spec
        self.backend = build.attention
        self._build = build
        self._fused_decoder_of: tuple[KVCache, FusedDecoder | None] | None = None

        self.embedding = VocabParallelEmbedding(
            "embed_tokens",
            share.vocab,
            spec.vocab_size,
            spec.hidden_size,
            collectives=build.collectives,
            tied=spec.tied_embeddings,
            **build.placement,
        )
        self.layers = nn.ModuleList(DecoderLayer(build) for _ in range(spec.num_layers))
        self.norm = build.norm("norm", spec.hidden_size)
        head = ShardedWeight("lm_head", share.vocab, spec.vocab_size)
        self.head = None if spec.tied_embeddings else LogitsLinear(spec.hidden_size, head, **build.placement)
        self.rope = RotaryEmbedding(
            head_dim=spec.head_dim,
            max_position=spec.max_position,
            table_length=max_model_len,
            **build.placement,
            **dataclasses.asdict(spec.rope),
        )

    def forward(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        logits_indices: torch.Tensor | None = None,
        trace: Trace | None = None,
    ) -> torch.Tensor:
        """Hidden states (T, hidden_size) after the final norm, or only of the tokens `logits_indices`, int64 (R,).

        Writes the keys and values of all tokens to `cache`. With a `trace` the layers' sublayers run one by one, even
        where they would be one call; the result has the same bits.
        """
        residual = Residual(self.embedding(batch.token_ids))
        step = self.step(batch, logits_indices, trace)
        if trace is not None:
            trace("embedding")

        fused_decoder = self._fused_decoder(cache)
        if fused_decoder is not None:
            hidden = self._run_fused(fused_decoder, residual, step)
        else:
            hidden = self.norm(self._run_layers(residual, step, cache))
        if trace is not None:
            trace("norm")
        return hidden

    def step(self, batch: ForwardBatch, logits_indices: torch.Tensor | None, trace: Trace | None = None) -> Step:
        """What the layers share in one forward pass of `batch`, as forward() takes it."""
        cos, sin = self.rope(batch.positions, batch.lengths)

        attention = batch.attention
        plan = self.backend.plan(batch.attention)
        chosen = None
        if logits_indices is not None and len(logits_indices) < len(batch.token_ids):
            chosen = self._logits_indices(batch, logits_indices)
        return Step(cos, sin, attention.slot_mapping, plan, chosen, trace)

    def _logits_indices(self, batch: ForwardBatch, tokens: torch.Tensor) -> LogitsIndices:
        """These tokens of the batch; where all layers are one call, also their attention, each token as its own row."""
        if not self.backend.has_fused_decoder:
            return LogitsIndices(tokens, None, None)

        attention = batch.attention
        rows = torch.searchsorted(attention.cu_q[1:], tokens.int(), right=True)
        lengths = batch.positions[tokens].int() + 1
        metadata = AttentionMetadata(
            num_decodes=len(tokens),
            slot_mapping=attention.slot_mapping[tokens],
            block_table=attention.block_table[rows],
            cu_q=torch.arange(len(tokens) + 1, dtype=torch.int32),
            seqused_k=lengths,
            query_lengths=(1,) * len(tokens),
            key_lengths=tuple(lengths.tolist()),
            block_size=attention.block_size,
        )
        return LogitsIndices(tokens, metadata, self.backend.plan(metadata))

    def _run_layers(self, residual: Residual, step: Step, cache: KVCache) -> Residual:
        """The residual stream after all layers; after the last one's attention only of step.logits_indices."""
        last = self.layers[-1]
        selected = None if step.logits_indices is None else step.logits_indices.tokens
        for layer, k_cache, v_cache in zip(self.layers, cache.keys, cache.values, strict=True):
            residual = layer(residual, step, k_cache, v_cache, selected if layer is last else None)
        return residual

    def _run_fused(self, fused_decoder: FusedDecoder, residual: Residual, step: Step) -> torch.Tensor:
        """What _run_layers() and the norm do, in one call."""
        return fused_decoder.run(
            residual.materialize(),
            step.cos,
            step.sin,
            step.slot_mapping,
            step.attention_plan,
            step.logits_indices,
            step.trace,
        )

    def _fused_decoder(self, cache: KVCache) -> FusedDecoder | None:
        """All layers over this cache, if they can run in one piece."""
        if self._fused_decoder_of is None or self._fused_decoder_of[0] is not cache:
            self._fused_decoder_of = cache, self._make_fused_decoder(cache)
        return self._fused_decoder_of[1]

    def _make_fused_decoder(self, cache: KVCache) -> FusedDecoder | None:
        packed = [layer.packed for layer in self.layers if isinstance(layer, DecoderLayer)]
        layers = [layer for layer in packed if layer is not None]
        if not self.backend.has_fused_decoder or len(layers) < len(packed):
            return None

        build = self._build
        return FusedDecoder(
            layers,
            cache.keys,
            cache.values,
            last_norm=self.norm.weight,
            heads=len(build.share.query_heads),
            hidden=self.spec.hidden_size,
            eps=self.spec.rms_norm_eps,
            dtype=build.dtype,
            collectives=build.collectives,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states: (R, hidden_size) -> float32 (R, vocabulary rows of this rank)."""
        return (self.embedding if self.head is None else self.head).multiply_float(hidden)

    def weight_slices(self) -> Iterator[WeightSlice]:
        """Everything this rank reads from a checkpoint, in the order of the forward pass."""
        yield from self.embedding.weight_slices("model.")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_slices(f"model.layers.{i}.")
        yield from self.norm.weight_slices("model.")
        if self.head is not None:
            yield from self.head.weight_slices("")

    def may_be_left_over(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is not needed: old rotary buffers, and the copy of a tied head."""
        return name.endswith("rotary_emb.inv_freq") or (self.head is None and name == "lm_head.weight")


def _features(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
