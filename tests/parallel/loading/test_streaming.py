"""Weights streamed through small buffers are bit for bit those of the loader that copies them one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.parallel.loading import streaming
from phalanx.parallel.loading.checkpoint import LoadError, WeightSlice, load_weights
from phalanx.parallel.loading.safetensors_files import StoredTensor, locate_tensors
from phalanx.parallel.loading.streaming import CudaLanding, Landing, Piece, cut, stream
from safetensors.torch import save_file

CPU = torch.device("cpu")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class Late(Landing):
    """Like a GPU that does nothing before it has to: what is sent waits until its buffer is wanted back."""

    def __init__(self, buffer_bytes: int) -> None:
        super().__init__(CPU, buffer_bytes)
        self._queue: list[tuple[int, Callable[[], None]]] = []
        self.most_waiting = 0

    def send(self, turn: int, piece: Piece, extremes: torch.Tensor) -> None:
        arrive = super().send
        self._queue.append((turn, lambda: arrive(turn, piece, extremes)))
        self.most_waiting = max(self.most_waiting, len(self._queue))

    def wait(self, turn: int) -> None:
        while any(queued == turn for queued, _ in self._queue):
            self._queue.pop(0)[1]()

    def finish(self) -> None:
        for _, arrive in self._queue:
            arrive()
        self._queue.clear()


def part(name: str, shape: tuple[int, ...], *index: slice, dtype: torch.dtype = torch.float32) -> WeightSlice:
    index = index or tuple(slice(0, size) for size in shape)
    return WeightSlice(name, shape, index, torch.full([i.stop - i.start for i in index], -7.0, dtype=dtype))


def save(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Odd sizes, over two files, in an order that goes back and forth between them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"bias": (37,), "down": (13, 29), "norm": (1,), "up": (31, 7)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file({name: tensors[name] for name in ("bias", "norm")}, folder / "1.safetensors")
    save_file({name: tensors[name] for name in ("down", "up")}, folder / "2.safetensors")
    homes = {name: f"{1 if len(shape) == 1 else 2}.safetensors" for name, shape in shapes.items()}
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": homes}).replace("'", '"'))
    return tensors


def parts_of(dtype: torch.dtype) -> list[WeightSlice]:
    """Rows, columns, a bias, a norm kept in another dtype, parts of nothing, a tensor that goes to two places."""
    fused = torch.full((40, 7), -7.0, dtype=dtype)
    return [
        part("bias", (37,), slice(5, 30), dtype=dtype),
        WeightSlice("up", (31, 7), (slice(3, 20), slice(0, 7)), fused[20:37]),
        part("norm", (1,)),
        part("down", (13, 29), slice(0, 13), slice(8, 19), dtype=dtype),
        part("down", (13, 29), dtype=dtype),
        part("down", (13, 29), slice(0, 13), slice(4, 4), dtype=dtype),
        part("up", (31, 7), slice(9, 9), slice(0, 7), dtype=dtype),
        # Not contiguous: the columns of a wider matrix.
        WeightSlice("up", (31, 7), (slice(0, 31), slice(2, 6)), torch.full((31, 9), -7.0, dtype=dtype)[:, 3:7]),
    ]


@pytest.mark.parametrize("buffer_bytes", [8, 24, 100, 2**16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
def test_streaming_brings_the_same_bits_and_reads_no_more(
    tmp_path: Path,
    buffer_bytes: int,
    stored: torch.dtype,
    wanted: torch.dtype,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "STRIP_BYTES", 4)
    save(tmp_path, dtype=stored)
    plain, streamed = parts_of(wanted), parts_of(wanted)
    kept = [[one.destination for one in parts] for parts in (plain, streamed)]
    expected = load_weights(tmp_path, plain)
    heard: list[tuple[int, int]] = []
    filled: list[str] = []
    report = load_weights(
        tmp_path,
        streamed,
        threads=threads,
        landing=Late(buffer_bytes),
        progress=lambda done, total: heard.append((done, total)),
        filled=lambda one: filled.append(one.name),
    )
    for destination, one in zip(*kept, strict=True):
        assert torch.equal(destination, one)
        assert not (one == -7).any()
    assert (report.bytes_read, report.shard_bytes) == (expected.bytes_read, expected.shard_bytes)
    assert report.bytes_read == report.shard_bytes
    assert heard == sorted(heard)
    assert heard[-1] == (report.shard_bytes, report.shard_bytes)
    assert filled == ["bias", "up", "norm", "down", "down", "down", "up", "up"]
    assert streamed == []


def test_what_lies_beside_a_part_in_its_fused_parameter_stays(tmp_path: Path) -> None:
    tensors = save(tmp_path)
    fused = torch.zeros(40, 7, dtype=torch.bfloat16)
    parts = [part(name, shape) for name, shape in (("bias", (37,)), ("norm", (1,)), ("down", (13, 29)))]
    parts.append(WeightSlice("up", (31, 7), (slice(3, 20), slice(0, 7)), fused[10:27]))
    load_weights(tmp_path, parts, landing=Landing(CPU, 64))
    assert torch.equal(fused[10:27], tensors["up"][3:20].bfloat16())
    assert not fused[:10].any()
    assert not fused[27:].any()


def test_the_next_piece_is_read_while_the_last_one_is_under_way(tmp_path: Path) -> None:
    save(tmp_path)
    landing = Late(64)
    load_weights(tmp_path, parts_of(torch.float32), landing=landing)
    assert landing.most_waiting == len(landing.buffers) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0), (7, 13), (12, 28)])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(
    tmp_path: Path, value: float, place: tuple[int, int]
) -> None:
    down = torch.randn(13, 29)
    down[place] = value
    save_file({"down": down, "up": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.safetensors: tensor down holds values that are not finite"):
        load_weights(tmp_path, [part("up", (3,)), part("down", (13, 29))], landing=Late(40))


def test_a_value_too_large_for_float16_is_found_before_it_is_converted(tmp_path: Path) -> None:
    save_file({"up": torch.tensor([[1.0, 2.0], [3.0, -1e5]])}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"up holds -100000, .*65504.*set dtype=bfloat16"):
        load_weights(tmp_path, [part("up", (2, 2), dtype=torch.float16)], landing=Landing(CPU, 8))


def test_a_file_that_has_gone_is_named(tmp_path: Path) -> None:
    save_file({"up": torch.ones(3)}, tmp_path / "model.safetensors")
    tensor = locate_tensors(tmp_path)["up"]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors cannot be read .*copy it again"):
        stream([*cut(tensor, (slice(0, 3),), torch.empty(3), 64)], Landing(CPU, 64), threads=1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_pieces_cover_a_part_once_and_fit_their_buffer(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = data.draw(st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 40))))
    limit = data.draw(st.integers(8, 2000))
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in shape]
    index = tuple(slice(first, last) for first, last in bounds)
    tensor = StoredTensor(Path("none"), shape, dtype, ITEM_BYTES[dtype], 0)
    destination = torch.zeros([last - first for first, last in bounds], dtype=torch.int64)
    # Each element's number in the whole tensor, from where each piece says that it comes.
    whole = torch.arange(torch.tensor(shape).prod()).view(shape if len(shape) == 2 else (1, -1)) + 1
    pieces = list(cut(tensor, index, destination, limit))
    for piece in pieces:
        assert 0 < piece.nbytes <= limit
        assert not piece.destination.any()
        piece.destination.copy_(whole[piece.rows, piece.columns])
    assert torch.equal(destination, whole.view(shape)[index])
    # As few as the buffer allows: whole rows share one wherever two fit.
    width = destination.shape[-1] * tensor.itemsize
    if len(shape) == 2 and pieces and width <= limit:
        assert len(pieces) == -(-len(destination) // (limit // width))


class FakeStream:
    """A stream that notes what waits for what; `current` is the one that calls go to."""

    current: Any = None

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __enter__(self) -> None:
        FakeStream.current = self

    def __exit__(self, *error: object) -> None:
        FakeStream.current = None

    def wait_stream(self, other: object) -> None:
        self.log.append(f"wait for {other}")

    def synchronize(self) -> None:
        self.log.append("synchronize")


class FakeEvent:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        assert FakeStream.current is not None, "recorded on the current stream, not on the one that copies"
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("wait for event")


def test_a_gpu_copies_on_its_own_stream_and_a_buffer_is_reused_after_its_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = save(tmp_path)
    log: list[str] = []
    fake = SimpleNamespace(
        Stream=lambda device: FakeStream(log),
        Event=lambda: FakeEvent(log),
        stream=lambda stream: stream,
        current_stream=lambda device: "current",
    )
    monkeypatch.setattr(torch, "cuda", fake)
    down = part("down", (13, 29))
    pieces = list(cut(locate_tensors(tmp_path)["down"], down.index, down.destination, 800))
    extremes = stream(pieces, CudaLanding(CPU, 800), threads=1)
    assert torch.equal(down.destination, tensors["down"])
    assert extremes.tolist() == [[float(p.destination.min()), float(p.destination.max())] for p in pieces]
    assert len(pieces) == 3
    assert log == ["wait for current", *["wait for event", "record"] * 3, "synchronize"]
