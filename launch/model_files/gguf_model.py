"""GGUF files of Llama, Qwen2 and Qwen3 models, converted to model folders as transformers reads them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...engine.errors import CheckpointError, ConfigError, PhalanxError
from ...engine.models.spec import spec_from_config
from ...parallel.loading.json_files import shortened
from .gguf_header import check_header
from .gguf_tokenizer import check_token_id, write_tokenizer
from .model_folder import DTYPES, is_made, model_folder, write_json, write_weights
from .random_model import tensor_shapes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's general.architecture, and the class of transformers."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of each rotary frequency's divisor: GGUF's form of Llama 3's scaling."""

_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

Array = npt.NDArray[np.float32]


def gguf_origin(file: Path, dtype: str) -> dict[str, Any]:
    """Return the origin of a model folder converted from `file`. Raises ConfigError for no such file or dtype."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported; it must be one of {', '.join(DTYPES)}")
    if not os.path.isfile(file):
        raise ConfigError(f"gguf={file} is no file")
    return {"made": "gguf", "file": file.name, "bytes": file.stat().st_size, "dtype": dtype}


def convert_gguf(file: Path, folder: Path, dtype: str = "bfloat16", force: bool = False) -> Path:
    """Convert a GGUF file, quantized or not, to a model folder in `dtype`. Returns `folder`.

    One tensor is held in memory at a time. A folder made from this very file already stays as it is. Raises ConfigError
    for what is not supported or if `folder` holds something else, and CheckpointError for a damaged file.
    """
    origin = gguf_origin(file, dtype)
    if not force and is_made(folder, origin):
        return folder
    with _damage_named(file):
        _convert(file, folder, dtype, origin, force)
    return folder


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Raise CheckpointError for whatever values of a file bring about that are not of the kind that they ought to be.

    A file may come from anybody. The tokenizer library is written in Rust, whose panic is no Exception.
    """
    try:
        yield
    except (PhalanxError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = shortened(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{file} is damaged, or its metadata have no sense ({why}); copy it again") from error


def _convert(file: Path, folder: Path, dtype: str, origin: dict[str, Any], force: bool) -> None:
    metadata, stored = _read(file)

    # The checkpoint must have exactly the tensors of its metadata's shape.
    tensors = {_checkpoint_name(name, file): tensor for name, tensor in stored.items() if name != ROPE_FACTORS}
    config = {**_config(file, metadata, stored), "torch_dtype": dtype}
    spec = spec_from_config(config, str(file))
    # Before a name is made for every tensor of every layer: there may be millions.
    if spec.num_layers > len(tensors):
        raise CheckpointError(
            f"{file}: its metadata say {config['model_type']}.block_count={spec.num_layers}, but it holds only "
            f"{len(tensors)} tensors; copy it again"
        )
    shapes = tensor_shapes(spec)
    if different := sorted(shapes.keys() ^ tensors.keys()):
        state = "lacks" if different[0] in shapes else "has an unexpected"
        raise CheckpointError(f"{file} {state} tensor {different[0]} for a {config['architectures'][0]}")

    interleaved = _interleaved_heads(config)

    def pieces(name: str) -> Iterator[torch.Tensor]:
        values = _dequantize(tensors[name])
        if values.shape != shapes[name]:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {values.shape}; its metadata make it {shapes[name]}"
            )
        heads = interleaved.get(name.split(".")[-2])
        values = values if heads is None else _halves_from_pairs(values, heads)
        # Unquantized tensors come as read-only views of the file.
        yield torch.from_numpy(np.require(values, requirements="W")).to(DTYPES[dtype][0])

    with model_folder(folder, origin, force) as partial:
        write_weights(partial, shapes, dtype, pieces)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _generation_config(metadata))
        write_tokenizer(partial, file, metadata, max_length=config["max_position_embeddings"])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the file's metadata, and its tensors by their names in GGUF."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("reading GGUF files needs the gguf package: pip install gguf") from error
    check_header(file)
    try:
        reader = GGUFReader(file)
        metadata = {name: _value(field) for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{file} is no GGUF file, or is cut off ({error}); copy it again") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def _value(field: Any) -> Any:
    from gguf import GGUFValueType

    kind = field.types[-1]
    if kind == GGUFValueType.STRING:
        values = [field.parts[part].tobytes().decode("utf-8") for part in field.data]
    else:
        values = [field.parts[part][0] for part in field.data]
        # Keep the shortest decimal of this float32: 1e-05, not 9.999999747378752e-06.
        values = [float(str(value)) if kind == GGUFValueType.FLOAT32 else value.item() for value in values]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


def _config(file: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"{file}: architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are")

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise CheckpointError(f"{file}: its metadata lack {architecture}.{key}")
        return value

    heads = get("attention.head_count")
    hidden = get("embedding_length")
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]) if "token_embd.weight" in tensors else 0,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", hidden // heads)),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in tensors,
        "use_sliding_window": False,
    }

    scaling = get("rope.scaling.type", "none")
    if ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3_scaling(file, config, _dequantize(tensors[ROPE_FACTORS]))
    elif scaling != "none":
        config["rope_scaling"] = {"rope_type": scaling, "factor": get("rope.scaling.factor")}
        if scaling == "yarn":
            original = get("rope.scaling.original_context_length")
            config["rope_scaling"]["original_max_position_embeddings"] = original
    return config | _token_ids(metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    named = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    keys = {field: f"tokenizer.ggml.{name}_token_id" for field, name in named.items()}
    ids = {field: metadata[key] for field, key in keys.items() if key in metadata}
    for field, token in ids.items():
        check_token_id(keys[field], token, metadata)
    return ids


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids: dict[str, Any] = dict(_token_ids(metadata))
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None:
        check_token_id("tokenizer.ggml.eot_token_id", end_of_turn, metadata)
    if end_of_turn is not None and end_of_turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [ids["eos_token_id"], end_of_turn] if "eos_token_id" in ids else end_of_turn
    return ids


def _llama3_scaling(file: Path, config: Mapping[str, Any], factors: Array) -> dict[str, Any]:
    """Return Llama 3.1's settings that give these factors (transformers, modeling_rope_utils), or raise ConfigError."""
    low = 1.0
    high = 4.0
    original = 8192

    factor = round(float(factors.max()), 3)
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if factors.size != smooth.size or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ConfigError(f"{file}: {ROPE_FACTORS} is not the scaling of Llama 3.1 or 3.2, and no other is supported")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _checkpoint_name(name: str, file: Path) -> str:
    """Translate a tensor's name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        case [part, kind] if part in _OUTER_NAMES:
            return f"{_OUTER_NAMES[part]}.{kind}"
        case _:
            raise ConfigError(f"{file}: tensor {name} belongs to no supported model (mixtures of experts are not)")


def _dequantize(tensor: Any) -> Array:
    from gguf.quants import dequantize

    values: Array = dequantize(tensor.data, tensor.tensor_type)
    return values


def _interleaved_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the projections whose rotary pairs GGUF keeps side by side, with their heads: only Llama has some."""
    if config["model_type"] != "llama":
        return {}
    return {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}


def _halves_from_pairs(values: Array, heads: int) -> Array:
    """Reorder rows x0 y0 x1 y1 ... of each head to x0 x1 ... y0 y1 ...: transformers' order of rotary pairs."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
