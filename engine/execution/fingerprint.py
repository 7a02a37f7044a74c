"""What decides every byte of a rank's packed weights: if none of it has changed, they need not be made again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import torch

from ...kernels import cpu
from ...parallel.loading.kept_memory import identity_of_files
from ...parallel.partition import Partition
from ..config import EngineConfig
from .resolved_settings import ResolvedSettings


def fingerprint(config: EngineConfig, folder: Path, partition: Partition, rank: int, settings: ResolvedSettings) -> str:
    """Return a hash of the model's files, the rank's part of them, and how this machine's kernels keep them.

    A file counts as changed when its size, its time of change or its inode has.
    """
    library = Path(cpu.native.__file__).stat() if cpu.native is not None else None
    parts = (
        (str(folder.resolve()), identity_of_files(folder)),
        (config.load_format, config.seed if config.load_format == "dummy" else None),
        (config.quantization, config.deterministic, str(settings.dtype), str(torch.__version__)),
        (rank, len(partition.shares), repr(partition.shares[rank])),
        # A build of the kernels may lay weights out otherwise, and so does another instruction set.
        (library.st_size, library.st_mtime_ns, cpu.native.kernels(), cpu.native.int8_together()) if library else None,
        settings.binding.threads,
    )
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=32).hexdigest()
