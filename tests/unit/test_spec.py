"""config.json as transformers 4 and 5 write it becomes a spec; what is not supported is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phalanx import CheckpointError, ConfigError
from phalanx.engine.models.spec import check_transformers, dimensions, read_config, spec_from_config
from phalanx.launch.presets import load_preset, presets

QWQ: dict[str, Any] = load_preset("qwq_32b_preview")["shape"]


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "Llama"])
def test_transformers_own_configs_are_read_as_transformers_means_them(architecture: str) -> None:
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        hidden_size=512, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1000, num_hidden_layers=3
    )
    fields = {**config.to_dict(), "architectures": [f"{architecture}ForCausalLM"]}
    spec = spec_from_config(fields, "folder")
    assert (spec.hidden_size, spec.num_query_heads, spec.num_kv_heads, spec.num_layers) == (512, 8, 2, 3)
    assert spec.head_dim == (getattr(config, "head_dim", None) or 64)
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.qkv_bias == (architecture == "Qwen2")
    assert spec.qk_norm == (architecture == "Qwen3")


@pytest.mark.parametrize("name", presets())
def test_every_preset_states_a_shape_that_can_be_cut(name: str) -> None:
    spec = spec_from_config(load_preset(name)["shape"], name)
    assert dimensions(spec).num_query_heads % spec.num_kv_heads == 0


def test_rope_parameters_of_both_forms_mean_the_same() -> None:
    old = {
        **QWQ,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    }
    new = {
        **QWQ,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 5e5,
            "original_max_position_embeddings": 32768,
        },
    }
    assert spec_from_config(old, "x").rope == spec_from_config(new, "x").rope
    assert spec_from_config(old, "x").rope.kind == "yarn"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen2ForCausalLM"),
        ({"architectures": None}, "Qwen2ForCausalLM"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_act": "gelu"}, "gelu.*silu"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope.*yarn"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec_from_config({**QWQ, **change}, "folder")


def test_an_old_transformers_is_told_which_version_is_needed() -> None:
    spec = spec_from_config(QWQ, "folder")
    check_transformers(spec, "4.37.0")
    with pytest.raises(ConfigError, match=r"4\.36\.2.*4\.37"):
        check_transformers(spec, "4.36.2")


def test_a_folder_without_a_readable_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_config(tmp_path)
