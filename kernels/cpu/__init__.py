"""phalanx's own kernels for CPUs: a C++ extension without torch, to which tensors are passed as addresses.

The extension is optional. Where it was not built, torch's operations serve instead, and warn_if_missing says so once.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

try:
    native: Any = importlib.import_module("._native", __package__)
    _reason = ""
except ImportError as error:
    native = None
    _reason = str(error)

__all__ = ["DTYPES", "PANEL", "address", "compresses", "native", "set_threads", "usable", "warn_if_missing"]

DTYPES = {torch.bfloat16: 0, torch.float32: 1}
"""The dtypes that the kernels compute with, and their numbers there (kernels/cpu/kernels.h, DType)."""

PANEL = 16
"""Rows of a weight that stand together once it is packed, and keys of a cache block."""

_log = logging.getLogger("phalanx")
_warned = False


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels are here and compute with tensors of this dtype on this device."""
    return native is not None and device.type == "cpu" and dtype in DTYPES


def compresses() -> bool:
    """Whether the kernels in use expand compressed weights as fast as they multiply: with AVX-512."""
    return native is not None and native.kernels().startswith("avx512")


def warn_if_missing() -> None:
    """Log once, if the extension is missing, that slower operations serve instead, and why."""
    global _warned
    if native is None and not _warned:
        _warned = True
        _log.warning(
            "phalanx's C++ kernels are not built (%s): torch's operations are used instead, which are slower. "
            "Install again where a C++17 compiler is found",
            _reason,
        )


def address(tensor: torch.Tensor | None) -> int:
    """Return the address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def set_threads(count: int, cpus: Sequence[int] = ()) -> None:
    """Let later operations of this process run on `count` threads, the caller's included.

    With `cpus`, one for each thread, thread i runs on cpus[i] alone; the first is the caller's, which stays as it is.
    Raises OSError, and leaves the threads to the system, if it refuses one its CPU.
    """
    if native is not None:
        native.set_threads(count, list(cpus))
