"""A tokenizer's files and a generation_config.json from anybody: any value is right, or refused by file and field."""

from __future__ import annotations

import codecs
import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from phalanx import EngineConfig
from phalanx.engine.coordinator.input_processor import InputProcessor
from phalanx.engine.coordinator.text.template_processes import TemplateProcesses
from phalanx.engine.coordinator.tokenizer import Tokenizer, read_generation_config, unused_fields
from phalanx.engine.models.spec import ModelSpec, read_config, spec_from_config
from phalanx.engine.protocol.messages import Submit
from phalanx.tests.hostile_values import NO_OBJECTS, VALUES, little_memory, read_json, refusal

GENERATION, SETTINGS, TOKENIZER = "generation_config.json", "tokenizer_config.json", "tokenizer.json"
MAX_MODEL_LEN = 256
CHAT = [{"role": "user", "content": "hi"}]


@functools.cache
def _processes() -> TemplateProcesses:
    """The same for every tokenizer, so that not each starts one; they end with this process."""
    return TemplateProcesses()


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    with little_memory():
        yield


@pytest.fixture(scope="module")
def spec(tiny: Path) -> ModelSpec:
    return spec_from_config(read_config(tiny), str(tiny))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's files but its weights, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


# generation_config.json

GENERATION_FIELDS = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_new_tokens": 5,
    "eos_token_id": 258,
    "bos_token_id": 256,
    "pad_token_id": 0,
    "stop_strings": None,
    "transformers_version": "4.57.0",
}


def _resolve(folder: Path, spec: ModelSpec) -> None:
    """What an engine makes of a request that leaves all to the folder."""
    processor = InputProcessor(EngineConfig(model="m"), spec, None, read_generation_config(folder), MAX_MODEL_LEN)
    request = processor.process(Submit(id="a", token_ids=[5]), "i", 1.0)
    msgspec.msgpack.encode(request.samplings)  # as the other ranks get it
    [sampling] = request.samplings
    assert 0 <= sampling.temperature < math.inf
    assert 0 <= sampling.top_k <= spec.vocab_size
    assert 0 < sampling.top_p <= 1
    assert 0 <= sampling.min_p <= 1
    assert 0 < sampling.repetition_penalty < math.inf
    assert request.max_tokens >= 1
    assert all(0 <= token < spec.vocab_size for token in sampling.end_token_ids)


@pytest.mark.parametrize("field", GENERATION_FIELDS)
def test_every_value_of_a_generation_config_is_right_or_named(folder: Path, spec: ModelSpec, field: str) -> None:
    for name, value in VALUES.items():
        for held in (value, [value]):
            (folder / GENERATION).write_text(json.dumps({**GENERATION_FIELDS, field: held}))
            refusal(f"{field}={name}", lambda: _resolve(folder, spec), GENERATION, field)


# tokenizer_config.json

SETTINGS_FIELDS = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "model_specific_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "split_special_tokens",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "legacy",
    "auto_map",
    "name_or_path",
    "use_fast",
    "from_slow",
    "backend",
    "is_local",
    "tokenizer_object",
    "tokenizer_file",
    "vocab_file",
    "special_tokens_map_file",
    "trust_remote_code",
    "max_length",
    "stride",
    "errors",
    "config",
    "tokenizer_class",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "cls_token",
    "chat_template",
    "model_max_length",
    "clean_up_tokenization_spaces",
)


def _tokenize(folder: Path, spec: ModelSpec) -> None:
    """Make the tokenizer, and text of tokens and tokens of text with it."""
    tokenizer = Tokenizer(folder, processes=_processes())
    processor = InputProcessor(EngineConfig(model="m"), spec, tokenizer, {}, MAX_MODEL_LEN)
    prompt = processor.process(Submit(id="a", prompt="Hello <|im_end|> a"), "i", 1.0).prompt
    assert all(0 <= token < spec.vocab_size for token in prompt)

    decoder = tokenizer.decoder(True, prompt)
    text = "".join([*map(decoder.step, prompt), decoder.flush()])
    text.encode()
    tokenizer.decode([*prompt, 10**6]).encode()
    assert len(tokenizer.token_bytes[prompt[0]]) > 0
    assert tokenizer.size > 0
    # A template that refuses every conversation is its user's to see.
    refusal("messages", lambda: processor.process(Submit(id="a", messages=CHAT), "i", 1.0))


def _write(folder: Path, file: str, values: dict[str, Any]) -> None:
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize("field", SETTINGS_FIELDS)
def test_every_value_of_a_tokenizer_config_is_right_or_named(folder: Path, spec: ModelSpec, field: str) -> None:
    settings = read_json(folder / SETTINGS)
    for name, value in VALUES.items():
        _write(folder, SETTINGS, {**settings, field: value})
        refusal(f"{field}={name}", lambda: _tokenize(folder, spec), SETTINGS, field)


TOKEN = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.mark.parametrize("field", ["", *TOKEN])
def test_every_value_of_an_added_token_is_right_or_named(folder: Path, spec: ModelSpec, field: str) -> None:
    settings = read_json(folder / SETTINGS)
    for name, value in VALUES.items():
        token = {**TOKEN, field: value} if field else value
        for where, held in (("added_tokens_decoder", {"258": token}), ("eos_token", token)):
            _write(folder, SETTINGS, {**settings, where: held})
            refusal(f"{where}: {field}={name}", lambda: _tokenize(folder, spec), SETTINGS, where)


@pytest.mark.parametrize("key", ["", "-1", "1.5", "x", "2147483647", "9" * 400, "\ud800", "\u0663"], ids=ascii)
def test_an_added_token_has_an_id(folder: Path, spec: ModelSpec, key: str) -> None:
    settings = read_json(folder / SETTINGS)
    _write(folder, SETTINGS, {**settings, "added_tokens_decoder": {key: TOKEN}})
    assert refusal(key, lambda: _tokenize(folder, spec), SETTINGS, "added_tokens_decoder")


def test_every_value_of_named_chat_templates_is_right_or_named(folder: Path, spec: ModelSpec) -> None:
    settings = read_json(folder / SETTINGS)
    chatml = settings["chat_template"]
    for name, value in VALUES.items():
        for held in (
            [value],
            [{"name": "default", "template": value}],
            [{"name": value, "template": chatml}],
            [{"name": "default", "template": chatml}, value],
            {"default": value},
            {"default": chatml, "tool_use": value},
        ):
            _write(folder, SETTINGS, {**settings, "chat_template": held})
            refusal(f"chat_template={name}", lambda: _tokenize(folder, spec), SETTINGS, "chat_template")


# tokenizer.json


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tokenizer.json, of lists and of the vocabulary the first alone."""
    if path:
        yield path
    if isinstance(value, dict):
        keys = list(value)[:1] if path == ("model", "vocab") else list(value)
        for key in keys:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0))


def _replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", VALUES)
def test_every_value_of_a_tokenizer_file_is_right_or_named(folder: Path, spec: ModelSpec, name: str) -> None:
    tokenizer = read_json(folder / TOKENIZER)
    # Tokens that are written in this file alone.
    settings = {**read_json(folder / SETTINGS), "pad_token": None, "unk_token": None}
    _write(folder, SETTINGS, settings)
    for path in _paths(tokenizer):
        _write(folder, TOKENIZER, _replaced(tokenizer, path, VALUES[name]))
        refusal(f"{path}={name}", lambda: _tokenize(folder, spec), TOKENIZER)


@pytest.mark.parametrize("file", ["special_tokens_map.json", "added_tokens.json"])
def test_every_value_of_a_file_of_tokens_is_right_or_named(folder: Path, spec: ModelSpec, file: str) -> None:
    for name, value in VALUES.items():
        for field in ("pad_token", "additional_special_tokens", "<|im_end|>"):
            _write(folder, file, {field: value})
            refusal(f"{field}={name}", lambda: _tokenize(folder, spec), file, field)


def test_a_special_token_of_any_length_takes_no_memory_by_its_square(folder: Path, spec: ModelSpec) -> None:
    tokenizer = read_json(folder / TOKENIZER)
    settings = read_json(folder / SETTINGS)
    token = {**tokenizer["added_tokens"][0], "content": "y" * 100_000}
    _write(folder, TOKENIZER, {**tokenizer, "added_tokens": [token, *tokenizer["added_tokens"][1:]]})
    assert refusal("long", lambda: _tokenize(folder, spec), TOKENIZER, "added_tokens", "at most 1024")
    _write(folder, TOKENIZER, tokenizer)
    _write(folder, SETTINGS, {**settings, "bos_token": "y" * 1024})
    _tokenize(folder, spec)


# Whole files


@pytest.mark.parametrize("kind", NO_OBJECTS)
@pytest.mark.parametrize("file", [GENERATION, SETTINGS, TOKENIZER])
def test_a_file_that_is_no_json_object_is_refused_by_name(folder: Path, spec: ModelSpec, file: str, kind: str) -> None:
    (folder / file).write_bytes(NO_OBJECTS[kind])
    read = _resolve if file == GENERATION else _tokenize
    assert refusal(kind, lambda: read(folder, spec), str(folder / file))


def test_a_byte_order_mark_is_read_over_or_refused_by_name(folder: Path, spec: ModelSpec) -> None:
    for file in (GENERATION, SETTINGS, TOKENIZER):
        marked = codecs.BOM_UTF8 + (folder / file).read_bytes()
        (folder / file).write_bytes(marked)
    _resolve(folder, spec)
    assert refusal("mark", lambda: _tokenize(folder, spec), str(folder / SETTINGS), "byte-order mark")


def test_what_a_generation_config_asks_for_and_does_not_get_is_said() -> None:
    assert unused_fields({}) == ""
    assert unused_fields({"num_beams": 1, "stop_strings": None, "typical_p": 1.0, "temperature": 0.5}) == ""
    asked = unused_fields({"num_beams": 4, "stop_strings": ["User:"], "min_length": 0})
    assert asked == "; it gives what is not used: num_beams=4, stop_strings=['User:']"
    for value in VALUES.values():
        assert len(unused_fields({"stop_strings": value})) < 500
