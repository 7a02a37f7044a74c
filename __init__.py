"""phalanx: tensor-parallel inference for decoder language models, on any number of ranks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.client.async_llm import AsyncLLM
    from .engine.client.llm import LLM
    from .engine.config import EngineConfig
    from .engine.errors import (
        CapacityExceeded,
        CheckpointError,
        ConfigError,
        EngineFault,
        EngineStopped,
        InvalidRequest,
        PhalanxError,
        Timeout,
    )
    from .engine.protocol.sampling_params import SamplingParams
    from .engine.protocol.structured import StructuredOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "client.llm",
    "AsyncLLM": "client.async_llm",
    "SamplingParams": "protocol.sampling_params",
    "StructuredOutput": "protocol.structured",
    "EngineConfig": "config",
    "PhalanxError": "errors",
    "InvalidRequest": "errors",
    "ConfigError": "errors",
    "CheckpointError": "errors",
    "CapacityExceeded": "errors",
    "EngineFault": "errors",
    "EngineStopped": "errors",
    "Timeout": "errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CapacityExceeded",
    "CheckpointError",
    "ConfigError",
    "EngineConfig",
    "EngineFault",
    "EngineStopped",
    "InvalidRequest",
    "PhalanxError",
    "SamplingParams",
    "StructuredOutput",
    "Timeout",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that tools which need no torch (launch.plan) start at once.
    if name in _HOMES:
        return getattr(importlib.import_module(f".engine.{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
