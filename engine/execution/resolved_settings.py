"""What a rank's settings come to on its device: everything that `auto` or nothing leaves open is decided here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels import cpu
from ...kernels.attention import AttentionBackend
from ...kernels.backend_selector import choose_backend
from ...kernels.weight_formats import get_weight_format
from ...parallel.group import Group
from ..config import EngineConfig
from ..errors import ConfigError
from ..models.resolve import resolve_dtype, resolve_max_model_len
from ..models.spec import ModelSpec
from .cpu_binding import Binding, choose_binding, start_threads
from .cuda_graphs import choose_graphs


@dataclass(frozen=True)
class ResolvedSettings:
    """The settings by which one rank computes."""

    dtype: torch.dtype
    uses_kernels: bool
    """phalanx's own C++ kernels compute."""
    binding: Binding
    backend: AttentionBackend
    overlap: bool
    graphs: str
    """none, all, lazy or eager."""
    graphs_reason: str
    """Why, in one line."""
    max_model_len: int
    block_size: int


def resolve_settings(
    config: EngineConfig, spec: ModelSpec, group: Group, binding: Binding | None = None
) -> ResolvedSettings:
    """Decide what `config` leaves open for this rank of `group`, and start the kernels' threads.

    `binding` is that of a process which is this rank's alone; without, only the kernels' own threads may be bound.
    Raises ConfigError for settings that this device, these kernels or this model do not allow.
    """
    device = group.device
    dtype: torch.dtype = getattr(torch, resolve_dtype(config, spec, device.type))
    uses_kernels = cpu.usable(device, dtype)
    if config.deterministic:
        _check_deterministic(group, dtype, uses_kernels)

    if binding is None:
        binding = choose_binding(config, device.type, group.rank % group.local_size, group.local_size)
    binding = start_threads(config, binding, uses_kernels)

    backend = _attention_backend(config, spec, dtype, device)
    graphs, graphs_reason = _graphs(config, backend, group)
    return ResolvedSettings(
        dtype=dtype,
        uses_kernels=uses_kernels,
        binding=binding,
        backend=backend,
        overlap=config.overlap if config.overlap is not None else device.type == "cuda",
        graphs=graphs,
        graphs_reason=graphs_reason,
        max_model_len=resolve_max_model_len(config, spec),
        block_size=_block_size(config, backend),
    )


def _check_deterministic(group: Group, dtype: torch.dtype, uses_kernels: bool) -> None:
    """Raises ConfigError where the bits of a token's results depend on the rest of its step."""
    if not uses_kernels:
        raise ConfigError(
            f"deterministic=True needs phalanx's C++ kernels, which compute bfloat16 and float32 on a CPU; here are "
            f"{group.device.type}, {dtype} and kernels that are {'built' if cpu.native else 'not built'}: set "
            f"deterministic=false"
        )
    if not group.collectives.has_fixed_order:
        raise ConfigError(
            f"deterministic=True needs sums over ranks in a fixed order, which a process group of {group.size} ranks "
            f"has not: set collectives=shared_memory (on one host), at most 2 ranks, or deterministic=false"
        )


def _attention_backend(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    if device.type == "cpu":
        cpu.warn_if_missing()
    try:
        get_weight_format(config.quantization).check(device, dtype)
        return choose_backend(
            config.attention,
            device=device,
            dtype=dtype,
            head_dim=spec.head_dim,
            block_size=config.block_size,
            kv_cache_dtype=config.kv_cache_dtype,
            group=spec.num_query_heads // spec.num_kv_heads,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _graphs(config: EngineConfig, backend: AttentionBackend, group: Group) -> tuple[str, str]:
    try:
        return choose_graphs(
            config.graphs,
            device=group.device.type,
            attention=backend.name,
            fits=backend.supports_graph,
            collectives_fit=group.collectives.supports_graph,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _block_size(config: EngineConfig, backend: AttentionBackend) -> int:
    if config.block_size is None:
        return backend.default_block_size
    if config.block_size % backend.block_multiple:
        raise ConfigError(
            f"block_size={config.block_size} must be a multiple of {backend.block_multiple} for "
            f"attention={backend.name}"
        )
    return config.block_size
