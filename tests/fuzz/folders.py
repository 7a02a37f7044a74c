"""Folders for the targets: one for their files, and a tiny model's, made once for a process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from phalanx.tests.models import TINY_SHAPE


@cache
def scratch() -> Path:
    """A folder that goes with the process: in memory, since most inputs are written to files."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tiny_model() -> Path:
    """A random Qwen2 of 2 layers with a byte-level tokenizer."""
    from phalanx.launch.model_files.random_model import make_random_model

    return make_random_model(scratch() / "tiny", TINY_SHAPE, dtype="float32")
