"""config.json as transformers 4 and 5 write it becomes a spec; what is not supported is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from phalanx import CheckpointError, ConfigError
from phalanx.engine.models.spec import (
    MINIMUM_TRANSFORMERS,
    ModelSpec,
    check_transformers,
    dimensions,
    position_limit,
    read_config,
    spec_from_config,
    window_words,
)
from phalanx.launch.cli.presets import load_preset, presets
from phalanx.parallel.partition import partition

QWQ: dict[str, Any] = load_preset("qwq_32b_preview")["shape"]
LLAMA: dict[str, Any] = load_preset("smollm2_135m")["shape"]
SMALL = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 1000, "num_hidden_layers": 3}

YARN = {"factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", **YARN},
    {"rope_type": "yarn", "factor": 4.0},  # extends what max_position_embeddings states
    {"rope_type": "yarn", **YARN, "beta_fast": 24, "beta_slow": 2, "attention_factor": 1.25},
    {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    {"rope_type": "yarn", **YARN, "factor": None},
    {"rope_type": "yarn", **YARN, "beta_fast": 0, "beta_slow": 0, "mscale": 0, "mscale_all_dim": 0},  # 0 is none there
    {"rope_type": "yarn", **YARN, "truncate": None},
    {"rope_type": "llama3", **LLAMA3},
]


def _transformers_config(architecture: str, **fields: Any) -> Any:
    import transformers

    return getattr(transformers, f"{architecture}Config")(**fields)


def _spec(config: Any, architecture: str) -> ModelSpec:
    """Through JSON, as a config.json would have it."""
    fields = {**json.loads(json.dumps(config.to_dict())), "architectures": [f"{architecture}ForCausalLM"]}
    return spec_from_config(fields, "folder")


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": [5, 7]}]
)
def test_transformers_own_configs_are_read_as_transformers_means_them(
    architecture: str, changes: dict[str, Any]
) -> None:
    config = _transformers_config(architecture, **{**SMALL, "num_key_value_heads": 4, **changes})
    spec = _spec(config, architecture)
    assert (spec.hidden_size, spec.num_query_heads, spec.num_layers) == (512, 8, 3)
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == (getattr(config, "head_dim", None) or 64)
    assert (spec.intermediate_size, spec.vocab_size) == (1000, config.vocab_size)
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.max_position == config.max_position_embeddings
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.tied_embeddings == config.tie_word_embeddings
    eos = config.eos_token_id
    assert spec.eos_token_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
    assert spec.bos_token_id == config.bos_token_id


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_fields_that_are_left_out_mean_what_they_mean_to_transformers(architecture: str) -> None:
    sizes = {**SMALL, "vocab_size": 1000, "max_position_embeddings": 256, "num_key_value_heads": 8}
    config = _transformers_config(architecture, **sizes)
    spec = spec_from_config({**sizes, "architectures": [f"{architecture}ForCausalLM"]}, "folder")
    ids = {
        "eos_token_ids": (),
        "bos_token_id": None,
    }  # Llama's classes have ids of their own, its checkpoints state them
    assert dataclasses.replace(spec, **ids) == dataclasses.replace(_spec(config, architecture), **ids)


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("bias", [False, True])
def test_biases_and_head_norms_are_those_of_transformers_modules(architecture: str, bias: bool) -> None:
    import transformers

    changes = {} if architecture == "Qwen2" else {"attention_bias": bias}
    changes |= {"mlp_bias": bias} if architecture == "Llama" else {}
    tiny = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    config = _transformers_config(architecture, **tiny, num_hidden_layers=1, vocab_size=50, **changes)
    names = dict(getattr(transformers, f"{architecture}ForCausalLM")(config).named_parameters())
    spec = _spec(config, architecture)
    layer = "model.layers.0."
    assert spec.qkv_bias == (f"{layer}self_attn.q_proj.bias" in names) == (f"{layer}self_attn.v_proj.bias" in names)
    assert spec.output_bias == (f"{layer}self_attn.o_proj.bias" in names)
    assert spec.mlp_bias == (f"{layer}mlp.down_proj.bias" in names)
    assert spec.qk_norm == (f"{layer}self_attn.q_norm.weight" in names)


@pytest.mark.parametrize("form", [4, 5])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
def test_rope_of_both_forms_turns_heads_as_transformers_does(rope: dict[str, Any], form: int) -> None:
    import torch
    from phalanx.kernels.rope import RotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    theta, sizes = 500000.0, {**SMALL, "vocab_size": 100, "max_position_embeddings": 32768, "num_key_value_heads": 8}
    if form == 4:
        kind = {"type": rope["rope_type"]}
        written = {"rope_theta": theta, "rope_scaling": kind | {k: v for k, v in rope.items() if k != "rope_type"}}
    else:
        written = {"rope_parameters": {**rope, "rope_theta": theta}}
    fields = json.loads(json.dumps({**sizes, **written, "architectures": ["Qwen2ForCausalLM"]}))
    spec = spec_from_config(fields, "folder")
    positions = torch.tensor([0, 1, 77, 4096, 40000])
    expected = Qwen2RotaryEmbedding(_transformers_config("Qwen2", **fields))(torch.zeros(1), positions[None])
    lengths = torch.full_like(positions, 40001)
    ours = RotaryEmbedding(
        head_dim=spec.head_dim,
        max_position=spec.max_position,
        table_length=40960,
        dtype=torch.float32,
        device=torch.device("cpu"),
        **dataclasses.asdict(spec.rope),
    )(positions, lengths)
    for mine, theirs in zip(ours, expected, strict=True):
        # transformers writes each pair's value twice, for both halves of a head; its dynamic base is a float32.
        half = spec.head_dim // 2
        torch.testing.assert_close(mine.squeeze(1)[:, :half], theirs[0, :, :half], atol=1e-3, rtol=0)


def test_old_scaling_wins_over_new_and_inner_theta_over_outer() -> None:
    fields = {
        **QWQ,
        "rope_theta": 1.0,
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    }
    rope = spec_from_config(fields, "folder").rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 7.0, 2.0)


def test_positions_before_scaling_are_multiplied_and_those_after_it_are_not() -> None:
    def limit(**rope: Any) -> int:
        return position_limit(spec_from_config({**QWQ, "rope_scaling": rope}, "folder"))

    assert limit(type="linear", factor=2.5) == 81920
    assert limit(type="dynamic", factor=2.0) == 65536
    assert limit(type="yarn", **YARN) == limit(type="llama3", **LLAMA3) == 32768
    # The cards of Qwen2.5 and QwQ: max_position_embeddings stays as it was.
    assert limit(type="yarn", factor=4.0, original_max_position_embeddings=32768) == limit(type="yarn", factor=4.0)
    assert limit(type="yarn", factor=4.0) == 131072
    assert position_limit(spec_from_config(QWQ, "folder")) == 32768


def test_a_llama_from_before_grouped_query_attention_has_as_many_kv_heads_as_query_heads() -> None:
    fields = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
    assert spec_from_config(fields, "folder").num_kv_heads == 9
    assert spec_from_config({**QWQ, "num_key_value_heads": None}, "folder").num_kv_heads == 40


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [({"dtype": "float16"}, "float16"), ({"torch_dtype": "torch.bfloat16"}, "bfloat16"), ({}, "float32")],
)
def test_dtype_is_read_under_both_of_its_names(fields: dict[str, str], dtype: str) -> None:
    unnamed = {name: value for name, value in QWQ.items() if name != "torch_dtype"}
    assert spec_from_config({**unnamed, **fields}, "folder").dtype == dtype


@pytest.mark.parametrize("name", presets())
def test_every_preset_states_a_shape_that_can_be_cut_at_any_number_of_ranks(name: str) -> None:
    preset = load_preset(name)
    spec = spec_from_config(preset["shape"], name)
    for ranks in (1, spec.num_kv_heads, spec.num_query_heads):
        partition(dimensions(spec), ranks)
    assert (
        spec.architecture
        == {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[
            preset["shape"]["model_type"]
        ]
    )


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwq_32b_preview", 32.76),
        ("qwq_32b", 32.76),
        ("qwen2_5_0_5b", 0.494),
        ("qwen2_5_1_5b", 1.544),
        ("qwen2_5_3b", 3.09),
        ("qwen2_5_7b", 7.62),
        ("qwen2_5_14b", 14.77),
        ("qwen2_5_32b", 32.76),
        ("qwen2_5_72b", 72.71),
        ("qwen3_0_6b", 0.596),
        ("qwen3_32b", 32.76),
        ("smollm2_135m", 0.1345),
    ],
)
def test_presets_have_as_many_parameters_as_their_models_are_published_with(name: str, billions: float) -> None:
    parts = partition(dimensions(spec_from_config(load_preset(name)["shape"], name)), 1)
    assert parts.parameters(0) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_makers_sampling_advice_comes_with_qwq_32b_alone() -> None:
    advised = {name: load_preset(name)["sampling"] for name in presets() if "sampling" in load_preset(name)}
    assert advised == {"qwq_32b": {"temperature": 0.6, "top_p": 0.95, "top_k": 40, "min_p": 0.0}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel.*Qwen2ForCausalLM.*Qwen3ForCausalLM.*LlamaFor"),
        ({"architectures": None, "model_type": "gpt2"}, "Qwen2ForCausalLM"),
        ({"architectures": [], "model_type": "gpt2"}, "Qwen2ForCausalLM"),
        ({"architectures": 7}, "Qwen2ForCausalLM"),
        ({"hidden_size": None}, r"folder/config\.json: hidden_size=None"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"vocab_size": 1.5}, r"vocab_size=1\.5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 7}, "num_key_value_heads=7.*num_attention_heads=40"),
        ({"head_dim": 127}, "head_dim=127.*even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"eos_token_id": ["end"]}, "eos_token_id="),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"hidden_act": ["silu"]}, "hidden_act=.*silu"),
        ({"is_causal": False}, "is_causal=false"),
        ({"is_causal": "no"}, "is_causal='no'"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "head_dim=2.*dynamic"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window=0"),
        ({"layer_types": "all", "use_sliding_window": True}, "layer_types='all'"),
        ({"layer_types": ["chunked_attention"] * 64}, "layer_types=.*of full_attention and sliding_attention"),
        ({"layer_types": [{}] * 64}, "layer_types="),
        ({"layer_types": ["full_attention"] * 63}, "layer_types=.*a list of 64"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers='all'"),
        ({"rope_scaling": {"type": "longrope"}}, r"longrope.*default, linear, dynamic, yarn, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor=None"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "rope_scaling: factor='2'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor=None"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"rope_theta": -1}, "rope_theta=-1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn.*bfloat16"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_from_config({**QWQ, **change}, "folder")


def test_the_other_name_of_silu_and_a_model_that_says_that_it_is_causal_are_taken() -> None:
    assert spec_from_config({**QWQ, "hidden_act": "swish", "is_causal": True}, "folder") == spec_from_config(QWQ, "")


def test_a_qwen_without_its_kv_heads_is_refused() -> None:
    fields = {name: value for name, value in QWQ.items() if name != "num_key_value_heads"}
    with pytest.raises(ConfigError, match="num_key_value_heads=None"):
        spec_from_config(fields, "folder")


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_rope_parameters_nested_by_the_layers_kind_are_those_of_the_kinds_that_there_are(name: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 7.0}
    nested = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    plain = spec_from_config({**QWQ, name: yarn}, "folder")
    assert spec_from_config({**QWQ, name: nested}, "folder") == plain
    assert spec_from_config({**QWQ, name: {"full_attention": yarn}}, "folder") == plain

    both = {"use_sliding_window": True, "layer_types": [*["full_attention"] * 63, "sliding_attention"]}
    with pytest.raises(ConfigError, match=rf"{name}: layers of full_attention and sliding_attention must have equal"):
        spec_from_config({**QWQ, **both, name: nested}, "folder")
    same = spec_from_config({**QWQ, **both, name: dict.fromkeys(nested, yarn)}, "folder")
    assert same.rope == plain.rope
    for missing in ({"sliding_attention": yarn}, {**nested, "full_attention": None}, {**nested, "full_attention": 3}):
        with pytest.raises(ConfigError, match=rf"{name}: full_attention="):
            spec_from_config({**QWQ, name: missing}, "folder")


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"max_window_layers": 0}, 100),
        ({"max_window_layers": 63}, 100),
        ({"max_window_layers": 64}, None),
        ({"max_window_layers": 10**6}, None),
        ({"layer_types": [*["full_attention"] * 63, "sliding_attention"]}, 100),
        ({"layer_types": ["full_attention"] * 64, "max_window_layers": 0}, None),
        ({"layer_types": ["sliding_attention"] * 64, "use_sliding_window": False}, None),
        ({"layer_types": ["sliding_attention"] * 64, "max_window_layers": "none"}, 100),
        ({"architectures": ["LlamaForCausalLM"], "layer_types": ["sliding_attention"] * 64}, None),
    ],
)
def test_each_form_of_a_sliding_window_means_what_it_means_to_transformers(
    change: dict[str, Any], window: int | None
) -> None:
    fields = {**QWQ, "use_sliding_window": True, "sliding_window": 100, **change}
    assert spec_from_config(fields, "folder").attention_window == window


def test_where_attention_slides_a_sequence_ends_with_the_window() -> None:
    sliding = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 64}
    for change, limit in (({}, 4096), ({"sliding_window": 100}, 100), ({"sliding_window": 10**6}, 32768)):
        spec = spec_from_config({**QWQ, **sliding, **change}, "folder")
        assert position_limit(spec) == limit
        assert str(spec.attention_window) in window_words(spec)
    assert window_words(spec_from_config(QWQ, "folder")) == ""


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 32768},
        {"use_sliding_window": True, "max_window_layers": 64},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 64},
        {"layer_types": None},
    ],
)
def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(change: dict[str, Any]) -> None:
    assert spec_from_config({**QWQ, **change}, "folder") == spec_from_config(QWQ, "folder")


@pytest.mark.parametrize("architecture", MINIMUM_TRANSFORMERS)
def test_an_old_transformers_is_told_which_version_is_needed(architecture: str) -> None:
    spec = spec_from_config({**QWQ, "architectures": [architecture]}, "folder")
    needed = MINIMUM_TRANSFORMERS[architecture]
    for enough in (needed, f"{needed}.0", f"{needed}rc1", f"{needed}.0.dev0", "5.0.0", "10.1"):
        check_transformers(spec, enough)
    with pytest.raises(ConfigError, match=rf"4\.27\.4.*{architecture}.*{needed}"):
        check_transformers(spec, "4.27.4")


def test_a_folder_without_a_readable_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    config = tmp_path / "config.json"
    for content, words in ((b"{not json", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[]", "JSON object")):
        config.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"config\.json .*{words}"):
            read_config(tmp_path)
    config.write_text(json.dumps(QWQ))
    assert read_config(tmp_path) == QWQ


@pytest.mark.parametrize("architecture", MINIMUM_TRANSFORMERS)
def test_a_config_that_names_no_architecture_is_of_its_type(architecture: str) -> None:
    model_type = architecture.removesuffix("ForCausalLM").lower()
    for named in ({}, {"architectures": None}, {"architectures": []}):
        fields = {name: value for name, value in QWQ.items() if name != "architectures"}
        assert spec_from_config({**fields, **named, "model_type": model_type}, "folder").architecture == architecture
    for other in ("mistral", None, 5, ["qwen2"]):
        with pytest.raises(ConfigError, match=r"folder/config\.json: architecture None is not supported"):
            spec_from_config({**fields, "model_type": other}, "folder")


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_a_quantized_checkpoint_is_refused_by_its_method(field: str, method: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is set \(quant_method='{method}'\)"):
        spec_from_config({**QWQ, field: {"quant_method": method, "bits": 4}}, "folder")


def test_a_folder_that_holds_an_adapter_alone_is_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter .*no config\.json.*merge it into its base model"):
        read_config(tmp_path)


@pytest.mark.parametrize(("architecture", "positions"), [("Llama", 2048), ("Qwen2", 32768), ("Qwen3", 32768)])
def test_without_positions_a_model_has_those_that_transformers_gives_it(architecture: str, positions: int) -> None:
    fields = {name: value for name, value in QWQ.items() if name != "max_position_embeddings"}
    spec = spec_from_config({**fields, "architectures": [f"{architecture}ForCausalLM"]}, "folder")
    assert spec.max_position == position_limit(spec) == positions
    assert _transformers_config(architecture).max_position_embeddings == positions


def test_a_negative_token_id_stands_for_none() -> None:
    spec = spec_from_config({**QWQ, "eos_token_id": [-1, 7], "bos_token_id": -1}, "folder")
    assert (spec.eos_token_ids, spec.bos_token_id) == ((7,), None)
