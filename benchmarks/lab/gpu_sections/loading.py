"""A checkpoint's way to the device: written in place, loaded warm and cold, beside what the files and the bus allow."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phalanx import LLM, SamplingParams
from phalanx.engine.config import EngineConfig
from phalanx.engine.engine import Engine
from phalanx.engine.errors import ConfigError
from phalanx.engine.models.decoder import Build, CausalLM
from phalanx.engine.models.resolve import partition_model
from phalanx.engine.protocol.transport import InProcess
from phalanx.kernels.backend_selector import choose_backend
from phalanx.launch.model_files.model_folder import SHARD_BYTES, write_weights
from phalanx.launch.model_files.random_model import tensor_shapes
from phalanx.parallel.group import local_group
from phalanx.parallel.loading.checkpoint import WeightSlice, load_weights
from phalanx.parallel.loading.safetensors_files import locate_tensors
from phalanx.parallel.loading.streaming import BUFFER_BYTES, READERS, CudaLanding, Landing
from safetensors import safe_open

from .shapes import Shape

LAYERS = 5
"""Layers of QwQ-32B's 64: 8.0 GB with embedding and head."""
TINY_SHARD_BYTES = 2**17
BLOCK_ELEMENTS = 2**25
"""Random numbers that are drawn; every tensor is written from another place in them."""
SPARE_DISK = 1.25
SYNC_S = 25.0
"""Seconds that writing through to the disk may take: files that are not written through stay in memory."""
READ_BYTES = 2**24
CHECKED = 6
"""Tensors that are compared with their files."""


def loading_shape(shape: Shape, tiny: bool) -> Shape:
    """The model whose checkpoint is written."""
    return shape if tiny else replace(shape, config={**shape.config, "num_hidden_layers": LAYERS})


class Checkpoint:
    """A folder of safetensors files, and the model that they are loaded into."""

    def __init__(
        self, shape: Shape, folder: Path, device: torch.device, host_to_device_gb_s: float | None, tiny: bool
    ) -> None:
        self._shape = shape
        self._folder = folder
        self._device = device
        self._bus = host_to_device_gb_s
        self._tiny = tiny
        self._synced: list[Path] = []
        self._warm_gb_s: float | None = None
        self._model: CausalLM | None = None

    @property
    def _files(self) -> list[Path]:
        files = sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{self._folder} holds no checkpoint: writing it failed")
        return files

    def write(self) -> dict[str, Any]:
        """Write the files, and write them through to the disk as far as SYNC_S allows."""
        shapes = tensor_shapes(self._shape.spec)
        need = SPARE_DISK * 2 * sum(int(np.prod(shape)) for shape in shapes.values())
        free = shutil.disk_usage(self._folder).free
        if free < need:
            raise ConfigError(
                f"{self._folder} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; set TMPDIR"
            )
        started = time.monotonic()
        block = torch.empty(BLOCK_ELEMENTS // (1024 if self._tiny else 1)).normal_(0.0, 0.02).bfloat16()
        drawn = time.monotonic()
        offsets = count(0, 104_729)

        def pieces(name: str) -> Iterator[torch.Tensor]:
            left = int(np.prod(shapes[name]))
            first = next(offsets) % len(block)
            while left:
                piece = block[first : first + left]
                yield piece
                left = left - len(piece)
                first = 0

        size = write_weights(self._folder, shapes, "bfloat16", pieces, TINY_SHARD_BYTES if self._tiny else SHARD_BYTES)
        written = time.monotonic()
        for file in self._files:
            if time.monotonic() - written > SYNC_S:
                break
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            self._synced.append(file)
        synced = time.monotonic()
        return {
            "model": f"{self._shape.name}, {self._shape.spec.num_layers} layers",
            "bytes": size,
            "files": len(self._files),
            "draw_s": round(drawn - started, 2),
            "write_gb_s": round(size / (written - drawn) / 1e9, 2),
            "sync_s": round(synced - written, 2),
            "files_synced": len(self._synced),
        }

    def limits(self) -> dict[str, Any]:
        """How fast the files are read into memory of the host, and how fast that is copied to the device."""
        warm = {way: read_gb_s(self._files, READERS, way) for way in ("read", "map")}
        one = {way: read_gb_s(self._files, 1, way) for way in ("read", "map")}
        self._warm_gb_s = max(warm.values())
        result: dict[str, Any] = {
            "host_to_device_gb_s": self._bus,
            "readers": READERS,
            "warm_gb_s": warm,
            "warm_one_thread_gb_s": one,
        }
        if self._synced:
            left = drop(self._synced[:1])
            result["cold_one_file_gb_s"] = {
                "bytes": self._synced[0].stat().st_size,
                "resident_share": left,
                "read": read_gb_s(self._synced[:1], READERS, "read"),
            }
        return result

    def warm(self) -> dict[str, Any]:
        """From the page cache: as the engine loads, again, and with other numbers of readers and sizes of buffers."""
        self._read_all()
        sizes = [BUFFER_BYTES] if self._tiny else [BUFFER_BYTES // 4, BUFFER_BYTES * 4]
        return {
            "first": self._load(READERS, BUFFER_BYTES),
            "again": self._load(READERS, BUFFER_BYTES),
            "readers": {str(readers): self._load(readers, BUFFER_BYTES) for readers in (1, 2, 4)},
            "buffer_mib": {str(size // 2**20): self._load(READERS, size) for size in sizes},
            "tensors_checked": self._check(),
        }

    def cold(self) -> dict[str, Any]:
        """From the disk, as the engine loads, once the system has let go of the files."""
        if len(self._synced) < len(self._files):
            return {"skipped": f"the disk took more than {SYNC_S} s to write the files; they are in memory"}
        left = drop(self._files)
        if left > 0.1:
            return {"skipped": f"{left:.0%} of the files stay in memory, as on a file system that lives there"}
        return {"resident_share": left, **self._load(READERS, BUFFER_BYTES), "tensors_checked": self._check()}

    def engine(self) -> dict[str, Any]:
        """A whole engine, from its construction to a token."""
        self._read_all()
        self._model = None
        config = EngineConfig(
            model=str(self._folder),
            device=self._device.type,
            tokenizer="none",
            max_model_len=128 if self._tiny else 1024,
            max_num_seqs=1,
            graphs="none",
            kv_memory=2.0**24 if self._device.type == "cpu" else 0.9,
        )

        started = time.monotonic()
        link = InProcess()
        engine = Engine(config, local_group(self._device), link.transport)
        ready = time.monotonic()
        report = engine.worker.load_report

        with closing(LLM.from_engine(engine, link)) as llm:
            [output] = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))

        return {
            "ready_s": round(ready - started, 2),
            "load_s": round(report.seconds, 3),
            "gb_s": round(report.bytes_read / report.seconds / 1e9, 2),
            "tokens": len(output.outputs[0].token_ids),
        }

    def _load(self, readers: int, buffer_bytes: int) -> dict[str, Any]:
        """Through a landing that is made anew."""
        started = time.monotonic()
        landing = (CudaLanding if self._device.type == "cuda" else Landing)(self._device, buffer_bytes)
        landed = time.monotonic()
        with torch.inference_mode():
            slices = self._slices()
            ignore = self._built.may_be_left_over
            report = load_weights(self._folder, slices, ignore=ignore, threads=readers, landing=landing)
        rate = report.bytes_read / report.seconds / 1e9
        result: dict[str, Any] = {
            "bytes": report.bytes_read,
            "seconds": round(report.seconds, 3),
            "gb_s": round(rate, 2),
            "buffers_made_s": round(landed - started, 3),
        }
        limits = [limit for limit in (self._bus, self._warm_gb_s) if limit]
        if limits:
            result["share_of_limit"] = round(rate / min(limits), 3)
        return result

    @property
    def _built(self) -> CausalLM:
        """The model, as a worker builds it; on a CPU its weights stay as they are read."""
        if self._model is None:
            spec = self._shape.spec
            device = self._device
            backend = choose_backend(
                "auto", device=device, dtype=torch.bfloat16, head_dim=spec.head_dim, block_size=None
            )
            share = partition_model(EngineConfig(model=str(self._folder)), spec, 1).shares[0]
            build = Build(spec, share, local_group(device).collectives, backend, torch.bfloat16, device)
            with torch.inference_mode():
                self._model = CausalLM(build, 128)
        return self._model

    def _slices(self) -> list[WeightSlice]:
        return list(self._built.weight_slices())

    def _check(self) -> int:
        """Compare tensors with their files. Raises RuntimeError if one is not what its file says."""
        parts = self._slices()
        stored = locate_tensors(self._folder)
        chosen = parts[:: max(1, len(parts) // CHECKED)]
        for part in chosen:
            with safe_open(str(stored[part.name].file), framework="pt") as file:
                value = file.get_slice(part.name)[part.index]
            if not torch.equal(part.destination.cpu(), value.to(part.destination.dtype)):
                raise RuntimeError(f"{part.name} was loaded, but is not what its file holds")
        return len(chosen)

    def _read_all(self) -> None:
        """Bring the files to the page cache."""
        read_gb_s(self._files, READERS, "read")


def read_gb_s(files: Sequence[Path], threads: int, way: str) -> float:
    """GB/s at which threads bring files to buffers of the host: by read(2), or `way="map"` copied out of a map."""
    work = [(file, at) for file in files for at in range(0, file.stat().st_size, READ_BYTES)]
    mapped = {file: np.memmap(file, dtype=np.uint8, mode="r") for file in files} if way == "map" else {}

    def read(pieces: Sequence[tuple[Path, int]]) -> int:
        buffer = np.empty(READ_BYTES, dtype=np.uint8)
        done = 0
        for file, at in pieces:
            if way == "map":
                source = mapped[file][at : at + READ_BYTES]
                np.copyto(buffer[: len(source)], source)
                done += len(source)
            else:
                with file.open("rb", buffering=0) as stream:
                    stream.seek(at)
                    done += stream.readinto(buffer.data)  # type: ignore[arg-type]
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(read, [work[i::threads] for i in range(threads)]))
    return round(done / (time.perf_counter() - started) / 1e9, 3)


def drop(files: Sequence[Path]) -> float:
    """Ask the system to let go of files that are on the disk. Returns the share of them that stays in memory."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    pages = [_resident(file) for file in files]
    return round(float(np.concatenate(pages).mean()), 4)


def _resident(file: Path) -> np.ndarray:
    """Whether each page of a file is in memory: mincore(2)."""
    content = np.memmap(file, dtype=np.uint8, mode="r")
    pages = np.empty(-(-len(content) // mmap.PAGESIZE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(
        ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), pages.ctypes.data_as(ctypes.c_void_p)
    ):
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return pages & 1
