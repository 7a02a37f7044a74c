"""A model's shape and options, read from its config.json without torch or transformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...parallel.loading.json_files import LoadError, read_json_object, shown
from ...parallel.loading.safetensors_files import ADAPTER, MERGE
from ...parallel.partition import Dimensions
from ..errors import CheckpointError, ConfigError

MINIMUM_TRANSFORMERS = {"Qwen2ForCausalLM": "4.37", "Qwen3ForCausalLM": "4.51", "LlamaForCausalLM": "4.28"}
"""The supported architectures, and the first transformers that knows each."""

_MAX_POSITIONS = {"LlamaForCausalLM": 2048}
"""Positions that transformers takes where a config.json states none (LLaMA's first); of all others _MAX_POSITION."""
_MAX_POSITION = 32768

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
DTYPES = ("float32", "float16", "bfloat16")

MAX_SIZE = 2**24
"""Bound of every size in elements or layers: larger ones are mistakes, which would only be found by running out."""
MAX_POSITIONS = 2**31 - 1
"""Positions are 32-bit integers."""
SMALLEST, LARGEST = 1e-18, 1e18
"""Bounds of numbers that are no sizes, within which no formula of them overflows."""


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
    attention_window: int | None = None  # most tokens that some layers see; up to so many, attention is full


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises CheckpointError if it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file() and (folder / ADAPTER).is_file():
        raise CheckpointError(f"{folder} holds an adapter ({ADAPTER}), and no config.json: {MERGE}")
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: it is no model folder in Hugging Face format")

    try:
        return read_json_object(path)
    except LoadError as error:
        raise CheckpointError(str(error)) from error


def spec_from_config(config: dict[str, Any], folder_name: str) -> ModelSpec:
    """The spec that a config.json describes, in the form of transformers 4 or 5, with transformers' defaults.

    Raises ConfigError naming the field and the folder for what is missing, ill-typed or not supported.
    """
    fields = _Fields(config, f"{folder_name}/config.json")
    architecture = _architecture(config, folder_name)
    _refuse_unsupported(fields)
    hidden = fields.size("hidden_size")
    heads = fields.size("num_attention_heads")
    qwen2, qwen3, llama = (architecture == f"{name}ForCausalLM" for name in ("Qwen2", "Qwen3", "Llama"))
    attention_bias = not qwen2 and fields.flag("attention_bias")
    max_position = fields.size(
        "max_position_embeddings", _MAX_POSITIONS.get(architecture, _MAX_POSITION), most=MAX_POSITIONS
    )

    spec = ModelSpec(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_query_heads=heads,
        # Llama's before grouped-query attention do not state it; a null means the same for all.
        num_kv_heads=fields.size("num_key_value_heads", heads if llama or "num_key_value_heads" in config else None),
        head_dim=fields.size("head_dim", 128 if qwen3 else hidden // heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position=max_position,
        rope=_rope(fields, max_position),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=qwen2 or attention_bias,
        output_bias=attention_bias,
        mlp_bias=llama and fields.flag("mlp_bias"),
        qk_norm=qwen3,
        dtype=_dtype(fields),
        eos_token_ids=fields.token_ids("eos_token_id"),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        attention_window=None if llama else _attention_window(fields),  # Llama's attention never slides
    )

    if spec.num_query_heads % spec.num_kv_heads:
        raise fields.error("num_key_value_heads", spec.num_kv_heads, f"a divisor of num_attention_heads={heads}")
    if spec.head_dim % 2:
        raise fields.error("head_dim", spec.head_dim, "an even number: rotary embedding turns pairs")
    if spec.rope.kind == "dynamic" and spec.head_dim == 2:
        raise fields.error("head_dim", spec.head_dim, "above 2 with rope type dynamic, which divides by head_dim - 2")
    return spec


def position_limit(spec: ModelSpec) -> int:
    """Tokens of one sequence that the model's positions allow.

    Linear and dynamic scaling state max_position before scaling, llama3 checkpoints after. yarn checkpoints do either:
    the model cards of Qwen2.5 and QwQ add yarn and leave max_position as it was, so the larger of max_position and the
    scaled original counts. A sliding attention ends a sequence at its window: up to there it is full attention.
    """
    rope = spec.rope
    limit = spec.max_position
    if rope.kind in ("linear", "dynamic"):
        limit = int(min(limit * rope.factor, MAX_POSITIONS))
    elif rope.kind == "yarn":
        limit = max(limit, int(min((rope.original_max_position or limit) * rope.factor, MAX_POSITIONS)))
    return limit if spec.attention_window is None else min(limit, spec.attention_window)


def window_words(spec: ModelSpec) -> str:
    """Return a sentence that sequences end at the attention window; empty if the model has none."""
    if spec.attention_window is None:
        return ""
    return (
        f"some layers' attention slides over {spec.attention_window} tokens, which phalanx does not compute: sequences "
        f"end there"
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
    """Raise ConfigError if the installed transformers is older than the architecture."""
    needed = MINIMUM_TRANSFORMERS[spec.architecture]
    if _version(installed) < _version(needed):
        raise ConfigError(
            f"transformers {installed} does not know {spec.architecture}: version {needed} or newer is needed "
            f"(pip install --upgrade transformers)"
        )


class _Fields:
    """Typed access to one level of a config.json; `path` names the level in errors."""

    def __init__(self, values: dict[str, Any], path: str) -> None:
        self.values = values
        self.path = path

    def error(self, name: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}={shown(value)} must be {allowed}")

    def size(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(name, value, f"an integer from 1 to {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = SMALLEST) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST:
            raise self.error(name, value, f"a number from {least:g} to {LARGEST:g}")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.values.get(name) is None else self.number(name)

    def is_zero(self, name: str) -> bool:
        """Whether it is the number that transformers takes for none, of some fields."""
        value = self.values.get(name)
        return isinstance(value, int | float) and not isinstance(value, bool) and value == 0

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self._get(name, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.error(name, value, "a token id or a list of token ids")
        return tuple(i for i in ids if i >= 0)  # some write -1 for none

    def group(self, name: str) -> _Fields | None:
        value = self.values.get(name)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return _Fields(value, f"{self.path}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value


def _architecture(config: dict[str, Any], folder_name: str) -> str:
    named = config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named
    if named in (None, []):  # transformers then goes by the type alone
        architecture = {name.removesuffix("ForCausalLM").lower(): name for name in MINIMUM_TRANSFORMERS}.get(
            str(config.get("model_type"))
        )
    if not isinstance(architecture, str) or architecture not in MINIMUM_TRANSFORMERS:
        raise ConfigError(
            f"{folder_name}/config.json: architecture {shown(architecture)} is not supported; supported are "
            f"{', '.join(MINIMUM_TRANSFORMERS)}"
        )
    return architecture


def _refuse_unsupported(fields: _Fields) -> None:
    activation = fields.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):  # two names of one function
        raise ConfigError(f"{fields.path}: hidden_act={shown(activation)} is not supported; only silu is")
    # As in transformers: embedding models have it, whose tokens see those after them.
    if not fields.flag("is_causal", True):
        raise ConfigError(f"{fields.path}: is_causal=false is not supported: a model that generates is causal")
    for name in ("quantization_config", "compression_config"):
        if values := fields.values.get(name):
            method = values.get("quant_method") if isinstance(values, dict) else None
            how = "" if method is None else f" (quant_method={shown(method)})"
            raise ConfigError(
                f"{fields.path}: {name} is set{how}; quantized checkpoints are not supported, use the bfloat16, "
                f"float16 or float32 original"
            )


def _attention_window(fields: _Fields) -> int | None:
    slides = "sliding_attention" in _layer_types(fields) and fields.flag("use_sliding_window")
    return fields.size("sliding_window", 4096, MAX_POSITIONS) if slides else None


def _layer_types(fields: _Fields) -> set[str]:
    """Kinds of attention, as transformers infers them for Qwen where the config does not list them by layer."""
    layers = fields.size("num_hidden_layers")
    listed = fields.values.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers or not all(kind in LAYER_TYPES for kind in listed):
            raise fields.error(
                "layer_types", listed, f"a list of {layers}, one for each layer, of {' and '.join(LAYER_TYPES)}"
            )
        return set(listed)

    # An explicit null turns the window off; without the field there is one of 4096 tokens.
    if not fields.flag("use_sliding_window") or fields.values.get("sliding_window", 4096) is None:
        return {"full_attention"}
    full_layers = fields.values.get("max_window_layers", 28)
    if not isinstance(full_layers, int):
        raise fields.error("max_window_layers", full_layers, "an integer")
    return {LAYER_TYPES[layer >= full_layers] for layer in range(layers)}


def _rope(fields: _Fields, max_position: int) -> RopeSpec:
    # As in transformers, rope_scaling (its form before 5) wins, and rope_theta may be inside or beside it.
    rope = fields.group("rope_scaling") or fields.group("rope_parameters") or _Fields({}, fields.path)
    if any(name.endswith("_attention") for name in rope.values):  # kinds of layers, also those that are unknown here
        rope = _rope_of_layers(rope, _layer_types(fields))
    kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"{rope.path}: rope type {shown(kind)} is not supported; supported are {', '.join(ROPE_KINDS)}"
        )
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"{fields.path}: partial_rotary_factor must be 1.0, others are not supported")

    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind in ("linear", "dynamic"):
        return RopeSpec(kind=kind, theta=theta, factor=rope.number("factor"))

    # The value beside the rope parameters wins over the one inside; without either there was no extension.
    inside = rope.size("original_max_position_embeddings", max_position, MAX_POSITIONS)
    if kind == "yarn" and theta <= 1:
        raise rope.error("rope_theta", theta, "above 1 with yarn, which divides by its logarithm")
    original = fields.size("original_max_position_embeddings", inside, MAX_POSITIONS)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return RopeSpec(
        kind=kind,
        theta=theta,
        factor=rope.number("factor", max_position / original),
        original_max_position=original,
        beta_fast=32.0 if rope.is_zero("beta_fast") else rope.number("beta_fast", 32.0),
        beta_slow=1.0 if rope.is_zero("beta_slow") else rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=None if rope.is_zero("mscale") else rope.optional_number("mscale"),
        mscale_all_dim=None if rope.is_zero("mscale_all_dim") else rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", "truncate" not in rope.values),  # a null is false there
    )


def _rope_of_layers(rope: _Fields, layer_types: set[str]) -> _Fields:
    """The parameters of all layers, of those that transformers 5 nests by the layers' kind of attention.

    Raises ConfigError if there are none for a kind of layer, or if two kinds that the model has differ.
    """
    groups = []
    for kind in sorted(layer_types):
        group = rope.group(kind)
        if group is None:
            raise rope.error(kind, rope.values.get(kind), f"an object: some layers have {kind}")
        groups.append(group)

    if any(group.values != groups[0].values for group in groups):
        raise ConfigError(f"{rope.path}: layers of {' and '.join(sorted(layer_types))} must have equal parameters")
    return groups[0]


def _dtype(fields: _Fields) -> str:
    # transformers 5 writes the first, its forerunners the second.
    name = next((name for name in ("dtype", "torch_dtype") if fields.values.get(name)), "dtype")
    value = fields.values.get(name) or "float32"
    dtype = value.removeprefix("torch.") if isinstance(value, str) else value
    if dtype not in DTYPES:
        raise ConfigError(f"{fields.path}: {name}={shown(value)} is not supported; supported are {', '.join(DTYPES)}")
    return str(dtype)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
