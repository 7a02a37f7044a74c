"""A Qwen2 model folder as a GGUF file without a vocabulary, for token ids only: write_gguf.py MODEL FILE bf16|q8_0

Matrices are bf16 as in the checkpoint or q8_0, the embeddings too, as llama.cpp's own tools do it; the rest is float32.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind


def main(model: str, path: str, kind: str) -> None:
    """Write the file. Raises ValueError for another architecture, or weights that are not bf16."""
    folder = Path(model)
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["Qwen2ForCausalLM"]:
        raise ValueError(f"{folder} is a {config['architectures'][0]}; only Qwen2ForCausalLM is written")

    architecture = gguf.MODEL_ARCH.QWEN2
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_shape(writer, config, folder.name, kind)

    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, values in _tensors(folder / "model.safetensors"):
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(short, _float32(values))
        elif kind == "q8_0":
            quantized = gguf.quants.quantize(_float32(values), Kind.Q8_0)
            writer.add_tensor(short, quantized, raw_dtype=Kind.Q8_0)
        else:
            writer.add_tensor(short, values.view(np.uint8), raw_dtype=Kind.BF16)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config: dict, name: str, kind: str) -> None:
    writer.add_name(name)
    writer.add_file_type({"bf16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[kind])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor, as the bits of bf16: numpy knows no such type."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    size = int(data[:8].view("<u8")[0])
    for name, entry in json.loads(data[8 : 8 + size].tobytes()).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
        start, end = entry["data_offsets"]
        values = data[8 + size + start : 8 + size + end].view("<u2").reshape(entry["shape"])
        assert values.size == math.prod(entry["shape"])
        yield name, values


def _float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


if __name__ == "__main__":
    main(*sys.argv[1:])
