"""The tensors in a folder's safetensors files, from their headers: every tensor's file, shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from .json_files import LoadError, is_lfs_pointer, lfs_advice, read_json_object, shortened, shown

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Dtypes that weights may have, as safetensors names them, and their bytes."""
OTHERS = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4,
    "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
"""Those of tensors that may only be left out."""

NOT_QUANTIZED = "Quantized checkpoints are not: use the model's bfloat16, float16 or float32 original"

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_FILE_NAME_BYTES = 255

COMPARED_BYTES = 16 * 2**20

_Size = Annotated[int, msgspec.Meta(ge=0)]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_BASE = "model."
_PARTS_OF_BASE = ("embed_tokens.", "layers.", "norm.")
ADAPTER = "adapter_config.json"
MERGE = (
    "adapters are not supported: merge it into its base model (peft's merge_and_unload, then save_pretrained), and use "
    "that folder"
)


class _Entry(msgspec.Struct):
    """What a header says of one tensor."""

    dtype: str
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint: elements of `itemsize` bytes, row by row from byte `offset` of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    itemsize: int
    offset: int
    name: str = ""
    """In its file."""


def locate_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of `folder` by name: of model.safetensors, or else of the files that its index.json names.

    As to transformers, an index says which files there are: what it says of a tensor that no file holds matters only to
    whoever needs that tensor, and gets lacks(). A tensor may be in two files if both hold the same. Names are those of
    a model with its head: in a checkpoint of the base model alone (embeddings' models are such) none begins with model.
    Raises LoadError if there are none, for a damaged file or index, and for a file that is missing.
    """
    if (folder / SINGLE).is_file():
        return _with_base(read_header(folder / SINGLE))
    index = folder / INDEX
    if not index.is_file():
        raise LoadError(_no_weights(folder))
    weight_map = _read_index(index)

    located: dict[str, StoredTensor] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        file = folder / file_name
        if not file.is_file():
            tensor = next(name for name, home in weight_map.items() if home == file_name)
            raise LoadError(
                f"{file} is missing, but {index} says that it holds {shortened(tensor)}; copy it to the folder"
            )
        for name, stored in read_header(file).items():
            if name in located and not hold_the_same(located[name], stored):
                raise LoadError(
                    f"tensor {shortened(name)} is in both {located[name].file} and {file}, and not the same; it must "
                    f"be in one"
                )
            located.setdefault(name, stored)
    return _with_base(located)


def _with_base(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by the names that a model with its head gives them."""
    bare = {name for name in stored if name.startswith(_PARTS_OF_BASE) and _BASE + name not in stored}
    return {_BASE + name if name in bare else name: tensor for name, tensor in stored.items()} if bare else stored


def of_tied(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a model whose embeddings are its head, too: the one tensor may be stored under either name.

    safetensors' own save_model() keeps the name that comes first.
    """
    if EMBEDDINGS in stored or HEAD not in stored:
        return stored
    return {EMBEDDINGS if name == HEAD else name: tensor for name, tensor in stored.items()}


def lacks(folder: Path, names: Sequence[str], stored: Mapping[str, StoredTensor]) -> str:
    """Return the words for tensors that are needed and not stored; the first that the index names comes first."""
    quantized = ""
    if other := next((tensor for tensor in stored.values() if tensor.dtype not in FLOATS), None):
        quantized = f"; others are {shown(other.dtype)}: quantized checkpoints are not supported"
    if not (folder / SINGLE).is_file():
        weight_map = _read_index(folder / INDEX)
        for name in names:
            if home := weight_map.get(name) or weight_map.get(name.removeprefix(_BASE)):
                file = folder / home
                return f"{file} lacks tensor {shortened(name)}, which {folder / INDEX} says is there{quantized}"
    return f"{folder}: its safetensors files lack tensor {name_some(names)}, which the model needs{quantized}"


def check_readable(name: str, tensor: StoredTensor) -> None:
    """Raise LoadError for a dtype that no weight has."""
    if tensor.dtype not in FLOATS:
        raise LoadError(
            f"{tensor.file}: tensor {shortened(name)} is {shown(tensor.dtype)}; only {', '.join(FLOATS)} are "
            f"supported. {NOT_QUANTIZED}"
        )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file (8 bytes of header length, a JSON header, data).

    Raises LoadError if the header is damaged, if the file ends before a tensor does, or for an unknown dtype.
    """
    if is_lfs_pointer(file):
        raise LoadError(lfs_advice(file))
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise LoadError(
                    f"{file} is no safetensors file, or is cut off: it states a header of {length} bytes, but has "
                    f"{size} bytes in all (a header may have {MAX_HEADER_BYTES}); copy it again"
                )
            header = stream.read(length)
    except OSError as error:
        raise LoadError(f"{file} cannot be read: {error}") from error

    # Each entry is decoded by itself, to its own type: a header made of anything else takes no memory.
    entries: dict[str, _Entry] = {}
    name = ""
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        for name, entry in raw.items():
            entries[name] = msgspec.json.decode(entry, type=_Entry)
    except (ValueError, RecursionError) as error:
        where = f" at tensor {shown(name)}" if name else ""
        raise LoadError(
            f"{file} is no safetensors file: its header is damaged{where} ({error}); copy it again"
        ) from error

    # Offsets in the header count from its end.
    stored = {name: _stored_tensor(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    _check_order(file, stored)
    return stored


def _stored_tensor(file: Path, name: str, entry: _Entry, data: int, size: int) -> StoredTensor:
    """Check one entry of a header against the file of `size` bytes, whose tensors begin at byte `data`."""
    begin, end = entry.data_offsets
    itemsize = FLOATS.get(entry.dtype) or OTHERS.get(entry.dtype)
    if itemsize is None:
        raise LoadError(
            f"{file}: tensor {shortened(name)} is {shown(entry.dtype)}; only {', '.join((*FLOATS, *OTHERS))} are known"
        )
    if end - begin != math.prod(entry.shape) * itemsize:
        raise LoadError(
            f"{file}: tensor {shortened(name)} of shape {shown(entry.shape)} in {entry.dtype} cannot "
            f"have {end - begin} bytes from byte {begin} on; copy it again"
        )
    if data + end > size:
        raise LoadError(
            f"{file} is cut off: tensor {shortened(name)} ends at byte {data + end}, the file has {size}; copy it again"
        )
    return StoredTensor(file, tuple(entry.shape), entry.dtype, itemsize, data + begin, name)


def _check_order(file: Path, stored: dict[str, StoredTensor]) -> None:
    """Raise LoadError if two tensors share bytes, which no program that writes the format lets them do."""
    before = ""
    end = 0
    for name, tensor in sorted(stored.items(), key=lambda item: item[1].offset):
        nbytes = math.prod(tensor.shape) * tensor.itemsize
        if nbytes and tensor.offset < end:
            raise LoadError(f"{file}: tensors {shortened(before)} and {shortened(name)} overlap; copy it again")
        if nbytes:
            before, end = name, tensor.offset + nbytes


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


def name_some(names: Sequence[str]) -> str:
    """The first name, shortened, and how many more there are; empty for none."""
    first, *others = names or [""]
    return f"{shortened(first)} (and {len(others)} more)" if others else shortened(first)


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index}: weight_map={shown(weight_map)} must give a file name for each tensor")
    for tensor, name in weight_map.items():
        if not _is_file_name(name):
            raise LoadError(
                f"{index}: weight_map: {shown(tensor)} is in {shown(name)}, which must be a file of the folder"
            )
    return weight_map


def _is_file_name(name: object) -> bool:
    """Whether it names a file of a folder itself, not one elsewhere."""
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > MAX_FILE_NAME_BYTES:
        return False
    return name not in ("", "..") and Path(name).name == name


def _no_weights(folder: Path) -> str:
    message = f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there"
    if gguf := sorted(folder.glob("*.gguf")):
        return f"{message}; convert with `python -m phalanx.launch.get_model gguf={gguf[0]} out=DIR`"
    if (folder / ADAPTER).is_file():
        return f"{message}, but an adapter ({ADAPTER}); {MERGE}"
    if others := sorted(folder.glob("*.safetensors")):
        names = ", ".join(file.name for file in others[:2])
        return (
            f"{message}; {names} is one of {len(others)} files that no index names: copy {INDEX} too, or rename the "
            f"only file to {SINGLE}"
        )
    if list(folder.glob("pytorch_model*.bin")):
        return f"{message}; convert its .bin files with transformers' save_pretrained(DIR, safe_serialization=True)"
    return f"{message}; copy them there, or set load_format=dummy for random weights"
