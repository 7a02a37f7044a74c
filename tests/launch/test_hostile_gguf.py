"""GGUF files from anybody: metadata of any type and value, and damaged bytes, bring an error that names the file."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from phalanx.engine.errors import CheckpointError, PhalanxError
from phalanx.launch.model_files.gguf_model import convert_gguf

gguf = pytest.importorskip("gguf")

SHAPE = {"embedding_length": 8, "block_count": 1, "feed_forward_length": 8, "attention.head_count": 2,
         "attention.head_count_kv": 1, "context_length": 64}  # fmt: skip
METADATA: dict[str, Any] = {
    **{f"qwen2.{name}": size for name, size in SHAPE.items()},
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "d"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
}
OPTIONAL = ("qwen2.rope.freq_base", "qwen2.rope.scaling.type", "qwen2.attention.key_length", "tokenizer.ggml.pre",
            "tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.unknown_token_id", "tokenizer.chat_template")  # fmt: skip
TENSORS = {"attn_norm.weight": (8,), "ffn_norm.weight": (8,), "attn_q.weight": (8, 8), "attn_k.weight": (4, 8),
           "attn_v.weight": (4, 8), "attn_output.weight": (8, 8), "ffn_gate.weight": (8, 8), "ffn_up.weight": (8, 8),
           "ffn_down.weight": (8, 8), "attn_q.bias": (8,), "attn_k.bias": (4,), "attn_v.bias": (4,)}  # fmt: skip


def _write(file: Path, **changes: Any) -> None:
    writer = gguf.GGUFWriter(str(file), "qwen2")
    for key, value in {**METADATA, **changes}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_int64(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, dtype=np.float32))
    for name, shape in TENSORS.items():
        writer.add_tensor(f"blk.0.{name}", np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _header(tensors: int, entries: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def _refused(file: Path, out: Path) -> bool:
    said = ""
    try:
        convert_gguf(file, out, force=True)
    except PhalanxError as error:
        said = str(error)
    assert len(said) < 1500
    return bool(said)


def test_the_file_that_the_others_are_made_of_is_converted(tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf")
    assert not _refused(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize("key", [*METADATA, *OPTIONAL])
def test_every_value_of_the_metadata_is_right_or_refused(tmp_path: Path, key: str) -> None:
    for value in (0, -1, 10**12, math.nan, 1.5, "x", ["x"], [1], ["a", "b", "c", "d"]):
        _write(tmp_path / "m.gguf", **{key: value})
        refused = _refused(tmp_path / "m.gguf", tmp_path / "out")
        assert refused or not key.endswith("token_id") or value == 0


def test_layers_that_the_file_does_not_hold_take_no_time_and_no_memory(tmp_path: Path) -> None:
    _write(tmp_path / "m.gguf", **{"qwen2.block_count": 2**24})
    with pytest.raises(CheckpointError, match=r"qwen2\.block_count=16777216, but it holds only 14 tensors"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "ends at byte 0"),
        (b"GGML" + bytes(20), "its first bytes are not GGUF"),
        (_header(2**40, 0), "tensor_count is 1099511627776; it may be at most 131072"),
        (_header(0, 2**63), "kv_count is 9223372036854775808; it may be at most"),
        (_header(0, 2**20), "ends at byte 24, within a key|ends at byte 24, within the length of a key"),
        (_header(0, 1) + _text(b"a") + _numbers(9, 0) + struct.pack("<Q", 2**62), "length of an array is"),
        (_header(0, 1) + _text(b"a") + _numbers(9, 4) + struct.pack("<Q", 2**20), "within a value of its metadata"),
        (_header(0, 1) + _text(b"a") + _numbers(9, 9) + struct.pack("<Q", 1), "type 9"),
        (_header(0, 1) + _text(b"a") + _numbers(77), "type 77"),
        (_header(0, 1) + struct.pack("<Q", 2**62), "the length of a key of its metadata is"),
        (_header(1, 0) + _text(b"t") + _numbers(2**31), "the dimensions of a tensor is 2147483648"),
        (_header(1, 0) + _text(b"t") + _numbers(4), "within the description of a tensor"),
    ],
)
def test_a_header_that_states_more_than_the_file_holds_is_refused_at_once(
    tmp_path: Path, header: bytes, why: str
) -> None:
    (tmp_path / "m.gguf").write_bytes(header)
    with pytest.raises(CheckpointError, match=why):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_bytes_turned_over_bring_an_error_of_ours_or_a_model(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    _write(file)
    good = file.read_bytes()
    draw = random.Random(1)
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 4))):
            damaged[draw.randrange(min(len(damaged), 1500))] = draw.choice((0, 127, 255, draw.randrange(256)))
        file.write_bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.2 else damaged)
        _refused(file, tmp_path / "out")
