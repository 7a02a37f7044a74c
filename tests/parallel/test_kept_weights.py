"""Weights that outlive the rank that packed them: the next one computes with the same bits, or reads them again."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from phalanx.kernels import cpu
from phalanx.kernels.weight_formats import get_weight_format
from phalanx.kernels.weight_formats.bf16_in_12_bits import BF16_IN_12_BITS
from phalanx.parallel.collectives.local import LocalCollectives
from phalanx.parallel.kept_weights import KeptIndex, KeptTensor, KeptWeights
from phalanx.parallel.layers import ColumnParallelLinear, ReplicatedNorm, ShardedWeight, VocabParallelEmbedding
from phalanx.parallel.loading.checkpoint import Packing
from phalanx.parallel.loading.dummy_weights import fill_dummy
from phalanx.parallel.loading.kept_memory import (
    PAGE,
    KeptMemoryError,
    KeptReader,
    KeptWriter,
    is_complete,
    make_kept_memory,
)
from torch import nn

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory that can be sealed is Linux's")
needs_kernels = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
CPU = torch.device("cpu")
COLUMNS = 256


class Model(nn.Module):
    """A table, tied to the head or not, a layer with a bias, and a norm."""

    def __init__(self, dtype: torch.dtype, tied: bool) -> None:
        super().__init__()
        placement = {"dtype": dtype, "device": CPU}
        collectives = LocalCollectives(CPU)
        self.table = VocabParallelEmbedding(
            "table", range(40), 40, COLUMNS, collectives=collectives, tied=tied, **placement
        )
        parts = [ShardedWeight("first", range(24), 24), ShardedWeight("second", range(10), 10)]
        self.layer = ColumnParallelLinear(COLUMNS, parts, bias=True, **placement)
        self.norm = ReplicatedNorm("norm", COLUMNS, 1e-5, dtype, CPU)

    def outcome(self) -> list[torch.Tensor]:
        """What depends on every weight."""
        x = torch.linspace(-1, 1, 3 * COLUMNS).view(3, COLUMNS).to(self.norm.dtype)
        looked_up = self.table(torch.arange(40))
        return [self.layer(x), looked_up, self.table.multiply_float(x), self.norm.weight]


def _load(
    dtype: torch.dtype, quantization: str, tied: bool, kept: KeptWeights, *, deterministic: bool = False
) -> Model:
    model = Model(dtype, tied)
    assert kept.begin(model)
    slices = [each for layer in (model.table, model.layer, model.norm) for each in layer.weight_slices("")]
    weight_format = get_weight_format(quantization, deterministic=deterministic)
    fill_dummy(slices, 7, filled=Packing(slices, weight_format, kept.allocate).filled)
    kept.keep(model)
    return model


@pytest.fixture
def memory() -> int:
    return make_kept_memory()


def _kept(memory: int, fingerprint: str = "a") -> KeptWeights:
    return KeptWeights(os.dup(memory), fingerprint, huge_first=True)


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "w8a8"),
        (torch.bfloat16, "int4"),
        (torch.float16, "none"),
    ],
)
def test_a_rank_after_another_has_the_same_bits(memory: int, dtype: torch.dtype, quantization: str, tied: bool) -> None:
    if dtype == torch.float16:
        model = Model(dtype, tied)  # the kernels have no float16: nothing is packed
        assert model.layer.can_pack is False
    first = _load(dtype, quantization, tied, _kept(memory))
    second = Model(dtype, tied)
    report = _kept(memory).map_into(second)
    assert report is not None
    assert report.kept_bytes == os.fstat(memory).st_size
    assert report.bytes_read == 0
    for ours, theirs in zip(second.outcome(), first.outcome(), strict=True):
        assert torch.equal(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("deterministic", [True, False])
def test_kept_int8_weights_are_as_deterministic_as_they_were(memory: int, deterministic: bool) -> None:
    _load(torch.bfloat16, "int8", True, _kept(memory), deterministic=deterministic)
    second = Model(torch.bfloat16, True)
    assert _kept(memory).map_into(second) is not None
    for layer in (second.layer, second.table):
        assert layer.packed is not None
        assert layer.packed.stored.format.deterministic == deterministic


@needs_kernels
def test_weights_in_12_bits_are_kept_too(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(get_weight_format("none")), "preferred", lambda self, dtype: BF16_IN_12_BITS)
    first = _load(torch.bfloat16, "none", True, _kept(memory))
    assert first.layer.packed is not None
    assert first.layer.packed.format is BF16_IN_12_BITS
    second = Model(torch.bfloat16, True)
    assert _kept(memory).map_into(second) is not None
    for ours, theirs in zip(second.outcome(), first.outcome(), strict=True):
        assert torch.equal(ours, theirs)


@needs_kernels
def test_no_second_copy_of_a_weight_is_held(memory: int) -> None:
    model = _load(torch.float32, "none", True, _kept(memory))
    second = Model(torch.float32, True)
    _kept(memory).map_into(second)
    for each in (model, second):
        tensors = [parameter for parameter in each.parameters() if parameter.numel()]
        assert {id(parameter) for parameter in tensors} == {id(each.layer.bias), id(each.norm.weight)}


def test_nothing_is_kept_where_steps_would_take_longer(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptWeights(os.dup(memory), "a", huge_first=True, only_in_huge_pages=True)
    monkeypatch.setattr(KeptWriter, "makes_huge_pages", lambda self: False)
    assert not kept.begin(Model(torch.float32, True))
    assert not is_complete(memory)


def test_what_is_kept_cannot_be_written_to(memory: int) -> None:
    writer = KeptWriter(memory, 5000, huge_first=False)
    offset = writer.take(100)
    writer.finish(b"{}")
    assert is_complete(memory)
    with pytest.raises(PermissionError):
        mmap.mmap(memory, PAGE, access=mmap.ACCESS_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(memory, b"x", offset)
    with pytest.raises(PermissionError):
        os.ftruncate(memory, 0)
    # Nor by the process that has filled it.
    program = (
        "import ctypes, sys\nfrom phalanx.parallel.loading.kept_memory import *\n"
        "memory = make_kept_memory()\nwriter = KeptWriter(memory, 9, huge_first=True)\nwriter.finish(b'{}')\n"
        "ctypes.memset(ctypes.addressof(writer.buffer), 0, 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -11


def test_memory_that_was_not_filled_to_its_end_is_not_mapped(memory: int) -> None:
    writer = KeptWriter(memory, 5000, huge_first=False)
    writer.take(100)
    with pytest.raises(KeptMemoryError, match="filled to its end"):
        KeptReader(memory)
    with pytest.raises(KeptMemoryError, match="at most"):
        writer.take(10**8)
    assert KeptWeights(os.dup(memory), "a", huge_first=True).map_into(Model(torch.float32, True)) is None


def _change(index: KeptIndex, what: str) -> KeptIndex:
    tensors = dict(index.tensors)
    bias = tensors["layer.bias"]
    if what == "missing":
        del tensors["layer.bias"]
    elif what == "unknown":
        tensors["layer.more"] = bias
    elif what == "shape":
        tensors["layer.bias"] = msgspec.structs.replace(bias, shape=[3])
    elif what == "offset":
        tensors["layer.bias"] = msgspec.structs.replace(bias, offset=2**62)
    elif what == "aligned":
        tensors["layer.bias"] = msgspec.structs.replace(bias, offset=bias.offset + 4)
    elif what == "dtype":
        tensors["layer.bias"] = msgspec.structs.replace(bias, dtype="int8")
    matrices = dict(index.matrices)
    if matrices and what in ("format", "numbers", "parts"):
        layer = matrices["layer"]
        parts = layer.parts
        if what == "format":
            layer = msgspec.structs.replace(layer, format="int3")
        elif what == "numbers":
            numbers = KeptTensor("float32", [16, COLUMNS], parts["numbers"].offset)
            layer = msgspec.structs.replace(layer, parts={**parts, "numbers": numbers})
        else:
            layer = msgspec.structs.replace(layer, parts={})
        matrices["layer"] = layer
    return KeptIndex(index.fingerprint, tensors, matrices)


@needs_kernels
@pytest.mark.parametrize(
    "what", ["missing", "unknown", "shape", "offset", "aligned", "dtype", "format", "numbers", "parts"]
)
def test_a_damaged_index_is_refused_and_the_model_left_alone(
    memory: int, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    _load(torch.float32, "none", True, _kept(memory))
    reader = KeptReader(memory)
    index = _change(msgspec.json.decode(reader.index, type=KeptIndex), what)

    other = make_kept_memory()
    writer = KeptWriter(other, reader.nbytes, huge_first=False)
    writer.take(reader.nbytes - 2 * PAGE)
    ctypes.memmove(ctypes.addressof(writer.buffer), ctypes.addressof(reader.buffer), reader.nbytes)
    writer.finish(msgspec.json.encode(index))
    model = Model(torch.float32, True)
    before = list(model.parameters())
    assert _kept(other).map_into(model) is None
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert "of no use" in caplog.text


@needs_kernels
def test_weights_of_other_files_or_settings_are_read_again(memory: int, caplog: pytest.LogCaptureFixture) -> None:
    _load(torch.float32, "none", True, _kept(memory))
    kept = _kept(memory, "b")
    model = Model(torch.float32, True)
    assert kept.map_into(model) is None
    assert not kept.begin(model)
    assert "of other files or settings" in caplog.text


def test_a_header_that_is_damaged_is_refused(memory: int, tmp_path: Path) -> None:
    import fcntl

    os.write(memory, b"phalanx1" + b"\xff" * 16 + bytes(PAGE))
    fcntl.fcntl(memory, 1033, 0x17)
    with pytest.raises(KeptMemoryError, match="header"):
        KeptReader(memory)
