"""safetensors headers from anybody: lengths, offsets, dtypes and shapes that are not, refused by file and tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from phalanx.parallel.loading.json_files import LoadError
from phalanx.parallel.loading.safetensors_files import locate_tensors

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
DATA = b"\0" * 32


def _write(folder: Path, header: bytes, length: int | None = None, data: bytes = DATA) -> None:
    size = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + data)


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "shape": [-2, -2]},
        {**GOOD, "shape": [-4]},
        {**GOOD, "shape": [2.0, 2]},
        {**GOOD, "shape": ["2", 2]},
        {**GOOD, "shape": [True, 4]},
        {**GOOD, "shape": None},
        {**GOOD, "shape": [2**62, 2**62]},
        {**GOOD, "shape": [[2, 2]]},
        {**GOOD, "data_offsets": [16, 0]},
        {**GOOD, "data_offsets": [-16, 0]},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [0, 16, 32]},
        {**GOOD, "data_offsets": [0.0, 16.0]},
        {**GOOD, "data_offsets": [2**63, 2**63 + 16]},
        {**GOOD, "data_offsets": {"0": 16}},
        {**GOOD, "dtype": "F8_E4M3"},
        {**GOOD, "dtype": 32},
        {**GOOD, "dtype": "F" * 10**6},
        {},
        None,
        [],
        "tensor",
    ],
    ids=lambda entry: str(entry)[:60],
)
def test_an_entry_that_describes_no_tensor_is_refused_by_name(tmp_path: Path, entry: Any) -> None:
    _write(tmp_path, json.dumps({"first": {**GOOD, "data_offsets": [16, 32]}, "second": entry}).encode())
    with pytest.raises(LoadError, match=r"model\.safetensors.*second") as caught:
        locate_tensors(tmp_path)
    str(caught.value).encode()
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"7",
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 10**6,
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
    ],
    ids=range(11),
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: bytes) -> None:
    _write(tmp_path, header)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        locate_tensors(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_stated_is_refused(tmp_path: Path, length: int) -> None:
    _write(tmp_path, json.dumps({"a": GOOD}).encode(), length)
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        locate_tensors(tmp_path)


@pytest.mark.parametrize(
    "entry", [{**GOOD, "dtype": "I8"}, {**GOOD, "shape": [3]}, {**GOOD, "data_offsets": [10**6, 10**6 + 16]}]
)
def test_a_long_name_is_shortened_in_what_is_said_of_its_tensor(tmp_path: Path, entry: Any) -> None:
    _write(tmp_path, json.dumps({"y" * 100_000: entry}).encode())
    with pytest.raises(LoadError, match=r"model\.safetensors.*yyy\.\.\. \(100000 characters\)") as caught:
        locate_tensors(tmp_path)
    assert len(str(caught.value)) < 1500


def test_tensors_that_share_bytes_are_refused_by_name(tmp_path: Path) -> None:
    for offsets in ([0, 16], [8, 24], [15, 31]):
        _write(tmp_path, json.dumps({"a": GOOD, "b": {**GOOD, "data_offsets": offsets}}).encode())
        with pytest.raises(LoadError, match=r"tensors (a and b|b and a) overlap"):
            locate_tensors(tmp_path)


def test_bits_turned_over_in_a_header_bring_a_load_error_or_a_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": GOOD, "b": {**GOOD, "data_offsets": [16, 32]}}).encode()
    draw = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(header)
        for _ in range(draw.choice((1, 1, 2, 5))):
            damaged[draw.randrange(len(damaged))] = draw.choice((draw.randrange(256), ord("9"), ord("["), 0))
        _write(tmp_path, bytes(damaged))
        try:
            for tensor in locate_tensors(tmp_path).values():
                assert min(tensor.shape, default=0) >= 0
        except LoadError:
            refused += 1
    assert refused > 1000
