"""What a configuration makes of a model: its dtype, its longest sequence, its parts. Without torch."""

from __future__ import annotations

from ...kernels.weight_formats import get_weight_format
from ...parallel.partition import Partition, PartitionError, partition
from ..config import EngineConfig
from ..errors import ConfigError
from .spec import ModelSpec, dimensions, position_limit, window_words


def resolve_dtype(config: EngineConfig, spec: ModelSpec, device: str) -> str:
    """Return the name of the dtype of weights and activations on a device "cpu" or "cuda".

    auto is the checkpoint's own dtype, but a CPU computes a float16 checkpoint in bfloat16.
    """
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if (spec.dtype, device) == ("float16", "cpu") else spec.dtype


def resolve_max_model_len(config: EngineConfig, spec: ModelSpec) -> int:
    """Return the configured max_model_len, or the model's own. Raises ConfigError above the model's position limit."""
    limit = position_limit(spec)
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        if spec.attention_window == limit:
            raise ConfigError(f"max_model_len={config.max_model_len} must be at most {limit}: {window_words(spec)}")
        raise ConfigError(
            f"max_model_len={config.max_model_len} is above the model's {limit} positions; lower max_model_len to at "
            f"most {limit}, or give the model's config.json a rope scaling"
        )
    return config.max_model_len


def partition_model(config: EngineConfig, spec: ModelSpec, ranks: int) -> Partition:
    """Return what each rank holds. Raises ConfigError if the model cannot be cut so."""
    try:
        return partition(dimensions(spec), ranks, config.rank_weights, get_weight_format(config.quantization))
    except PartitionError as error:
        raise ConfigError(str(error)) from error
