"""safetensors headers and indexes: every tensor lies within its file, or the file is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from phalanx.parallel.loading.checkpoint import LoadError, WeightSlice, load_weights
from phalanx.parallel.loading.safetensors_files import INDEX, SINGLE, locate_tensors
from phalanx.tests.fuzz.bounds import check_message, in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.folders import scratch

SHARDS = ("model-1.safetensors", "model-2.safetensors")
WORDS = (
    "__metadata__", "dtype", "shape", "data_offsets", "F32", "BF16", "F16", "F64", "I64", "F8_E4M3", "a", "b",
    "format",
    "pt", "weight_map", "metadata", "total_size", *SHARDS, "../model-1.safetensors", "/etc/passwd", "config.json", ".",
)  # fmt: skip
HEADERS: tuple[dict[str, Any], ...] = (
    {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
    },
    {"c": {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}},
)
MAP = {"metadata": {"total_size": 24}, "weight_map": {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]}}


def fuzz_one(data: bytes) -> None:
    """Read a folder of one file, or of two with an index."""
    choices = Choices(data)
    folder = scratch() / "tensors"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    if choices.flag():
        _write_file(folder / SINGLE, choices, HEADERS[0])
    else:
        for name, header in zip(SHARDS, HEADERS, strict=True):
            _write_file(folder / name, choices, header)
        index = json.dumps(choices.changed(MAP, WORDS) if choices.flag() else MAP).encode()
        (folder / INDEX).write_bytes(choices.mutated(index) if choices.flag() else index)

    try:
        with in_time():
            tensors = locate_tensors(folder)
    except LoadError as error:
        check_message(error)
        return
    for tensor in tensors.values():
        assert tensor.file.parent == folder
        assert tensor.offset + math.prod(tensor.shape) * tensor.itemsize <= tensor.file.stat().st_size

    # Read with the shapes that the headers give, as a model of these sizes would.
    slices = [
        WeightSlice(name, tensor.shape, tuple(slice(0, size) for size in tensor.shape), torch.zeros(tensor.shape))
        for name, tensor in tensors.items()
        if tensor.shape and math.prod(tensor.shape) < 2**16  # no weight of a model is a scalar
    ]
    try:
        with in_time():
            load_weights(folder, slices)
    except LoadError as error:
        check_message(error)


def _write_file(file: Path, choices: Choices, header: dict[str, Any]) -> None:
    if choices.number(6) == 0:
        file.write_bytes(choices.take(200))
        return
    for _ in range(choices.number(3)):
        header = choices.changed(header, WORDS)
        header = header if isinstance(header, dict) else {"a": header}
    text = json.dumps(header).encode()
    if choices.flag():
        text = choices.mutated(text)
    length = len(text) if choices.number(8) else choices.pick((0, 1, len(text) + 8, 2**31, 2**63, 2**64 - 1))
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(choices.pick((24, 0, 8, 16, 23, 25))))
