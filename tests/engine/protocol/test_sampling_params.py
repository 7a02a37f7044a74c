"""SamplingParams: what is accepted, what is refused and in which words, and that it survives the wire."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phalanx import InvalidRequest, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("max_tokens", 0, "[1, inf)"),
        ("max_tokens", -1, "[1, inf)"),
        ("min_tokens", -1, "[0, inf)"),
        ("temperature", -0.5, "[0, inf)"),
        ("temperature", math.nan, "[0, inf)"),
        ("temperature", math.inf, "[0, inf)"),
        ("top_p", 0, "(0, 1]"),
        ("top_p", 1.01, "(0, 1]"),
        ("top_p", math.nan, "(0, 1]"),
        ("top_k", -2, "[-1, inf)"),
        ("min_p", -0.1, "[0, 1]"),
        ("min_p", 1.1, "[0, 1]"),
        ("repetition_penalty", 0, "[1e-18, 1e+18]"),
        ("repetition_penalty", 1e-300, "[1e-18, 1e+18]"),
        ("repetition_penalty", 1e300, "[1e-18, 1e+18]"),
        ("presence_penalty", 2.1, "[-2, 2]"),
        ("frequency_penalty", math.nan, "[-2, 2]"),
        ("seed", 2**63, "[-9.22337e+18, 9.22337e+18]"),
        ("n", 0, "[1, 16384]"),
        ("logprobs", 21, "[0, 20]"),
        ("prompt_logprobs", -1, "[0, 20]"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name_value_and_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert str(caught.value) == f"{field}={value!r} is out of range: it must be in {allowed}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("top_k", "5"),
        ("n", "2"),
        ("stop", 3),
        ("stop", [3]),
        ("stop", ["ok", ""]),
        ("stop", ["\ud83d"]),
        ("stop_token_ids", 5),
        ("stop_token_ids", ["a"]),
        ("logit_bias", [1, 2]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "much"}),
        ("logit_bias", {1: 100.5}),
        ("ignore_eos", "yes"),
        ("skip_special_tokens", 1),
        ("logprobs_mode", "loud"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name_and_value(field: str, value: Any) -> None:
    for make in (lambda: SamplingParams(**{field: value}), lambda: SamplingParams.from_dict({field: value})):
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert field in str(caught.value)
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        assert any(repr(part) in str(caught.value) for part in parts)


def test_an_unknown_field_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(InvalidRequest, match=r"unknown sampling field 'temprature'.*temperature"):
        SamplingParams.from_dict({"temprature": 1})


def test_fewer_tokens_than_the_least_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens=5 is above max_tokens=4: set min_tokens to at most 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_edges_of_the_ranges_are_accepted() -> None:
    SamplingParams(
        max_tokens=1, temperature=0, top_k=-1, top_p=1, min_p=1, repetition_penalty=1e-9, presence_penalty=-2,
        frequency_penalty=2, logit_bias={0: -100}, seed=-(2**63), logprobs=20, prompt_logprobs=0,
    )  # fmt: skip


def test_what_users_write_becomes_the_stored_form() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]) == SamplingParams(stop=("a", "b"), stop_token_ids=(1,))
    assert SamplingParams.from_dict({"stop": "END", "logit_bias": {"7": 1}}) == SamplingParams(
        stop=("END",), logit_bias={7: 1}
    )


@pytest.mark.parametrize("field", SamplingParams.__struct_fields__)
def test_null_is_as_good_as_no_value(field: str) -> None:
    assert SamplingParams(**{field: None}) == SamplingParams.from_dict({field: None}) == SamplingParams()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(10, 10**9),
            "min_tokens": st.integers(0, 10),
            "temperature": st.floats(0, 1e6),
            "top_k": st.integers(-1, 10**9),
            "top_p": st.floats(1e-6, 1),
            "logit_bias": st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100)),
            "seed": st.integers(-(2**63), 2**63 - 1),
            "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
            "stop_token_ids": st.lists(st.integers(0, 10**6)),
            "ignore_eos": st.booleans(),
        },
    )
)
def test_valid_parameters_survive_json_and_the_wire(values: dict[str, Any]) -> None:
    params = SamplingParams.from_dict(values)
    assert SamplingParams.from_dict(msgspec.json.decode(msgspec.json.encode(params))) == params
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_numbers_of_numpy_and_torch_are_pythons_numbers() -> None:
    given = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(7),
        seed=torch.tensor(3),
        stop_token_ids=np.array([4, 5]),
        logit_bias={np.int32(6): np.float64(-1.5)},
        ignore_eos=np.bool_(True),
    )
    assert given == SamplingParams(
        temperature=0.5, top_k=7, seed=3, stop_token_ids=(4, 5), logit_bias={6: -1.5}, ignore_eos=True
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=SamplingParams) == given
    with pytest.raises(InvalidRequest, match=r"top_k=\[7, 8\] must be an integer"):
        SamplingParams(top_k=np.array([7, 8]))
    with pytest.raises(InvalidRequest, match="temperature=nan is out of range"):
        SamplingParams(temperature=np.float32("nan"))


@pytest.mark.parametrize("make", [SamplingParams, lambda **f: SamplingParams.from_dict(f)])
@pytest.mark.parametrize("kind", [list, tuple, set, frozenset, iter, dict.fromkeys, lambda values: (v for v in values)])
def test_lists_may_come_in_any_collection_that_is_no_mapping(make: Any, kind: Any) -> None:
    lists = {"stop": ["a", "b"], "bad_words": ["a"], "stop_token_ids": [1, 2], "allowed_token_ids": [3]}
    for name, values in lists.items():
        given = kind(values)
        if isinstance(given, dict):
            with pytest.raises(InvalidRequest, match=name):
                make(**{name: given})
            given = given.keys()
        assert getattr(make(**{name: given}), name) == tuple(values)


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "allowed_token_ids"])
def test_an_iterator_that_does_not_end_is_refused(name: str) -> None:
    endless = itertools.repeat("a" if name in ("stop", "bad_words") else 1)
    with pytest.raises(InvalidRequest, match=f"{name} holds .* it may hold at most"):
        SamplingParams(**{name: endless})


def test_token_ids_of_a_bias_may_be_text_as_in_json() -> None:
    assert SamplingParams(logit_bias={"5": 1, 6: 2}).logit_bias == {5: 1, 6: 2}
    for bias, words in (
        ({"5": 1, 5: 2}, "5 twice"),
        ({"x": 1}, "key='x'"),
        ({"-1": 1}, "'-1'"),
        ({"\u0663": 1}, "key="),
    ):
        with pytest.raises(InvalidRequest, match=words):
            SamplingParams(logit_bias=bias)


def test_numbers_beyond_64_bits_mean_no_limit_and_travel() -> None:
    given = SamplingParams(max_tokens=10**30, min_tokens=10**25, top_k=10**40)
    assert (given.max_tokens, given.min_tokens, given.top_k) == (2**63 - 1,) * 3
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(given), type=SamplingParams) == given


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stop": ["a"] * 65}, "stop holds 65 strings; it may hold at most 64"),
        ({"stop": "a" * 1025}, "stop holds a string of 1025 characters; each may have at most 1024"),
        ({"bad_words": ["a"] * 129}, "bad_words holds 129 strings; it may hold at most 128"),
        ({"bad_words": ["a", ""]}, r"bad_words=\('a', ''\) must be a string or a list of non-empty strings"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\(\) must be a list of token ids that is not empty"),
        ({"allowed_token_ids": [-1]}, r"allowed_token_ids=-1 is out of range"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias holds 1025 token ids; it may hold at most 1024"),
        ({"stop_token_ids": list(range(1025))}, "stop_token_ids holds 1025 token ids; it may hold at most 1024"),
        ({"n": 16385}, r"n=16385 is out of range: it must be in \[1, 16384\]"),
    ],
)
def test_lists_and_texts_are_bounded_and_the_bound_is_named(values: dict[str, Any], words: str) -> None:
    for make in (SamplingParams.from_dict, lambda given: SamplingParams(**given)):
        with pytest.raises(InvalidRequest, match=words):
            make(values)


def test_what_may_not_or_alone_may_be_sampled_is_a_list_and_a_bad_word_may_be_one_string() -> None:
    expected = SamplingParams(bad_words=("no",), allowed_token_ids=(3, 4), include_stop_str_in_output=True)
    given = {"bad_words": "no", "allowed_token_ids": [3, 4], "include_stop_str_in_output": True}
    assert SamplingParams.from_dict(given) == expected
    assert SamplingParams(**given) == expected  # type: ignore[arg-type]
    assert SamplingParams(allowed_token_ids=range(3, 5)).allowed_token_ids == (3, 4)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="include_stop_str_in_output=1 must be true or false"):
        SamplingParams(include_stop_str_in_output=1)  # type: ignore[arg-type]


def test_numbers_and_arrays_of_numpy_are_taken_from_a_mapping_as_from_the_call() -> None:
    values = {
        "max_tokens": np.int32(3),
        "temperature": np.float32(0.5),
        "top_k": np.uint8(4),
        "seed": np.int64(5),
        "ignore_eos": np.bool_(True),
        "stop": np.array(["a", "b"]),
        "stop_token_ids": [np.int64(1), 2],
        "logit_bias": {np.int64(3): np.float32(1)},
    }
    assert SamplingParams.from_dict(values) == SamplingParams(**values)


def test_half_of_a_surrogate_pair_in_a_number_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        SamplingParams.from_dict({"temperature": "\ud800"})


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty", "presence_penalty", "seed", "n"])
def test_an_integer_that_no_number_holds_is_refused_by_name(name: str, digits: int) -> None:
    for make in (SamplingParams.from_dict, lambda given: SamplingParams(**given)):
        with pytest.raises(InvalidRequest, match="out of range") as caught:
            make({name: 10**digits})
        assert f"{name}=" in str(caught.value)


def test_a_bias_of_a_token_of_thousands_of_digits_is_no_fault_of_the_message() -> None:
    with pytest.raises(InvalidRequest, match="logit_bias key=a int too long to be shown is out of range"):
        SamplingParams(logit_bias={10**5000: 101})


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_a_range_of_more_than_memory_holds_is_refused_by_its_bound(name: str) -> None:
    for make in (SamplingParams.from_dict, lambda given: SamplingParams(**given)):
        with pytest.raises(InvalidRequest, match=f"{name} holds .* it may hold at most"):
            make({name: range(10**15)})


def test_a_long_value_is_shown_by_its_beginning() -> None:
    with pytest.raises(InvalidRequest, match="temperature='xxx") as caught:
        SamplingParams.from_dict({"temperature": "x" * 1_000_000})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("make", [SamplingParams, SamplingParams.from_dict])
def test_a_number_of_any_class_is_kept_as_pythons_and_travels(make: Any) -> None:
    values = {"temperature": 10**30, "top_p": Decimal("0.5"), "min_p": Fraction(1, 4), "repetition_penalty": 2}
    params = make(**values) if make is SamplingParams else make(values)
    kept = (params.temperature, params.top_p, params.min_p, params.repetition_penalty)
    assert kept == (1e30, 0.5, 0.25, 2.0)
    assert {type(value) for value in kept} == {float}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("name", ["stop", "bad_words", "stop_token_ids", "allowed_token_ids", "logit_bias"])
@pytest.mark.parametrize("value", [torch.tensor(0.5), np.float32(0.5), range(1, 3), 5, object()])
def test_what_is_no_list_and_no_mapping_is_refused_by_name_from_a_mapping_too(name: str, value: Any) -> None:
    if name.endswith("ids") and isinstance(value, range):
        return  # token ids
    for make in (lambda: SamplingParams(**{name: value}), lambda: SamplingParams.from_dict({name: value})):
        with pytest.raises(InvalidRequest, match=name):
            make()


def test_bytes_in_a_view_are_no_list_of_token_ids() -> None:
    for name in ("stop_token_ids", "allowed_token_ids"):
        with pytest.raises(InvalidRequest, match=f"{name}=<memory"):
            SamplingParams(**{name: memoryview(b"12")})


@pytest.mark.parametrize("make", [SamplingParams, SamplingParams.from_dict])
def test_a_bias_may_be_an_exact_number(make: Any) -> None:
    values = {"logit_bias": {7: Decimal("1.5"), 8: Fraction(1, 2)}}
    params = make(**values) if make is SamplingParams else make(values)
    assert params.logit_bias == {7: 1.5, 8: 0.5}


@pytest.mark.parametrize("token", [2**64, 10**400])
def test_a_token_id_that_no_message_carries_is_refused_by_name(token: int) -> None:
    for values in ({"stop_token_ids": [token]}, {"allowed_token_ids": [token]}, {"logit_bias": {token: 1}}):
        with pytest.raises(InvalidRequest, match=f"{next(iter(values))}.* is out of range"):
            SamplingParams(**values)  # type: ignore[arg-type]


def test_not_a_number_is_refused_however_it_is_written() -> None:
    for value in (Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Fraction(10**400)):
        with pytest.raises(InvalidRequest, match="temperature="):
            SamplingParams(temperature=value)  # type: ignore[arg-type]
