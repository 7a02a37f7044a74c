"""Weights on their way from files to a GPU, at the speed of its bus.

Threads read pieces of the files into one of two pinned buffers, while the GPU copies the other one to where it belongs,
converting on arrival. Only what a rank keeps is read: of a matrix cut along its columns, parts of its rows.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from .json_files import LoadError
from .safetensors_files import StoredTensor

BUFFER_BYTES = 64 * 2**20
"""Size of each buffer: a copy of so much takes milliseconds, beside which starting it is nothing."""
READERS = 8
"""Threads that read, at most: one brings 6 to 12 GB/s from the page cache, and PCIe 5.0 x16 carries some 50."""
STRIP_BYTES = 2**20
"""Bytes that a thread reads at least: for less it is not worth waking."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """A rectangle of a stored matrix, small enough for a buffer, and where it goes. A vector is a matrix of one row."""

    tensor: StoredTensor
    rows: slice
    columns: slice
    destination: torch.Tensor
    """(rows, columns), of any dtype."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, as stored."""
        return self.shape[0] * self.shape[1] * self.tensor.itemsize


def cut(tensor: StoredTensor, index: tuple[slice, ...], destination: torch.Tensor, limit: int) -> Iterator[Piece]:
    """Pieces of at most `limit` bytes that make up the part `index` of a tensor of one or two dimensions.

    They are runs of the part's rows, or runs within a row where a row is above the limit. An empty part has none.
    """
    rows, columns = index if len(index) == 2 else (slice(0, 1), index[0])
    destination = destination if len(index) == 2 else destination.unsqueeze(0)
    height, width = destination.shape
    if not height or not width:
        return

    row_step = max(1, limit // (width * tensor.itemsize))
    column_step = min(width, limit // tensor.itemsize)
    for top in range(0, height, row_step):
        bottom = min(top + row_step, height)
        for left in range(0, width, column_step):
            right = min(left + column_step, width)
            yield Piece(
                tensor,
                slice(rows.start + top, rows.start + bottom),
                slice(columns.start + left, columns.start + right),
                destination[top:bottom, left:right],
            )


class Landing:
    """Takes pieces out of its host buffers to their destinations. Here each call is done when it returns."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = device
        self.buffers = tuple(
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)
        )
        self._staging = torch.empty(buffer_bytes, dtype=torch.uint8, device=device)

    def wait(self, turn: int) -> None:
        """Return once what was sent from buffer `turn` has left it."""

    def send(self, turn: int, piece: Piece, extremes: torch.Tensor) -> None:
        """Take a piece from buffer `turn`, where its rows stand one after the other, to its destination.

        Its least and its largest value, NaN if it holds one, are written to `extremes` (2,), on the device.
        """
        dtype = TORCH_DTYPES[piece.tensor.dtype]
        read = self.buffers[turn][: piece.nbytes].view(dtype).view(piece.shape)
        direct = piece.destination.dtype == dtype and piece.destination.is_contiguous()
        landed = piece.destination if direct else self._staging[: piece.nbytes].view(dtype).view(piece.shape)
        landed.copy_(read, non_blocking=True)
        if not direct:
            piece.destination.copy_(landed)
        extremes[0], extremes[1] = landed.aminmax()

    def finish(self) -> None:
        """Return once all that was sent has arrived."""


class CudaLanding(Landing):
    """Copies on a stream of its own, and lets nobody wait: what a call started may still run when it returns."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        super().__init__(device, buffer_bytes)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The destinations were made, and their padding is cleared, on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._left = tuple(torch.cuda.Event() for _ in self.buffers)  # type: ignore[no-untyped-call]

    def wait(self, turn: int) -> None:
        """Return once the copies out of buffer `turn` are done."""
        self._left[turn].synchronize()

    def send(self, turn: int, piece: Piece, extremes: torch.Tensor) -> None:
        """Start what Landing.send does; wait() and finish() wait for it."""
        with torch.cuda.stream(self._stream):
            super().send(turn, piece, extremes)
            self._left[turn].record()

    def finish(self) -> None:
        """Return once all copies are done."""
        self._stream.synchronize()


def stream(
    pieces: Sequence[Piece], landing: Landing, threads: int, progress: Callable[[int], None] = lambda count: None
) -> torch.Tensor:
    """Fill the destinations of all pieces, none of which is above a buffer of `landing`.

    `progress` is called with the bytes of each piece once they are read. Returns the least and the largest value of
    each piece, NaN if it holds one, as float64 (pieces, 2) on the CPU. Raises LoadError if a file cannot be read.
    """
    extremes = torch.empty(len(pieces), 2, dtype=torch.float64, device=landing.device)
    with _Reader(threads) as reader:
        for number, piece in enumerate(pieces):
            turn = number % len(landing.buffers)
            landing.wait(turn)
            reader.read(piece, landing.buffers[turn].numpy())
            landing.send(turn, piece, extremes[number])
            progress(piece.nbytes)
    landing.finish()
    return extremes.cpu()


class _Reader:
    """Copies pieces out of one mapped file at a time, on several threads: of two ways, read(2) takes twice as long."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="phalanx-read")
        self._file: Path | None = None
        self._content = np.empty(0, dtype=np.uint8)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(self, piece: Piece, buffer: np.ndarray) -> None:
        """Put the piece's bytes at the beginning of `buffer`, row after row."""
        tensor = piece.tensor
        height = piece.shape[0]
        if tensor.file != self._file:
            self._content = _map(tensor.file)
            self._file = tensor.file

        row_bytes = tensor.shape[-1] * tensor.itemsize
        first = tensor.offset + piece.rows.start * row_bytes
        rows = self._content[first : first + height * row_bytes].reshape(height, row_bytes)
        source = rows[:, piece.columns.start * tensor.itemsize : piece.columns.stop * tensor.itemsize]
        target = buffer[: piece.nbytes].reshape(source.shape)

        strips = max(1, min(self._threads, height, piece.nbytes // STRIP_BYTES))
        if strips == 1:
            np.copyto(target, source)
        else:
            list(self._pool.map(np.copyto, np.array_split(target, strips), np.array_split(source, strips)))


def _map(file: Path) -> np.ndarray:
    """The bytes of a file, uint8 and read-only, which the system brings as they are touched."""
    try:
        with file.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise LoadError(f"{file} cannot be read ({error}); copy it again") from error
    # Read far ahead of what is touched: the first time, the file may still be on its disk.
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    return np.frombuffer(mapping, dtype=np.uint8)
