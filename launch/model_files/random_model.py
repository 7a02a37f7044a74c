"""Random checkpoints of any supported shape, with a small tokenizer and a chat template, to try and to measure with."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...engine.errors import ConfigError
from ...engine.models.spec import ModelSpec, spec_from_config
from ...parallel.loading.checkpoint import WeightSlice
from ...parallel.loading.dummy_weights import STANDARD_DEVIATION, fill_dummy
from .model_folder import DTYPES, Shape, is_made, model_folder, write_json, write_weights

PIECE_ELEMENTS = 2**22
"""Elements of a tensor that are made and written at a time, in whole rows."""

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_random_model(
    folder: Path, shape: dict[str, Any], seed: int = 0, dtype: str = "bfloat16", force: bool = False
) -> Path:
    """Make a model folder of the `shape` (the fields of a config.json), as transformers reads it. Returns `folder`.

    Weights are those of load_format=dummy with the same seed, but of the standard deviation that the shape's
    `initializer_range` gives (0.02 without). The tokenizer is byte-level. A folder that holds this very model already
    stays as it is. Raises ConfigError for a shape that is not supported, and if `folder` holds something else.
    """
    origin = random_origin(shape, seed, dtype)
    if not force and is_made(folder, origin):
        return folder
    config = origin["config"]
    vocabulary = _vocabulary(config)
    spec = spec_from_config(config, str(folder))
    shapes = tensor_shapes(spec)
    deviation = float(shape.get("initializer_range", STANDARD_DEVIATION))

    def pieces(name: str) -> Iterator[torch.Tensor]:
        return _pieces(name, shapes[name], DTYPES[dtype][0], seed, deviation)

    with model_folder(folder, origin, force) as partial:
        write_weights(partial, shapes, dtype, pieces)
        write_json(partial / "config.json", config)
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(partial / "generation_config.json", {**ids, "pad_token_id": vocabulary[END_OF_TEXT]})
        _write_tokenizer(partial, vocabulary, spec.max_position)
    return folder


def random_origin(shape: dict[str, Any], seed: int, dtype: str) -> dict[str, Any]:
    """Return a random model's origin: its whole config.json and its seed. Raises ConfigError for an impossible one."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not supported; it must be one of {', '.join(DTYPES)}")
    vocabulary = _vocabulary(shape)
    ids = {"bos_token_id": vocabulary[END_OF_TEXT], "eos_token_id": vocabulary[TURN_END]}
    config = {"hidden_act": "silu", **ids, **shape, "torch_dtype": dtype}
    config.pop("dtype", None)  # transformers 5's name for the same
    return {"made": "random", "config": config, "seed": seed}


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the shape of every tensor of a model's checkpoint, in the order of the forward pass."""
    hidden = spec.hidden_size
    width = spec.intermediate_size
    queries = spec.num_query_heads * spec.head_dim
    keys = spec.num_kv_heads * spec.head_dim

    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        layer |= _linear(f"self_attn.{name}", rows, hidden, spec.qkv_bias)
    if spec.qk_norm:
        layer |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    layer |= _linear("self_attn.o_proj", hidden, queries, spec.output_bias)
    layer |= {"post_attention_layernorm.weight": (hidden,)}
    for name, rows, columns in (("gate_proj", width, hidden), ("up_proj", width, hidden), ("down_proj", hidden, width)):
        layer |= _linear(f"mlp.{name}", rows, columns, spec.mlp_bias)

    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    for i in range(spec.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _pieces(name: str, shape: Shape, dtype: torch.dtype, seed: int, deviation: float) -> Iterator[torch.Tensor]:
    step = max(1, PIECE_ELEMENTS // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        piece = torch.empty(last - first, *shape[1:], dtype=dtype)
        index = (slice(first, last), *(slice(0, size) for size in shape[1:]))
        fill_dummy([WeightSlice(name, shape, index, piece)], seed, deviation)
        yield piece


def _vocabulary(shape: dict[str, Any]) -> dict[str, int]:
    """Return the token ids: special tokens where the shape has them, other ids for bytes, then other special tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    size = shape.get("vocab_size")
    if not isinstance(size, int) or size < 4:
        raise ConfigError(f"vocab_size={size!r} must be an integer of at least 4: three special tokens and a byte")

    special: dict[str, int] = {}
    for token, field in ((TURN_END, "eos_token_id"), (END_OF_TEXT, "bos_token_id")):
        ids = shape.get(field)
        wanted = ids[0] if isinstance(ids, list) else ids
        if wanted is None or wanted in special.values():
            continue
        if not 0 <= wanted < size:
            raise ConfigError(f"{field}={wanted} must be below vocab_size={size}")
        special[token] = wanted

    # Space and newline (as the byte-level alphabet spells them), then the printable ASCII characters: they sort first.
    names = sorted(ByteLevel.alphabet(), key=lambda letter: (letter not in "ĠĊ", letter))[: size - 3]
    names += [token for token in (END_OF_TEXT, TURN_START, TURN_END) if token not in special]
    free = (i for i in range(size) if i not in special.values())
    return special | dict(zip(names, free, strict=False))


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], max_position: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=END_OF_TEXT))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (END_OF_TEXT, TURN_START, TURN_END)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": max_position,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    write_json(folder / "tokenizer_config.json", settings)
