"""The JSON files of a model folder: what they hold is right, or refused by file and field, before anything is taken."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from phalanx.engine.config import EngineConfig
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.engine.coordinator.tokenizer import Tokenizer, read_generation_config
from phalanx.engine.errors import CheckpointError, ConfigError, InvalidRequest
from phalanx.engine.models.resolve import partition_model, resolve_dtype, resolve_max_model_len
from phalanx.engine.models.spec import read_config, spec_from_config
from phalanx.engine.models.stored import read_stored
from phalanx.engine.protocol.messages import Submit
from phalanx.parallel.loading.safetensors_files import INDEX
from phalanx.tests.fuzz.bounds import check_message, in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch, tiny_model

SHARD = "model-00001-of-00001.safetensors"
FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX)
EXTRA: dict[str, dict[str, Any]] = {
    "config.json": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 2, "head_dim": 16,
    },
    "generation_config.json": {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "max_new_tokens": 5},
    "tokenizer_config.json": {"additional_special_tokens": ["<|x|>"], "added_tokens_decoder": {},
    "padding_side": "left"},
}  # fmt: skip
WORDS = (
    "rope_scaling", "rope_parameters", "rope_type", "factor", "linear", "yarn", "llama3", "dynamic", "default", "type",
    "rope_theta", "original_max_position_embeddings", "sliding_attention", "full_attention", "quantization_config",
    "vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id", "bos_token_id", "chat_template",
    "content", "special",
    "normalized", "model", "vocab", "merges", "BPE", "Unigram", "WordPiece", "added_tokens", "id", "pre_tokenizer",
    "decoder", "normalizer", "post_processor", "ByteLevel", "Metaspace", "Sequence", "Replace", "pattern", "Regex",
    "truncation", "padding", "weight_map", SHARD, "auto_map", "tokenizer_class", "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    "{{ messages }}", "<|im_end|>", "silu", "bfloat16", "float16", "torch_dtype",
)  # fmt: skip


@cache
def _originals() -> dict[str, bytes]:
    """A sharded copy of the tiny model: its JSON files, with more of the fields that models have."""
    folder = _folder()
    shutil.copytree(tiny_model(), folder)
    spec = spec_from_config(read_config(folder), str(folder))
    names = read_stored(spec, folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, SHARD)}))
    return {name: (folder / name).read_bytes() for name in FILES}


def _folder() -> Path:
    return scratch() / "model"


def fuzz_one(data: bytes) -> None:
    """Change one file or two, and set up what an engine makes of them."""
    choices = Choices(data)
    _tokenizer()  # the first one imports transformers, which is no input's time
    for name, original in _originals().items():
        (_folder() / name).write_bytes(original)
    changed = [choices.pick(FILES) for _ in range(1 + choices.number(2))]
    for name in changed:
        values = json.loads(_originals()[name])
        if choices.flag():
            values |= EXTRA.get(name, {})
        for _ in range(1 + choices.number(3)):
            values = choices.changed(values, WORDS)
        text = json.dumps(values).encode()
        if choices.number(6) == 0:
            text = choices.mutated(text)
        (_folder() / name).write_bytes(text)

    try:
        with in_time():
            _set_up(with_tokenizer=any(name.startswith("tokenizer") for name in changed))
    except (CheckpointError, ConfigError) as error:
        check_message(error)


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(tiny_model())


def _set_up(with_tokenizer: bool) -> None:
    folder = _folder()
    spec = spec_from_config(read_config(folder), str(folder))
    read_stored(spec, folder)
    config = EngineConfig(model=str(folder))
    resolve_dtype(config, spec, "cpu")
    length = resolve_max_model_len(config, spec)
    for ranks in (1, 2):
        partition_model(config, spec, ranks)

    tokenizer = Tokenizer(folder) if with_tokenizer else _tokenizer()
    processor = InputProcessor(config, spec, tokenizer, read_generation_config(folder), min(length, 64))
    for submit in (
        Submit(id="a", prompt="some text 🙂"),
        Submit(id="a", messages=[{"role": "user", "content": "hi"}]),
    ):
        try:
            request = processor.process(submit, "inner", 0.0)
        except InvalidRequest as error:
            str(error).encode()
        else:
            tokenizer.decode(request.prompt)
