"""The paged KV cache's memory: how many blocks fit, and the tensors themselves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.memory import LEAST_BYTES, empty
from .config import EngineConfig
from .errors import ConfigError

CPU_BUDGET = 4 * 2**30
"""Bytes of KV cache on one host, over its ranks, where kv_memory names no bytes."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one rank: for each layer (blocks, block_size, kv_heads, width of a head), zero-initialised.

    Width and dtype are the attention backend's cache_head().
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(
        cls,
        num_blocks: int,
        block_size: int,
        layers: int,
        kv_heads: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        shape = (num_blocks, block_size, kv_heads, width)
        pools = [_zeros(shape, dtype, device) for _ in range(2 * layers)]
        return cls(pools[:layers], pools[layers:])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Large memory on a CPU is zero by itself, and costs nothing until it is used.
    pool = empty(shape, dtype, device)
    return pool if device.type == "cpu" and pool.nbytes >= LEAST_BYTES else pool.zero_()


def count_blocks(config: EngineConfig, max_model_len: int, block_size: int, block_bytes: int, available: int) -> int:
    """Blocks one rank can hold in `available` bytes (its kv_budget), never more than all its sequences can use.

    Raises ConfigError when not even one sequence of max_model_len fits.
    """
    each = -(-max_model_len // block_size)
    blocks = min(available // block_bytes, each * config.max_num_seqs)
    if blocks < each:
        fits = blocks * block_size
        lower = f"lower max_model_len to {fits} or " if fits else ""
        raise ConfigError(
            f"the KV cache has room for {fits} tokens ({available:,} bytes), but one sequence of "
            f"max_model_len={max_model_len} needs {each * block_bytes:,} bytes on a rank: {lower}raise kv_memory to at "
            f"least {each * block_bytes} (bytes), or use more ranks"
        )
    return blocks


def kv_budget(config: EngineConfig, device: torch.device, local_size: int, sequence_bytes: int) -> int:
    """Bytes this rank may spend on its KV cache, weights being loaded.

    kv_memory above 1 is that many bytes. A fraction on a GPU is of its whole memory, less what is in use there. On a
    CPU it is CPU_BUDGET (or one sequence's `sequence_bytes`, if more), within that fraction of the memory still free,
    divided by the ranks of this host.
    """
    if config.kv_memory > 1:
        return int(config.kv_memory)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(0, int(total * config.kv_memory) - (total - free))
    wanted = max(CPU_BUDGET // local_size, sequence_bytes)
    return min(wanted, int(available_memory() * config.kv_memory) // local_size)


def available_memory() -> int:
    """Bytes a new process could use on this host now: MemAvailable, within the control group's limit."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            break
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return available
