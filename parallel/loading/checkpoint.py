"""Checkpoint streaming: each rank reads its own part of each safetensors tensor, straight into its destination."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.torch_threads import one_torch_thread
from ...kernels.weight_formats import WeightFormat
from ...kernels.weight_formats.base import Allocate
from .json_files import LoadError
from .safetensors_files import HEAD, StoredTensor, check_readable, lacks, locate_tensors, of_tied
from .streaming import READERS, CudaLanding, Landing, cut, stream

__all__ = ["LoadError", "LoadReport", "Packing", "Progress", "WeightSlice", "load_weights"]

CHUNK_BYTES = 32 * 2**20
"""Bytes of the rows of one read, so that what is copied on the way stays small."""

MAPPED_BYTES = 96 * 2**20
"""A file is mapped while it is read, and touched pages count as this process's: after these many it is opened anew."""

SMALL_BYTES = 12 * 2**20
"""A smaller part is read on one of torch's threads: the others would wait for the kernels' threads, which spin for a
while after they have packed the part before, longer than one thread takes to copy it."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are to read."""


@dataclass(frozen=True)
class WeightSlice:
    """One tensor of a checkpoint and the part of it that this rank reads."""

    name: str
    shape: tuple[int, ...]
    """The whole tensor's, in the checkpoint."""
    index: tuple[slice, ...]
    """The part: a contiguous slice for each dimension."""
    destination: torch.Tensor
    """The memory for the part, shaped like it; filled in place, with a conversion of dtype and device."""
    owner: Any = None
    """The layer whose weight this is, which is packed as soon as all its slices are filled (see Packing)."""

    def __post_init__(self) -> None:
        part = tuple(index.stop - index.start for index in self.index)
        inside = all(0 <= index.start <= index.stop <= size for index, size in zip(self.index, self.shape, strict=True))
        if not inside or part != tuple(self.destination.shape):
            raise ValueError(
                f"{self.name}: {self.index} of shape {self.shape} does not fit a destination of shape "
                f"{tuple(self.destination.shape)}"
            )


class Packing:
    """Calls pack(weight_format, allocate) of each slice's owner that has one, once all its slices are filled."""

    def __init__(
        self, slices: Sequence[WeightSlice], weight_format: WeightFormat, allocate: Allocate | None = None
    ) -> None:
        """What is packed goes to memory that `allocate` makes, if it is given."""
        self._weight_format = weight_format
        self._allocate = allocate
        self._missing = Counter(id(part.owner) for part in slices)

    def filled(self, part: WeightSlice) -> None:
        """Note that a slice holds its values."""
        self._missing[id(part.owner)] -= 1
        if not self._missing[id(part.owner)] and hasattr(part.owner, "pack"):
            part.owner.pack(self._weight_format, self._allocate)


@dataclass(frozen=True)
class LoadReport:
    """The bytes, files and seconds that loading took."""

    bytes_read: int
    """Bytes that reads of the checkpoint returned."""
    shard_bytes: int
    """Bytes of this rank's parts, in the checkpoint's dtype."""
    seconds: float
    files: int
    """Files that the checkpoint consists of."""
    kept_bytes: int = 0
    """Bytes that were mapped instead, as the rank before this one left them (parallel/kept_weights.py)."""
    left_out: tuple[str, ...] = ()
    """Tensors of the checkpoint that the model has no place for."""


def take_out(slices: list[WeightSlice]) -> Iterator[WeightSlice]:
    """The slices in order, each of which leaves the list: a destination that its owner gives up is then nobody's."""
    slices.reverse()
    while slices:
        yield slices.pop()


def load_weights(
    folder: Path,
    slices: list[WeightSlice],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    progress: Progress | None = None,
    filled: Callable[[WeightSlice], None] = lambda part: None,
    threads: int = 1,
    landing: Landing | None = None,
) -> LoadReport:
    """Fill every slice's destination from the safetensors files of `folder`, and call `filled` for each.

    The list is empty in the end: what has been filled is kept by its owner alone, which may put it elsewhere.

    Names, shapes, dtypes and file sizes are checked from the headers of all files before anything is read, so every
    rank finds the same faults. Tensors that the model has no place for are left out, as transformers does, and reported
    unless `ignore` names them. Raises LoadError.

    On a CPU the slices are filled one by one, and memory besides the destinations stays below CHUNK_BYTES copied and
    MAPPED_BYTES + CHUNK_BYTES mapped. To a GPU they stream through `landing` (None makes one), read by up to `threads`
    threads; `filled` is called once all are there, and values are checked then. Memory besides the destinations is the
    landing's, and one file that is mapped.
    """
    started = time.monotonic()
    needed = {part.name for part in slices}
    stored = locate_tensors(folder)
    if HEAD not in needed:
        stored = of_tied(stored)
    _check_coverage(folder, slices, stored)
    left_out = tuple(name for name in stored if name not in needed and not ignore(name))
    total = sum(part.destination.numel() * stored[part.name].itemsize for part in slices)
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    if landing is None and slices and slices[0].destination.device.type == "cuda":
        landing = CudaLanding(slices[0].destination.device)
    if landing is not None:
        parts = list(take_out(slices))
        _stream(parts, stored, landing, threads, read)
        for part in parts:
            filled(part)
    else:
        reader = _Reader()
        for small, parts_in_a_row in groupby(take_out(slices), _is_small):
            with one_torch_thread() if small else nullcontext():
                for part in parts_in_a_row:
                    for chunk in _chunks(part, stored[part.name].itemsize):
                        read(reader.read(stored[part.name], chunk))
                    filled(part)

    files = {tensor.file for tensor in stored.values()}
    seconds = time.monotonic() - started
    return LoadReport(bytes_read=done, shard_bytes=total, seconds=seconds, files=len(files), left_out=left_out)


def _stream(
    parts: Sequence[WeightSlice],
    stored: Mapping[str, StoredTensor],
    landing: Landing,
    threads: int,
    read: Callable[[int], None],
) -> None:
    limit = landing.buffers[0].nbytes
    pieces = []
    owners = []  # the part that each piece is of
    for part in parts:
        for piece in cut(stored[part.name], part.index, part.destination, limit):
            pieces.append(piece)
            owners.append(part)

    extremes = stream(pieces, landing, min(threads, READERS), read)
    for part, (low, high) in zip(owners, extremes.tolist(), strict=True):
        _check_range(low, high, stored[part.name].file, part)


class _Reader:
    """Keeps one file open, and opens it anew when much of it has been mapped."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._handle: Any = None
        self._mapped = 0

    def read(self, tensor: StoredTensor, part: WeightSlice) -> int:
        """Fill the part's destination. Returns the bytes read."""
        if tensor.file != self._file or self._mapped > MAPPED_BYTES:
            self._handle = None  # unmapped before the next is mapped
            self._handle = _open(tensor.file)
            self._file = tensor.file
            self._mapped = 0

        value: torch.Tensor = self._handle.get_slice(tensor.name)[part.index]
        self._mapped += _touched_bytes(part, tensor.itemsize)
        low, high = (float(bound) for bound in value.aminmax())
        _check_range(low, high, tensor.file, part)
        part.destination.copy_(value)
        return value.numel() * value.element_size()


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{file} is no readable safetensors file ({error}); copy it again") from error
    except (MemoryError, RuntimeError) as error:  # the file's addresses, not its bytes; a RuntimeError is torch's
        raise LoadError(
            f"{file} cannot be mapped into memory ({error}): let this process have more of it (ulimit -v)"
        ) from error


def _check_coverage(folder: Path, slices: Sequence[WeightSlice], stored: Mapping[str, StoredTensor]) -> None:
    needed = {part.name: part.shape for part in slices}
    if missing := [name for name in needed if name not in stored]:
        raise LoadError(lacks(folder, missing, stored))
    for name, shape in needed.items():
        check_readable(name, stored[name])
        if stored[name].shape != shape:
            raise LoadError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, but by config.json it must "
                f"have {list(shape)}"
            )


def _check_range(low: float, high: float, file: Path, part: WeightSlice) -> None:
    """Raises LoadError unless the least and the largest value of a part, as stored, are numbers that fit its dtype."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise LoadError(f"{file}: tensor {part.name} holds values that are not finite (NaN or infinity)")
    dtype = part.destination.dtype
    if max(-low, high) > torch.finfo(dtype).max:
        raise LoadError(
            f"{file}: tensor {part.name} holds {max(high, low, key=abs):g}, which does not fit {dtype} (at most "
            f"{torch.finfo(dtype).max:g}); set dtype=bfloat16 or dtype=float32"
        )


def _is_small(part: WeightSlice) -> bool:
    return part.destination.nbytes < SMALL_BYTES


def _chunks(part: WeightSlice, itemsize: int) -> Iterator[WeightSlice]:
    """The part in runs of rows that touch CHUNK_BYTES at most (one row at least)."""
    if not part.destination.numel():
        return
    first = part.index[0].start
    last = part.index[0].stop
    step = max(1, CHUNK_BYTES // (math.prod(part.shape[1:]) * itemsize))
    for start in range(first, last, step):
        stop = min(start + step, last)
        destination = part.destination[start - first : stop - first]
        yield WeightSlice(part.name, part.shape, (slice(start, stop), *part.index[1:]), destination)


def _touched_bytes(part: WeightSlice, itemsize: int) -> int:
    """Return the bytes of the pages that reading the part maps: a slice of columns touches its rows whole."""
    rows = part.index[0].stop - part.index[0].start
    return int(rows * math.prod(part.shape[1:]) * itemsize)
