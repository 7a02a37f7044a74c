"""Qwen2, Qwen3 and Llama: a pre-norm decoder with grouped-query attention and SwiGLU, of parallel layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...kernels.attention import AttentionBackend, HeadNorms
from ...kernels.blocks import attention_block, mlp_block
from ...kernels.rope import RotaryEmbedding
from ...parallel.checkpoint import WeightSlice
from ...parallel.collectives.base import Collectives
from ...parallel.embedding import VocabParallelEmbedding
from ...parallel.linear import (
    ColumnParallelLinear,
    GatedLinear,
    LogitsLinear,
    Part,
    ReplicatedNorm,
    RowParallelLinear,
)
from ...parallel.partition import RankShare
from ...parallel.residual import Residual
from ..batch import ForwardBatch
from ..kv_cache import KVCache
from .spec import ModelSpec


@dataclass(frozen=True)
class Build:
    """What every layer of one rank's model is built from."""

    spec: ModelSpec
    share: RankShare
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


class Attention(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        spec, share, dim = build.spec, build.share, build.spec.head_dim
        query_rows, kv_rows = _features(share.query_heads, dim), _features(share.kv_heads, dim)
        query_size, kv_size = spec.num_query_heads * dim, spec.num_kv_heads * dim
        self.backend, self.heads = build.attention, len(share.query_heads)
        parts = [
            Part("q_proj", query_rows, query_size),
            Part("k_proj", kv_rows, kv_size),
            Part("v_proj", kv_rows, kv_size),
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

    def forward(
        self, norm: ReplicatedNorm, residual: Residual, step: Step, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> None:
        head_norms = None
        if self.q_norm is not None and self.k_norm is not None:
            head_norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        place = k_cache, v_cache, step.slots
        if self.backend.has_block and self.qkv.packed is not None and self.output.packed is not None:
            total = residual.settled()
            out = self.output.partial(total)
            attention_block(
                total,
                norm.weight,
                norm.eps,
                (self.qkv.packed, self.qkv.bias),
                (self.output.packed, self.output.own_bias),
                head_norms,
                self.heads,
                step.cos,
                step.sin,
                *place,
                step.attention_plan,
                out,
            )
            self.output.reduce(out, total)
            return
        q = self.backend.rotate_and_store(self.qkv(norm(residual)), step.cos, step.sin, head_norms, *place)
        self.output(self.backend.attend(q, k_cache, v_cache, step.attention_plan).flatten(1), residual)


class MLP(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        spec, columns = build.spec, build.share.mlp
        parts = [Part(name, columns, spec.intermediate_size) for name in ("gate_proj", "up_proj")]
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
        gate_up, down = self.gate_up, self.down
        if gate_up.packed is not None and down.packed is not None:
            total = residual.settled()
            out = down.partial(total)
            projections = (gate_up.packed, gate_up.bias), (down.packed, down.own_bias)
            mlp_block(total, norm.weight, norm.eps, *projections, out)
            down.reduce(out, total)
        else:
            down(gate_up(norm(residual)), residual)


class DecoderLayer(nn.Module):
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
        wanted: torch.Tensor | None,
    ) -> Residual:
        """Adds what attention and MLP make of `residual`, T tokens, to it, one after the other.

        Returns it, or only its rows `wanted`, which alone go through the MLP.
        """
        self.attention(self.input_norm, residual, step, k_cache, v_cache)
        if wanted is not None:
            residual = residual.select(wanted)
        if len(residual.total):
            self.mlp(self.mlp_norm, residual)
        return residual

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
        head = Part("lm_head", share.vocab, spec.vocab_size)
        self.head = None if spec.tied_embeddings else LogitsLinear(spec.hidden_size, head, **build.placement)
        self.backend = build.attention
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
        cos, sin = self.rope(batch.positions, batch.lengths)
        step = Step(cos, sin, batch.attention.slots, self.backend.plan(batch.attention))
        residual = Residual(self.embedding(batch.token_ids))
        for layer, k_cache, v_cache in zip(self.layers, cache.keys, cache.values, strict=True):
            # The last layer makes no keys and values of what its MLP adds: whoever is not wanted is done.
            residual = layer(residual, step, k_cache, v_cache, wanted if layer is self.layers[-1] else None)
        hidden: torch.Tensor = self.norm(residual)
        return hidden

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
