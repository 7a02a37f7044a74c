"""Kernels for NVIDIA GPUs, written in Triton, and the adapters of flash-attn: nothing here is compiled at installation.

Triton comes with torch's CUDA builds. Without it torch's operations serve instead, and warn_if_missing says so once.
With TRITON_INTERPRET=1 in the environment before Triton is imported, its interpreter runs the same kernels on a CPU's
tensors, slowly: that is how they are tested where there is no GPU, see interpret().
"""

from __future__ import annotations

import importlib.util
import logging

import torch

__all__ = ["interpret", "interpreting", "usable", "warn_if_missing"]

_log = logging.getLogger("phalanx")
_installed = importlib.util.find_spec("triton") is not None
_interpreting = False
_warned = False


def usable(device: torch.device) -> bool:
    """Whether the Triton kernels can compute with tensors on this device."""
    return _installed and (device.type == "cuda" or (_interpreting and device.type == "cpu"))


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return _interpreting


def interpret(on: bool) -> None:
    """Let Triton's interpreter serve this process's CPU tensors, or no longer; for tests.

    Raises RuntimeError if Triton is not installed, or was imported without TRITON_INTERPRET=1 in the environment.
    """
    global _interpreting
    if on:
        if not _installed:
            raise RuntimeError("Triton is not installed, its interpreter cannot be used: pip install triton")
        import triton

        if not triton.knobs.runtime.interpret:
            raise RuntimeError("Triton compiles for GPUs here: set TRITON_INTERPRET=1 before it is imported")
    _interpreting = on


def warn_if_missing() -> None:
    """Log once, if Triton is not installed, that slower operations serve instead."""
    global _warned
    if not _installed and not _warned:
        _warned = True
        _log.warning(
            "Triton is not installed: torch's operations are used on the GPU instead of phalanx's kernels, which is "
            "slower. pip install triton"
        )
