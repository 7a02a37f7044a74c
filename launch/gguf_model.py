"""GGUF files of Llama, Qwen2 and Qwen3 models, converted to model folders as transformers reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..engine.errors import CheckpointError, ConfigError
from ..engine.models.spec import spec_from_config
from .gguf_tokenizer import write_tokenizer
from .model_folder import DTYPES, is_made, model_folder, write_json, write_weights
from .random_model import tensor_shapes

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""GGUF's `general.architecture`, and the class of transformers."""

ROPE_FACTORS = "rope_freqs.weight"

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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

Metadata = dict[str, Any]


def convert_gguf(
    file: Path, folder: Path, origin: dict[str, Any], dtype: str = "bfloat16", force: bool = False
) -> Path:
    """Convert one GGUF file, quantized or not, to a model folder in `dtype`. Returns `folder`.

    One tensor is held in memory at a time. A folder made from the same `origin` stays as it is. Raises ConfigError for
    what is not supported and CheckpointError for a damaged file.
    """
    if not force and is_made(folder, origin):
        return folder
    reader = _open(file)
    metadata = {name: field for name, field in reader.fields.items()}
    tensors = {_checkpoint_name(tensor.name): tensor for tensor in reader.tensors if tensor.name != ROPE_FACTORS}
    factors = next((_dequantize(tensor) for tensor in reader.tensors if tensor.name == ROPE_FACTORS), None)
    config = {**_config(_Metadata(file, metadata), tensors, factors), "torch_dtype": dtype}
    shapes = tensor_shapes(spec_from_config(config, str(file)))
    if different := sorted(shapes.keys() ^ tensors.keys()):
        raise CheckpointError(f"{file}: its tensors are not those of {config['architectures'][0]}: {different[0]}")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def pieces(name: str) -> Iterator[torch.Tensor]:
        values = _dequantize(tensors[name])
        if values.shape != shapes[name]:
            raise CheckpointError(f"{file}: tensor {name} has shape {values.shape}, expected {shapes[name]}")
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            values = _halves_from_pairs(values, heads[projection])
        yield torch.from_numpy(values).to(DTYPES[dtype][0])

    with model_folder(folder, origin, force) as partial:
        write_weights(partial, shapes, dtype, pieces)
        write_json(partial / "config.json", config)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(partial / "generation_config.json", {name: config[name] for name in ids if name in config})
        write_tokenizer(partial, file, _Metadata(file, metadata).contents("tokenizer."))
    return folder
