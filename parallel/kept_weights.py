"""A rank's weights, packed, in memory that its successor maps instead of reading and packing them again.

All that is known of them is in an index (JSON) at the end of the memory. Names, shapes, dtypes, formats, bounds and
alignment are checked against the model before anything is used. Nothing is unpickled.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import torch
from torch import nn

from ..kernels import cpu
from ..kernels.weight_formats import stored_format
from ..kernels.weight_formats.packed import Stored
from .layers import Linear
from .loading.checkpoint import LoadReport
from .loading.kept_memory import KeptMemoryError, KeptReader, KeptWriter, is_complete

_log = logging.getLogger("phalanx")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8)
}
_PARTS = ("numbers", "scales", "sums", "apart")
_Count = Annotated[int, msgspec.Meta(ge=0)]


class KeptTensor(msgspec.Struct, frozen=True):
    """Where a tensor is."""

    dtype: str
    shape: list[_Count]
    offset: _Count


class KeptMatrix(msgspec.Struct, frozen=True):
    """A packed weight: the fields of Stored."""

    format: str
    group: _Count
    together: _Count
    deterministic: bool
    parts: dict[str, KeptTensor]
    """Those of numbers, scales, sums and apart that have any bytes."""


class KeptIndex(msgspec.Struct, frozen=True):
    """All that is in the memory."""

    fingerprint: str
    tensors: dict[str, KeptTensor]
    """By the parameter's name in the model."""
    matrices: dict[str, KeptMatrix]
    """By the layer's name in the model."""


class KeptWeights:
    """One rank's memory, which its supervisor owns: to be filled, or filled by a rank before this one.

    A rank first asks map_into(). If that returns nothing it loads: what it packs goes into allocate()'s memory, and
    keep() puts the rest there and closes it.
    """

    def __init__(self, memory: int, fingerprint: str, *, huge_first: bool, only_in_huge_pages: bool = False) -> None:
        """`memory` is of make_kept_memory(), and is closed by this object; `fingerprint` says of what weights it is.

        `huge_first` is as KeptWriter has it. With `only_in_huge_pages` nothing is kept where the system makes none of
        this memory, because steps would take longer.
        """
        self._memory = memory
        self._fingerprint = fingerprint
        self._huge_first = huge_first
        self._only_in_huge_pages = only_in_huge_pages
        self._writer: KeptWriter | None = None

    def map_into(self, model: nn.Module) -> LoadReport | None:
        """Give the model the weights that are here. Returns None, and leaves it alone, if they are not its own."""
        if not is_complete(self._memory):
            return None
        started = time.monotonic()
        try:
            reader = KeptReader(self._memory)
            index = msgspec.json.decode(reader.index, type=KeptIndex)
            if index.fingerprint != self._fingerprint:
                raise KeptMemoryError("they are of other files or settings")
            changes = list(_changes(model, index, reader))
        except (KeptMemoryError, OSError, ValueError) as error:
            _log.warning("the weights kept in memory are of no use, and are read again: %s", error)
            self._close()
            return None
        for module, name, value in changes:
            if isinstance(value, Stored):
                assert isinstance(module, Linear)
                module.adopt(value)
            else:
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        self._close()
        return LoadReport(0, 0, time.monotonic() - started, 0, kept_bytes=reader.nbytes)

    def begin(self, model: nn.Module) -> bool:
        """Make room for the model's weights. Returns whether allocate() may be called: not if they cannot be kept."""
        if self._memory < 0 or is_complete(self._memory):
            return False
        # Integers have scales and sums: of few columns they take more than the numbers did.
        most = sum(2 * parameter.nbytes + 64 * 1024 for parameter in model.parameters())
        try:
            writer = KeptWriter(self._memory, most, huge_first=self._huge_first)
        except OSError as error:
            _log.warning("weights are not kept for a restart: %s", error)
            self._close()
            return False
        if self._only_in_huge_pages and not writer.makes_huge_pages():
            self._close()
            return False
        self._writer = writer
        return True

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a tensor of zeros in the memory. `device` is the CPU. Raises KeptMemoryError if there is no room."""
        assert self._writer is not None
        assert device.type == "cpu"
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        offset = self._writer.take(count * dtype.itemsize)
        return torch.frombuffer(self._writer.buffer, dtype=dtype, count=count, offset=offset).view(shape)

    def keep(self, model: nn.Module) -> None:
        """Move those weights of a loaded model here that are not yet, and seal the memory: it is read-only then."""
        writer = self._writer
        assert writer is not None
        tensors: dict[str, KeptTensor] = {}
        matrices: dict[str, KeptMatrix] = {}
        for path, module in model.named_modules():
            if isinstance(module, Linear) and module.packed is not None:
                matrices[path] = self._matrix(module.packed.stored)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.numel():
                    kept = self.allocate(tuple(parameter.shape), parameter.dtype, parameter.device)
                    setattr(module, name, nn.Parameter(kept.copy_(parameter), requires_grad=False))
                    tensors[f"{path}.{name}"] = self._tensor(kept)
        try:
            writer.finish(msgspec.json.encode(KeptIndex(self._fingerprint, tensors, matrices)))
        except OSError as error:
            _log.warning("weights are not kept for a restart: %s", error)
        self._writer = None
        self._close()

    def _matrix(self, stored: Stored) -> KeptMatrix:
        parts = {name: getattr(stored, name) for name in _PARTS}
        found = {name: self._tensor(part) for name, part in parts.items() if part.numel()}
        return KeptMatrix(stored.format.name, stored.group, stored.together, stored.format.deterministic, found)

    def _tensor(self, tensor: torch.Tensor) -> KeptTensor:
        assert self._writer is not None
        dtype = str(tensor.dtype).removeprefix("torch.")
        return KeptTensor(dtype, list(tensor.shape), self._writer.offset_of(tensor.data_ptr()))

    def _close(self) -> None:
        # Mappings stay without it.
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def _changes(model: nn.Module, index: KeptIndex, reader: KeptReader) -> Iterator[tuple[nn.Module, str, Any]]:
    """Yield each layer's packed weight and each parameter. Raises KeptMemoryError unless all are there, and no more."""
    tensors = dict(index.tensors)
    matrices = dict(index.matrices)
    for path, module in model.named_modules():
        matrix = matrices.pop(path, None)
        if matrix is not None:
            if not isinstance(module, Linear):
                raise KeptMemoryError(f"{path} is no layer that is packed")
            yield module, "", _stored(path, matrix, module, reader)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name == "weight" and matrix is not None:
                continue
            kept = tensors.pop(f"{path}.{name}", None)
            if kept is None and not parameter.numel():
                continue
            if kept is None or kept.shape != list(parameter.shape) or _DTYPES.get(kept.dtype) != parameter.dtype:
                raise KeptMemoryError(f"{path}.{name} is missing, or of another shape or dtype than the model's")
            yield module, name, _tensor(kept, reader)
    if tensors or matrices:
        raise KeptMemoryError(f"{next(iter([*tensors, *matrices]))} is none of the model's")


def _stored(path: str, matrix: KeptMatrix, layer: Linear, reader: KeptReader) -> Stored:
    if not layer.can_pack or not set(matrix.parts) <= set(_PARTS) or "numbers" not in matrix.parts:
        raise KeptMemoryError(f"{path} has other parts than a packed weight")
    weight_format = stored_format(matrix.format)
    if matrix.deterministic:
        weight_format = weight_format.made_deterministic()
    parts = {name: _tensor(part, reader) for name, part in matrix.parts.items()}
    stored = Stored(weight_format, group=matrix.group, together=matrix.together, **parts)

    rows, columns = layer.weight.shape
    expected = weight_format.nbytes(rows, columns, layer.weight.itemsize)
    sums = stored.sums.nbytes in (0, 4 * rows)
    if stored.numbers.nbytes + stored.scales.nbytes != expected or not sums or stored.apart.nbytes % _group_bytes():
        raise KeptMemoryError(f"{path} has other bytes than {rows} rows of {columns} columns take")
    return stored


def _group_bytes() -> int:
    count: int = cpu.native.GROUP_BYTES
    return count


def _tensor(kept: KeptTensor, reader: KeptReader) -> torch.Tensor:
    dtype = _DTYPES.get(kept.dtype)
    count = math.prod(kept.shape)
    if dtype is None or not count or kept.offset % 64 or kept.offset + count * dtype.itemsize > reader.nbytes:
        raise KeptMemoryError(f"a tensor of {kept.shape} {kept.dtype} at byte {kept.offset} is not within its bounds")
    return torch.frombuffer(reader.buffer, dtype=dtype, count=count, offset=kept.offset).view(kept.shape)
