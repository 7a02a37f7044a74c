"""A model's shape and options, read from its config.json without torch or transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...parallel.partition import Dimensions
from ..errors import CheckpointError, ConfigError

MINIMUM_TRANSFORMERS = {"Qwen2ForCausalLM": "4.37", "Qwen3ForCausalLM": "4.51", "LlamaForCausalLM": "4.28"}
"""The supported architectures, and the first transformers that knows each."""

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: `kind` is default, linear, dynamic, yarn or llama3; the other fields as in transformers."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # 0: max_position of the model
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # yarn: None computes 0.1 ln(factor) + 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One decoder model. Sizes are in elements, of the whole model, not of a rank."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    rope: RopeSpec
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"  # as the checkpoint says
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises CheckpointError if it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder in Hugging Face format")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(config).__name__}")
    return config


def spec_from_config(config: dict[str, Any], folder: str) -> ModelSpec:
    """The spec that a config.json describes, in the form of transformers 4 or 5.

    Raises ConfigError naming the field and the folder for what is missing, ill-typed or not supported.
    """
    fields = _Fields(config, folder)
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in MINIMUM_TRANSFORMERS:
        raise ConfigError(
            f"{folder}: architecture {architecture!r} is not supported; supported are {', '.join(MINIMUM_TRANSFORMERS)}"
        )
    _refuse_unsupported(config, folder)
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    qwen2, qwen3 = architecture == "Qwen2ForCausalLM", architecture == "Qwen3ForCausalLM"
    attention_bias = bool(config.get("attention_bias", False))
    eos = config.get("eos_token_id")
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_query_heads=heads,
        num_kv_heads=fields.size("num_key_value_heads", default=heads),
        head_dim=fields.size("head_dim", default=128 if qwen3 else hidden // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=fields.size("max_position_embeddings"),
        rope=_rope(fields, config, folder),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias and not qwen2,
        mlp_bias=architecture == "LlamaForCausalLM" and bool(config.get("mlp_bias", False)),
        qk_norm=qwen3,
        dtype=_dtype(config, folder),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        bos_token_id=config.get("bos_token_id"),
    )


def dimensions(spec: ModelSpec) -> Dimensions:
    """What a partition needs to know of a model."""
    return Dimensions(
        num_query_heads=spec.num_query_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        num_layers=spec.num_layers,
        tied_embeddings=spec.tied_embeddings,
    )


def check_transformers(spec: ModelSpec, installed: str) -> None:
    """Raises ConfigError if the installed transformers is older than the architecture."""
    needed = MINIMUM_TRANSFORMERS[spec.architecture]
    if _version(installed) < _version(needed):
        raise ConfigError(
            f"transformers {installed} does not know {spec.architecture}: version {needed} or newer is needed "
            f"(pip install --upgrade transformers)"
        )


class _Fields:
    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._config, self._folder = config, folder

    def size(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._folder}/config.json: {name}={value!r} must be an integer of at least 1")
        return value

    def number(self, name: str, default: float, within: dict[str, Any] | None = None) -> float:
        value = (self._config if within is None else within).get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{self._folder}/config.json: {name}={value!r} must be a number above 0")
        return float(value)


def _refuse_unsupported(config: dict[str, Any], folder: str) -> None:
    if config.get("use_sliding_window") and "sliding_attention" in config.get("layer_types", ["sliding_attention"]):
        raise ConfigError(f"{folder}/config.json: use_sliding_window=true is not supported; only full attention is")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{folder}/config.json: hidden_act={config['hidden_act']!r} is not supported; only silu is")
    if config.get("quantization_config"):
        raise ConfigError(
            f"{folder}/config.json: quantization_config is set; quantized checkpoints are not supported, use the "
            f"bfloat16, float16 or float32 original"
        )


def _rope(fields: _Fields, config: dict[str, Any], folder: str) -> RopeSpec:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(f"{folder}/config.json: rope type {kind!r} is not supported; {', '.join(ROPE_KINDS)} are")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{folder}/config.json: partial_rotary_factor must be 1.0, others are not supported")
    theta = fields.number("rope_theta", fields.number("rope_theta", 10000.0), rope)
    if kind == "default":
        return RopeSpec(theta=theta)
    max_position = fields.size("max_position_embeddings")
    original = rope.get("original_max_position_embeddings") or max_position
    return RopeSpec(
        kind=kind,
        theta=theta,
        factor=fields.number("factor", max_position / original, rope),
        original_max_position=int(original),
        beta_fast=fields.number("beta_fast", 32.0, rope),
        beta_slow=fields.number("beta_slow", 1.0, rope),
        attention_factor=rope.get("attention_factor"),
        mscale=rope.get("mscale"),
        mscale_all_dim=rope.get("mscale_all_dim"),
        truncate=bool(rope.get("truncate", True)),
        low_freq_factor=fields.number("low_freq_factor", 1.0, rope),
        high_freq_factor=fields.number("high_freq_factor", 4.0, rope),
    )


def _dtype(config: dict[str, Any], folder: str) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"{folder}/config.json: dtype={name!r} is not supported; {', '.join(DTYPES)} are")
    return name


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
