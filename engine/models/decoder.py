"""Qwen2, Qwen3 and Llama: a pre-norm decoder with grouped-query attention and SwiGLU, of parallel layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels.attention import AttentionBackend, AttentionMetadata, HeadNorms
from ...kernels.rope import RotaryEmbedding
from ...parallel.collectives.base import Collectives
from ...parallel.embedding import VocabParallelEmbedding
from ...parallel.fused_decoder import DecoderStack, PackedLayer, Wanted
from ...parallel.linear import (
    ColumnParallelLinear,
    GatedLinear,
    LogitsLinear,
    ReplicatedNorm,
    RowParallelLinear,
    ShardedWeight,
)
from ...parallel.loading.checkpoint import WeightSlice
from ...parallel.partition import RankShard
from ...parallel.residual import Residual
from .forward_batch import ForwardBatch
from .kv_cache import KVCache
from .spec import ModelSpec


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
        return {"dtype": self.dtype, "device": self.device}

    def norm(self, name: str, size: int) -> ReplicatedNorm:
        return ReplicatedNorm(name, size, self.spec.rms_norm_eps, self.dtype, self.device)


@dataclass(frozen=True)
class Step:
    """What the layers share during one forward pass."""

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    attention_plan: Any
    wanted: Wanted | None = None
    """None: all tokens."""


class Attention(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        spec, share, dim = build.spec, build.share, build.spec.head_dim
        query_rows, kv_rows = _features(share.query_heads, dim), _features(share.kv_heads, dim)
        query_size, kv_size = spec.num_query_heads * dim, spec.num_kv_heads * dim
        self.backend, self.heads = build.attention, len(share.query_heads)
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
        if self.q_norm is None or self.k_norm is None:
            return None
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)

    def forward(
        self, norm: ReplicatedNorm, residual: Residual, step: Step, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        place = k_cache, v_cache, step.slots
        q = self.backend.rotate_and_store(self.qkv(norm(residual)), step.cos, step.sin, self.head_norms, *place)
        self.output(self.backend.attend(q, k_cache, v_cache, step.attention_plan).flatten(1), residual)


class MLP(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        spec, columns = build.spec, build.share.mlp
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
        self.down(self.gate_up(norm(residual)), residual)


class DecoderLayer(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.input_norm = build.norm("input_layernorm", build.spec.hidden_size)
        self.attention = Attention(build)
        self.mlp_norm = build.norm("post_attention_layernorm", build.spec.hidden_size)
        self.mlp = MLP(build)

    @property
    def packed(self) -> PackedLayer | None:
        """What DecoderStack needs of it; None if not all of its projections are packed."""
        attention, mlp = self.attention, self.mlp
        qkv, output, gate_up, down = attention.qkv.packed, attention.output.packed, mlp.gate_up.packed, mlp.down.packed
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
        spec, share = build.spec, build.share
        self.spec = spec
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
        self.backend = build.attention
        self._build = build
        self._stack_of: tuple[KVCache, DecoderStack | None] | None = None
        self.rope = RotaryEmbedding(
            head_dim=spec.head_dim,
            max_position=spec.max_position,
            table_length=max_model_len,
            **build.placement,
            **dataclasses.asdict(spec.rope),
        )

    def forward(self, batch: ForwardBatch, cache: KVCache, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states (T, hidden_size) after the final norm, or only those of the tokens `wanted`, int64 (R,).

        Writes the keys and values of all to `cache`.
        """
        halves = range(2 * len(self.layers))
        embedded = Residual(self.embedding(batch.token_ids))
        hidden: torch.Tensor = self.norm(self.run_halves(halves, embedded, self.step(batch, wanted), cache))
        return hidden

    def step(self, batch: ForwardBatch, wanted: torch.Tensor | None) -> Step:
        """What the layers share, if only the tokens `wanted` are."""
        cos, sin = self.rope(batch.positions, batch.lengths)
        attention, plan = batch.attention, self.backend.plan(batch.attention)
        if wanted is None or len(wanted) == len(batch.token_ids):
            return Step(cos, sin, attention.slots, plan)
        metadata = None
        if self.backend.has_stack:
            rows = torch.searchsorted(attention.cu_q[1:], wanted.int(), right=True)
            lengths = batch.positions[wanted].int() + 1
            metadata = AttentionMetadata(
                num_decodes=len(wanted),
                slots=attention.slots[wanted],
                block_table=attention.block_table[rows],
                cu_q=torch.arange(len(wanted) + 1, dtype=torch.int32),
                seqused_k=lengths,
                query_lengths=(1,) * len(wanted),
                key_lengths=tuple(lengths.tolist()),
                block_size=attention.block_size,
            )
        return Step(
            cos, sin, attention.slots, plan, Wanted(wanted, metadata, self.backend.plan(metadata) if metadata else None)
        )

    def run_halves(self, halves: range, residual: Residual, step: Step, cache: KVCache) -> Residual:
        """Add to `residual` what these halves make of it: of layer i attention is 2 i, and the MLP 2 i + 1.

        Returns it, or after the last layer's attention only what step.wanted says: others have done their part.
        """
        stack = self._stack(cache)
        if stack is not None:
            place = step.cos, step.sin, step.slots, step.attention_plan
            return Residual(stack.run(halves, residual.settled(), *place, step.wanted))
        for half in halves:
            layer = self.layers[half // 2]
            assert isinstance(layer, DecoderLayer)
            if half % 2 == 0:
                layer.attention(layer.input_norm, residual, step, cache.keys[half // 2], cache.values[half // 2])
                if step.wanted is not None and layer is self.layers[-1]:
                    residual = residual.select(step.wanted.tokens)
            elif len(residual.total):
                layer.mlp(layer.mlp_norm, residual)
        return residual

    def _stack(self, cache: KVCache) -> DecoderStack | None:
        """All layers over this cache, if they can run in one piece."""
        if self._stack_of is None or self._stack_of[0] is not cache:
            self._stack_of = cache, self._make_stack(cache)
        return self._stack_of[1]

    def _make_stack(self, cache: KVCache) -> DecoderStack | None:
        packed = [layer.packed for layer in self.layers if isinstance(layer, DecoderLayer)]
        layers = [layer for layer in packed if layer is not None]
        if not self.backend.has_stack or len(layers) < len(packed):
            return None
        build = self._build
        return DecoderStack(
            layers,
            cache.keys,
            cache.values,
            heads=len(build.share.query_heads),
            hidden=self.spec.hidden_size,
            eps=self.spec.rms_norm_eps,
            dtype=build.dtype,
            collectives=build.collectives,
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, hidden_size) -> float32 (R, vocabulary rows of this rank)."""
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
        """Whether a tensor of the checkpoint needs no place: old rotary buffers, and the copy of a tied head."""
        return name.endswith("rotary_emb.inv_freq") or (self.head is None and name == "lm_head.weight")


def _features(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)
