"""The tensors in a folder's safetensors files, from their headers: every tensor's file, shape and dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes that weights may have, as safetensors names them, and their bytes."""

_LFS = b"version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

COMPARED_BYTES = 16 * 2**20

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class LoadError(Exception):
    """A checkpoint is missing, damaged, or not this model's; the message names the file and the tensor."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: elements of `itemsize` bytes, row by row from byte `offset` of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    offset: int


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `folder` by name: of model.safetensors, or else of the files that its index.json names.

    Raises LoadError if there are none, for a damaged file or index, and for an index that disagrees with the files.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    index = folder / INDEX
    if not index.is_file():
        raise LoadError(_no_weights(folder))
    weight_map = _read_index(index)

    located: dict[str, StoredTensor] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        file = folder / file_name
        if not file.is_file():
            tensor = next(name for name, home in weight_map.items() if home == file_name)
            raise LoadError(f"{file} is missing, but {index} says that it holds {tensor}; copy it to the folder")
        for name, stored in read_header(file).items():
            if name in located:
                raise LoadError(f"tensor {name} is in both {located[name].file} and {file}; it must be in one")
            located[name] = stored

    # The headers must hold what the index promises.
    for name, file_name in weight_map.items():
        if name not in located or located[name].file != folder / file_name:
            raise LoadError(f"{folder / file_name} lacks tensor {name}, which {index} says is there")
    return located


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the pointer that Git leaves for a large one that was not fetched (git-lfs.com/spec/v1)."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_LFS)) == _LFS
    except OSError:
        return False


def lfs_advice(file: Path) -> str:
    """Return the advice for a user whose file is a Git LFS pointer."""
    return f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` where it came from, or download it"


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file (8 bytes of header length, a JSON header, data).

    Raises LoadError if the header is damaged, if the file ends before a tensor does, or for a dtype no weight has.
    """
    size = file.stat().st_size
    if is_lfs_pointer(file):
        raise LoadError(lfs_advice(file))
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise LoadError(
                f"{file} is no safetensors file, or is cut off: it states a header of {length} bytes, but has {size} "
                f"bytes in all (a header may have {MAX_HEADER_BYTES}); copy it again"
            )
        header = stream.read(length)

    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _tensor_entry(entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{file} is no safetensors file: its header is damaged ({error!r}); copy it again") from error

    # Offsets in the header count from its end.
    stored = {}
    for name, (dtype, shape, begin, end) in tensors.items():
        if dtype not in FLOATS:
            raise LoadError(
                f"{file}: tensor {name} is {dtype}; only {', '.join(FLOATS)} are supported. "
                f"Quantized checkpoints are not: use the model's bfloat16, float16 or float32 original"
            )
        if begin < 0 or end - begin != math.prod(shape) * FLOATS[dtype]:
            raise LoadError(
                f"{file}: tensor {name} of shape {list(shape)} in {dtype} cannot have {end - begin} bytes from byte "
                f"{begin} on; copy it again"
            )
        if 8 + length + end > size:
            raise LoadError(
                f"{file} is cut off: tensor {name} ends at byte {8 + length + end}, the file has {size}; copy it again"
            )
        stored[name] = StoredTensor(file, shape, dtype, FLOATS[dtype], offset=8 + length + begin)
    return stored


def hold_the_same(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are equal byte for byte, in shape and dtype too."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left = math.prod(one.shape) * one.itemsize
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        while left > 0:
            size = min(left, COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def name_some(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first


def _tensor_entry(entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    return str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), int(begin), int(end)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{index} is no index of safetensors files: {error!r}") from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise LoadError(f"{index}: weight_map must give a file name for each tensor")
    return weight_map


def _no_weights(folder: Path) -> str:
    message = f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there"
    if gguf := sorted(folder.glob("*.gguf")):
        return f"{message}; convert with `python -m phalanx.launch.get_model gguf={gguf[0]} out=DIR`"
    if list(folder.glob("pytorch_model*.bin")):
        return f"{message}; convert its .bin files with transformers' save_pretrained(DIR, safe_serialization=True)"
    return f"{message}; copy them there, or set load_format=dummy for random weights"
