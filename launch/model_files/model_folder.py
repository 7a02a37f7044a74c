"""Writing a model folder: safetensors shards tensor by tensor, and the folder as a whole at once."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...engine.errors import ConfigError

SHARD_BYTES = 2 * 10**9
"""Most bytes of one safetensors file, unless one tensor is larger."""

DTYPES = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
"""The dtypes a checkpoint may be written in, and their names in safetensors."""

ORIGIN = "phalanx_origin.json"
"""Records what a folder was made from; it is written last."""

Shape = tuple[int, ...]


def write_weights(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: str,
    pieces: Callable[[str], Iterable[torch.Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write safetensors files, with an index.json if there are several. Returns the bytes of all tensors.

    `pieces(name)` yields a tensor's elements from first to last, in tensors of `dtype` and any shape.
    """
    itemsize = DTYPES[dtype][0].itemsize
    shards = _deal(shapes, itemsize, shard_bytes)
    total = sum(math.prod(shape) for shape in shapes.values()) * itemsize
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], dtype, pieces)
        return total

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, dtype, pieces)
        weight_map.update(dict.fromkeys(shard, name))

    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write one JSON object, indented."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_made(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether `folder` is complete and was made from `origin`."""
    try:
        return bool(json.loads((folder / ORIGIN).read_text()) == dict(origin))
    except (OSError, ValueError):  # a folder that cannot be read is told of where it is to be replaced
        return False


@contextmanager
def model_folder(folder: Path, origin: Mapping[str, Any], force: bool = False) -> Iterator[Path]:
    """Yield a new folder to write into, which replaces `folder` at the end; nothing is left if that fails.

    Raises ConfigError if `folder` holds something else, for a model may be replaced with `force`, other files never;
    and if it cannot be written.
    """
    if not folder.name:
        raise ConfigError(f"out={folder} must name a folder to make")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        _check_replaceable(folder, force)
        partial.mkdir(parents=True)
        yield partial
        write_json(partial / ORIGIN, origin)
        if folder.is_dir():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        if not _is_within(error.filename, folder.parent):  # of a file that the model is made from
            raise
        raise ConfigError(f"out={folder} cannot be written: {error.strerror}; set another out=") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_within(path: object, folder: Path) -> bool:
    """Whether an error's file is in `folder` or above it; a write to an open file names none."""
    if path is None:
        return True
    file, within = os.path.abspath(str(path)), os.path.abspath(folder)
    return os.path.commonpath([file, within]) in (file, within)


def _check_replaceable(folder: Path, force: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"out={folder} is a file; set out= to a folder")
    content = sorted(path.name for path in folder.iterdir())
    if not content:
        return
    if "config.json" not in content:
        raise ConfigError(f"out={folder} holds files that are no model ({', '.join(content[:3])}); set another out=")
    if not force:
        raise ConfigError(f"out={folder} holds another model; set another out=, or force=true to replace it")


def _deal(shapes: Mapping[str, Shape], itemsize: int, shard_bytes: int) -> list[dict[str, Shape]]:
    shards: list[dict[str, Shape]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = shape
        held += size
    return shards


def _write_file(
    file: Path, shapes: Mapping[str, Shape], dtype: str, pieces: Callable[[str], Iterable[torch.Tensor]]
) -> None:
    torch_dtype, stored_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": stored_dtype, "shape": list(shape), "data_offsets": [begin, end]}

    text = json.dumps(header, separators=(",", ":")).encode()
    # safetensors pads the header, so that the tensors after it are aligned to 8 bytes.
    text += b" " * (-len(text) % 8)

    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            written = 0
            for piece in pieces(name):
                assert piece.dtype == torch_dtype
                written += stream.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            assert written == math.prod(shape) * torch_dtype.itemsize, f"{name}: {written} bytes for {shape}"
