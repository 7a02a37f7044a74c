"""A model folder from anybody: any value of any field brings right behaviour, or an error that names file and field."""

from __future__ import annotations

import codecs
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from phalanx import LLM, EngineConfig, SamplingParams
from phalanx.engine.models.resolve import partition_model, resolve_dtype, resolve_max_model_len
from phalanx.engine.models.spec import ModelSpec, RopeSpec, read_config, spec_from_config
from phalanx.engine.models.stored import read_stored
from phalanx.kernels.rope import RotaryEmbedding
from phalanx.tests.engine.conftest import CONFIG
from phalanx.tests.engine.coordinator.test_hostile_tokenizer import GENERATION_FIELDS, SETTINGS_FIELDS
from phalanx.tests.hostile_values import NO_OBJECTS, VALUES, little_memory, read_json, refusal
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    with little_memory():
        yield


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


CONFIG_FIELDS: dict[str, tuple[Any, set[str]]] = {
    # A value that is right, and the fields of the spec that may differ with another.
    "architectures": (["Qwen2ForCausalLM"], set()),
    "model_type": ("qwen2", set()),
    "vocab_size": (1031, set()),
    "hidden_size": (64, set()),
    "intermediate_size": (128, set()),
    "num_hidden_layers": (2, {"num_layers"}),
    "num_attention_heads": (4, set()),
    "num_key_value_heads": (2, set()),
    "head_dim": (16, set()),
    "hidden_act": ("silu", set()),
    "rms_norm_eps": (1e-5, {"rms_norm_eps"}),
    "max_position_embeddings": (512, {"max_position"}),
    "original_max_position_embeddings": (None, set()),
    "rope_theta": (1e6, {"rope"}),
    "rope_scaling": (None, {"rope"}),
    "rope_parameters": (None, {"rope"}),
    "partial_rotary_factor": (1.0, set()),
    "use_sliding_window": (False, {"attention_window"}),
    "sliding_window": (None, {"attention_window"}),
    "max_window_layers": (1, {"attention_window"}),
    "layer_types": (None, {"attention_window"}),
    "attention_bias": (False, set()),
    "mlp_bias": (False, set()),
    "tie_word_embeddings": (False, {"tied_embeddings"}),
    "bos_token_id": (256, {"bos_token_id"}),
    "eos_token_id": (258, {"eos_token_ids"}),
    "quantization_config": (None, set()),
    "dtype": (None, {"dtype"}),
    "torch_dtype": ("float32", {"dtype"}),
    "initializer_range": (0.2, set()),
    "transformers_version": ("4.57.0", set()),
    "use_cache": (True, set()),
    "auto_map": (None, set()),
}
WORDS = {"architectures": "architecture"}
SLIDING = {"use_sliding_window": True, "sliding_window": 64}
"""With these, the fields of sliding attention are used."""


def _spec(folder: Path) -> ModelSpec:
    """What every rank makes of config.json before it takes memory for the model."""
    spec = spec_from_config(read_config(folder), str(folder))
    read_stored(spec, folder)
    config = EngineConfig(model=str(folder))
    resolve_dtype(config, spec, "cpu")
    assert 1 <= resolve_max_model_len(config, spec) < 2**31
    for ranks in (1, 2):
        partition_model(config, spec, ranks)
    return spec


def _differing(one: ModelSpec, other: ModelSpec) -> set[str]:
    return {name for name, value in dataclasses.asdict(one).items() if dataclasses.asdict(other)[name] != value}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("base", [{}, SLIDING], ids=["plain", "sliding"])
def test_every_value_of_a_config_is_right_or_named(folder: Path, name: str, base: dict[str, Any]) -> None:
    config = {**{field: value for field, (value, _) in CONFIG_FIELDS.items()}, **base}
    assert set(read_json(folder / "config.json")) <= set(config)
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    right = _spec(folder)
    window = {"attention_window"} if base else set()

    for field, (_, affected) in CONFIG_FIELDS.items():
        file.write_text(json.dumps({**config, field: VALUES[name]}))

        def read(affected: set[str] = affected) -> None:
            assert _differing(_spec(folder), right) <= affected | window

        refusal(f"{field}={name}", read, "config.json", WORDS.get(field, field))


ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "attention_factor": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": True,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def _check_rope(rope: RopeSpec, max_position: int) -> None:
    """Cosines and sines are numbers, up to positions beyond the original ones."""
    embedding = RotaryEmbedding(
        head_dim=16,
        max_position=max_position,
        table_length=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        **dataclasses.asdict(rope),
    )
    positions = torch.arange(64)
    for table in embedding(positions, positions + 600):
        assert torch.isfinite(table).all()


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ROPES)
def test_every_value_of_a_rope_is_right_or_named(folder: Path, form: str, kind: str) -> None:
    config = read_json(folder / "config.json")
    rope = {"rope_type": kind, "rope_theta": 1e4, "partial_rotary_factor": 1.0, **ROPES[kind]}

    def read() -> None:
        spec = spec_from_config(read_config(folder), str(folder))
        assert 1 <= resolve_max_model_len(EngineConfig(model="m"), spec) < 2**31
        _check_rope(spec.rope, spec.max_position)

    (folder / "config.json").write_text(json.dumps({**config, form: rope}))
    read()
    for field in (*rope, "type"):
        words = {"rope_type": "rope type", "type": "rope type"}.get(field, field)
        for name, value in VALUES.items():
            changed = {**rope, field: value}
            if field == "type":
                del changed["rope_type"]
            (folder / "config.json").write_text(json.dumps({**config, form: changed}))
            refusal(f"{form}: {kind}: {field}={name}", read, "config.json", words)


def test_fields_of_a_rope_that_only_together_have_no_sense_are_named(folder: Path) -> None:
    config = read_json(folder / "config.json")
    extremes = (1e-18, 1e-6, 1.0, 1e6, 1e18)
    for kind, rope in ROPES.items():
        numbers = [field for field, value in rope.items() if isinstance(value, float)] or ["rope_theta"]
        for one in extremes:
            for other in extremes:
                changes = {numbers[0]: one, numbers[-1]: other, "rope_theta": max(one, other)}
                values = {**rope, "rope_type": kind, **changes}
                (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": values}))

                def read() -> None:
                    spec = spec_from_config(read_config(folder), str(folder))
                    _check_rope(spec.rope, spec.max_position)

                refusal(f"{kind}: {changes}", read, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 2**24}, ["lack tensor model.layers.2.", "num_hidden_layers=16777216"]),
        ({"vocab_size": 2**24}, ["embed_tokens.weight", "vocab_size=16777216", "[1031, 64]"]),
        ({"hidden_size": 2**20, "head_dim": 16}, ["hidden_size=1048576"]),
        ({"intermediate_size": 2**24}, ["down_proj.weight", "intermediate_size=16777216"]),
        ({"num_attention_heads": 8}, ["num_attention_heads=8", "num_key_value_heads=2"]),
        ({"num_key_value_heads": 4}, ["k_proj.weight", "num_key_value_heads=4"]),
        ({"head_dim": 2**20}, ["q_proj.weight", "head_dim=1048576"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_the_weights_do_not_have_are_refused_by_their_headers(
    folder: Path, change: dict[str, int], words: list[str]
) -> None:
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    spec = spec_from_config(read_config(folder), str(folder))
    assert refusal(str(change), lambda: read_stored(spec, folder), f"{folder / 'config.json'}", *words)


def test_packed_embeddings_are_refused_as_quantized_and_not_by_their_shape(folder: Path) -> None:
    # As MLX writes them, whose config.json may name the quantization under a field of its own.
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 64, "bits": 4}}))
    spec = spec_from_config(read_config(folder), str(folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(1031, 8, dtype=torch.uint32)
    save_file(tensors, folder / "model.safetensors")
    words = ("model.safetensors", "embed_tokens.weight", "'U32'", "Quantized checkpoints are not")
    assert refusal("packed", lambda: read_stored(spec, folder), *words)


# The index


def _shard(folder: Path) -> dict[str, Any]:
    """Make the weights one file of an index, and return that index."""
    names = read_stored(spec_from_config(read_config(folder), str(folder)), folder)
    (folder / "model.safetensors").rename(folder / SHARD)
    index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, SHARD)}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def _read_index(folder: Path) -> None:
    assert len(read_stored(spec_from_config(read_config(folder), str(folder)), folder)) > 20


def test_every_value_of_an_index_is_right_or_named(folder: Path) -> None:
    index = _shard(folder)
    _read_index(folder)
    tensor = "model.norm.weight"
    for name, value in VALUES.items():
        # What the index says beside the map is not used.
        for changes in ({"metadata": value}, {"metadata": {"total_size": value}}, {"other": value}):
            (folder / INDEX).write_text(json.dumps({**index, **changes}))
            _read_index(folder)

        (folder / INDEX).write_text(json.dumps({**index, "weight_map": value}))
        assert refusal(f"weight_map={name}", lambda: _read_index(folder), INDEX, "weight_map")
        (folder / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], tensor: value}}))
        assert refusal(f"weight_map[...]={name}", lambda: _read_index(folder), INDEX, tensor)


@pytest.mark.parametrize("tensor", ["", "x", "\ud800", "a\0b", "y" * 100_000], ids=ascii)
def test_an_index_may_name_a_tensor_of_its_own_but_no_file(folder: Path, tensor: str) -> None:
    index = _shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], tensor: SHARD}}))
    _read_index(folder)  # as to transformers, the index says which files there are
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], tensor: "absent.safetensors"}}))
    assert refusal("tensor", lambda: _read_index(folder), INDEX, "absent.safetensors")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "a\0b", ""])
def test_an_index_names_no_file_outside_its_folder(folder: Path, name: str) -> None:
    index = _shard(folder)
    shutil.copy(folder / SHARD, folder.parent / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(index["weight_map"], name)}))
    assert refusal(name, lambda: _read_index(folder), INDEX, "must be a file of the folder")


@pytest.mark.parametrize("kind", NO_OBJECTS)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_file_that_is_no_json_object_is_refused_by_name(folder: Path, file: str, kind: str) -> None:
    _shard(folder)
    (folder / file).write_bytes(NO_OBJECTS[kind])
    assert refusal(kind, lambda: _read_index(folder), str(folder / file))


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_byte_order_mark_is_read_over(folder: Path, file: str) -> None:
    _shard(folder)
    (folder / file).write_bytes(codecs.BOM_UTF8 + (folder / file).read_bytes())
    _read_index(folder)


# Whole engines

STARTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # A file, what is changed in it, and the words of the refusal, none if the engine starts.
    "odd but right": ("config.json", {"use_cache": "x", "auto_map": {"a": "b"}, "pad_token_id": -1}, []),
    "eos": ("generation_config.json", {"eos_token_id": 1.5}, ["generation_config.json", "eos_token_id=1.5"]),
    "no eos": ("generation_config.json", {"eos_token_id": None}, []),
    "temperature": (
        "generation_config.json",
        {"do_sample": True, "temperature": "hot"},
        ["generation_config.json", "temperature='hot'"],
    ),
    "greedy": ("generation_config.json", {"do_sample": True, "temperature": 0, "top_k": 0}, []),
    "top_p": (
        "generation_config.json",
        {"do_sample": True, "top_p": float("nan")},
        ["generation_config.json", "top_p=nan"],
    ),
    "vocabulary": ("config.json", {"vocab_size": 2**24}, ["config.json", "vocab_size=16777216"]),
    "heads": ("config.json", {"num_attention_heads": 8}, ["config.json", "num_attention_heads=8"]),
    "positions": ("config.json", {"max_position_embeddings": 2**31 - 1}, ["max_model_len=2147483647"]),
    "layers": ("config.json", {"num_hidden_layers": 2**24}, ["config.json", "num_hidden_layers=16777216"]),
    "head": ("config.json", {"tie_word_embeddings": None}, []),
    "epsilon": ("config.json", {"rms_norm_eps": 5e-324}, ["config.json", "rms_norm_eps=5e-324"]),
    "token": ("tokenizer_config.json", {"eos_token": ["a"]}, ["tokenizer_config.json", "eos_token"]),
    "template": ("tokenizer_config.json", {"chat_template": [None]}, ["tokenizer_config.json", "chat_template"]),
    "vocab": ("tokenizer.json", {"model": {"type": "BPE", "vocab": None}}, ["tokenizer.json"]),
    "index": (INDEX, {"metadata": None}, []),
    "no map": (INDEX, {"weight_map": None}, [INDEX, "weight_map=None"]),
    "elsewhere": (INDEX, {"weight_map": {"model.norm.weight": "../x"}}, [INDEX, "'../x'", "a file of the folder"]),
}
SAMPLES = 24
"""Fields with a value, out of all of them, that engines of one and of two ranks are started with."""


def _start(folder: Path, name: str, ranks: int) -> list[int] | str:
    """The tokens of an engine on the changed folder, or the words with which it did not start."""
    file, changes, words = STARTS[name]
    outcome = _start_changed(folder, file, changes, ranks, *words)
    assert isinstance(outcome, str) == bool(words), outcome
    return outcome


def _start_changed(folder: Path, file: str, changes: dict[str, Any], ranks: int, *words: str) -> list[int] | str:
    if file == INDEX:
        _shard(folder)
    (folder / file).write_text(json.dumps({**read_json(folder / file), **changes}))
    tokens: list[int] = []

    def answer() -> None:
        with LLM(str(folder), **CONFIG, ranks=ranks) as llm:
            completion = llm.generate(["abc"], SamplingParams(max_tokens=8, ignore_eos=True, seed=1))[0].outputs[0]
            tokens.extend(completion.token_ids)

    return refusal(f"{file}: {changes!r:.200} at ranks={ranks}", answer, *words) or tokens


@pytest.mark.parametrize("name", STARTS)
def test_an_engine_answers_or_says_why_it_does_not_start(folder: Path, name: str) -> None:
    outcome = _start(folder, name, 1)
    assert isinstance(outcome, str) or len(outcome) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTS)
def test_two_ranks_answer_as_one_or_say_the_same(tiny: Path, tmp_path: Path, name: str) -> None:
    one, two = (_start(_copied(tiny, tmp_path / "model"), name, ranks) for ranks in (1, 2))
    assert type(one) is type(two)
    # How much room there is depends on the number of ranks.
    assert one == two or name == "positions"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(SAMPLES))
def test_two_ranks_make_of_any_value_what_one_makes_of_it(tiny: Path, tmp_path: Path, number: int) -> None:
    draw = random.Random(number)
    fields = {
        "config.json": list(CONFIG_FIELDS),
        "generation_config.json": list(GENERATION_FIELDS),
        "tokenizer_config.json": list(SETTINGS_FIELDS),
        INDEX: ["weight_map", "metadata", "other"],
    }
    file = draw.choice(list(fields))
    field, value = draw.choice(fields[file]), draw.choice(list(VALUES))
    one, two = (
        _start_changed(_copied(tiny, tmp_path / "model"), file, {field: VALUES[value]}, ranks) for ranks in (1, 2)
    )
    if isinstance(one, str) and isinstance(two, str):
        assert file in one
        assert file in two
    assert one == two, (file, field, value)


def _copied(model: Path, folder: Path) -> Path:
    """The same folder for one and two ranks, one after the other: messages name it."""
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(model, folder))
