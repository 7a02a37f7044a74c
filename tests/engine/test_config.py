"""EngineConfig: every setting is checked where it is made, in words that name it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from phalanx import ConfigError, EngineConfig, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("model", "", "a folder or a hub name"),
        ("model", 3, "a folder or a hub name"),
        ("tokenizer", 3, "a folder"),
        ("dtype", "int7", "auto, bfloat16, float16, float32"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("collectives", "mpi", "auto, shared_memory, gloo, nccl"),
        ("bind_cpus", "on", "auto, always, never"),
        ("bind_cpus", True, "auto, always, never"),
        ("attention", "magic", "auto, cpu, torch"),
        ("quantization", "int1", "none"),
        ("load_format", "pickle", "auto, safetensors, dummy"),
        ("ranks", 0, "at least 1"),
        ("ranks", 2.0, "an integer"),
        ("ranks", True, "an integer"),
        ("threads", -1, "at least 0"),
        ("threads", 257, "at most 256"),
        ("max_model_len", 0, "at least 1"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_batched_tokens", "many", "an integer"),
        ("max_queue", 0, "at least 1"),
        ("block_size", -16, "at least 1"),
        ("kv_memory", 0, "a fraction in (0, 1]"),
        ("kv_memory", -1.0, "bytes"),
        ("kv_memory", math.nan, "bytes"),
        ("kv_memory", math.inf, "bytes"),
        ("kv_memory", "4GB", "bytes"),
        ("timeout_s", 0, "above 0"),
        ("timeout_s", None, "above 0"),
        ("timeout_s", 1e11, "at most 604800 seconds"),
        ("prefix_cache", "yes", "true or false"),
        ("deterministic", 1, "true or false"),
        ("seed", 0.5, "an integer"),
        ("seed", 2**64, "an integer"),
        ("sampling", 3, "sampling fields"),
        ("rank_weights", [1, -1], "positive numbers"),
        ("rank_weights", "ab", "positive numbers"),
        ("rank_weights", 3, "positive numbers"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name_and_value(field: str, value: Any, allowed: str) -> None:
    values = {"model": "m", **({"ranks": 2} if field == "rank_weights" else {}), field: value}
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_dict(values)
    assert f"{field}={value!r}" in str(caught.value)
    assert allowed in str(caught.value)


def test_a_budget_below_the_sequences_is_refused_and_both_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=4 .*max_num_seqs=8.*raise .* or lower"):
        EngineConfig(model="m", max_num_batched_tokens=4, max_num_seqs=8)


def test_rank_weights_must_be_one_for_each_rank() -> None:
    with pytest.raises(ConfigError, match=r"rank_weights=\(1, 2\) must be 3 positive numbers, one for each of ranks=3"):
        EngineConfig(model="m", ranks=3, rank_weights=(1, 2))
    assert EngineConfig.from_dict({"model": "m", "ranks": 2, "rank_weights": [1, 2]}).rank_weights == (1.0, 2.0)


def test_paths_and_numpys_numbers_are_taken_as_text_and_numbers(tmp_path: Path) -> None:
    config = EngineConfig(model=tmp_path, tokenizer=tmp_path, ranks=np.int64(2), rank_weights=np.array([1, 2]))  # type: ignore[arg-type]
    assert (config.model, config.tokenizer) == (str(tmp_path), str(tmp_path))
    assert (type(config.ranks), config.rank_weights) == (int, (1.0, 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, np.dtype("float32"), np.str_("float32")])
def test_a_dtype_of_torch_or_numpy_is_taken_by_its_name(dtype: Any) -> None:
    config = EngineConfig(model="m", dtype=dtype)
    assert (type(config.dtype), config.dtype) == (str, "float32")


def test_a_value_that_only_equals_a_name_is_refused() -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = object.__hash__

    with pytest.raises(ConfigError, match="device="):
        EngineConfig(model="m", device=Equal())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "weights",
    [[np.float32(1), np.float16(2)], (Decimal(1), Fraction(2)), [torch.tensor(1.0), 2], iter([1, 2]), range(1, 3)],
)
def test_rank_weights_may_be_any_numbers_in_any_collection_with_an_order(weights: Any) -> None:
    config = EngineConfig(model="m", ranks=2, rank_weights=weights)
    assert config.rank_weights == (1.0, 2.0)
    assert {type(weight) for weight in config.rank_weights} == {float}
    for wrong in ({1, 2}, itertools.repeat(1), [True, 2], {1: 2}):
        with pytest.raises(ConfigError, match="rank_weights="):
            EngineConfig(model="m", ranks=2, rank_weights=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["kv_memory", "timeout_s", "restart_window_s", "step_timeout_s"])
def test_an_exact_number_is_taken_as_in_a_request(name: str) -> None:
    for value in (Decimal("2.5"), Fraction(5, 2)):
        assert getattr(EngineConfig(**{"model": "m", name: value}), name) == 2.5


def test_sampling_may_be_any_mapping_or_none() -> None:
    for given in ({"top_k": 5}, MappingProxyType({"top_k": 5})):
        assert EngineConfig(model="m", sampling=given).sampling == SamplingParams(top_k=5)  # type: ignore[arg-type]
    assert EngineConfig(model="m", sampling=None).sampling == SamplingParams()  # type: ignore[arg-type]


def test_an_unknown_setting_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq.*did you mean 'max_num_seqs'"):
        EngineConfig.from_dict({"model": "m", "max_num_seq": 3})


def test_a_configuration_is_frozen_and_made_from_plain_data() -> None:
    config = EngineConfig.from_dict({"model": "m", "sampling": {"top_k": 5}})
    assert config.sampling == SamplingParams(top_k=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.ranks = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", ["model", "tokenizer", "tokenizer_store"])
def test_a_path_that_no_message_carries_is_refused_at_every_number_of_ranks(name: str) -> None:
    for ranks in (1, 2):
        with pytest.raises(ConfigError, match=rf"{name}=.* is not valid Unicode"):
            EngineConfig(**{"model": "m", "ranks": ranks, name: "\udcff"})


@pytest.mark.parametrize("name", ["max_queue", "max_num_seqs", "threads", "max_restarts", "max_model_len"])
@pytest.mark.parametrize("value", [2**63, 10**400])
def test_an_integer_that_no_message_carries_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"{name}=.* must be at most {2**63 - 1}"):
        EngineConfig(**{"model": "m", name: value})


@pytest.mark.parametrize("name", ["kv_memory", "restart_window_s", "step_timeout_s", "timeout_s"])
def test_a_number_that_no_float_holds_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        EngineConfig(**{"model": "m", name: 10**400})
