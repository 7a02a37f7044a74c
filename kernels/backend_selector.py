"""The attention backend for a device and a model: chosen by what these are, and by a trial of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import ATTENTION_BACKENDS, cpu, cuda
from .attention import AttentionBackend, AttentionMetadata, TorchAttention
from .cpu.attention import CpuAttention
from .cuda.attention import AttentionKernel, CudaAttention, TritonDecode, TritonPrefill
from .cuda.flash import FlashAttention2, FlashAttention3

BACKENDS: dict[str, type[AttentionBackend] | type[AttentionKernel]] = {
    each.name: each for each in (CpuAttention, TorchAttention, TritonDecode, FlashAttention2, FlashAttention3)
}
PROMPT_ORDER = ("flash_attn_3", "flash_attn_2", "triton")
DECODE_ORDER = ("triton", "flash_attn_3", "flash_attn_2")
"""On a GPU, the best first, as benchmarks/gpu.py measured them on an H200: torch where none of them can serve."""
LARGEST_HEAD = 256
HALF_PRECISION = (torch.bfloat16, torch.float16)
TOLERANCE = 0.05
"""Largest error of a trial's results, weighted means of values from a standard normal distribution."""
REASON_LENGTH = 160


@dataclass(frozen=True)
class DeviceFacts:
    """The facts that the choice depends on beside settings: the device, what is installed for it, and the model."""

    device: str  # torch's name of the device's type
    capability: tuple[int, int] | None  # of an NVIDIA GPU; None without one
    dtype: torch.dtype
    head_dim: int
    int8_cache: bool = False
    cpu_kernels: bool = False  # built, and for this device and dtype
    triton: bool = False  # installed, and for this device


@dataclass(frozen=True)
class Selection:
    """The backends of prompts and of decodes, the tokens of a block in the cache they share, and why, in one line."""

    prefill: str
    decode: str
    block_size: int
    reason: str


class _Obstacle(NamedTuple):
    """Why a backend cannot serve, and what to set instead."""

    what: str
    instead: str = "attention=auto"


def select(name: str, facts: DeviceFacts, probes: Mapping[str, str | None], block_size: int | None) -> Selection:
    """Choose the backends for an `attention` setting. `block_size` is the one asked for; None takes their default.

    `probes` gives for each of flash_attn_3, flash_attn_2 and triton why a trial of it failed, None if it did not; only
    those that may be chosen are looked up. Raises ValueError for an unknown name, and where the backend that was asked
    for cannot serve: it names the setting and what to set instead.
    """
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention={name!r} is not one of {', '.join(ATTENTION_BACKENDS)}")
    if name == "cpu" or facts.int8_cache:
        return _must_use_cpu_kernels(name, facts, block_size)

    if name != "auto":
        obstacle = _obstacle(name, facts, probes, block_size)
        if obstacle is not None:
            raise ValueError(f"attention={name} cannot serve here: {obstacle.what}; set {obstacle.instead}")
        return _selection(name, name, name, block_size, [])

    # attention=auto: the C++ kernels on a CPU, else the first of each order that can serve.
    if facts.device == "cpu":
        obstacle = _obstacle("cpu", facts, probes, block_size)
        chosen = "cpu" if obstacle is None else "torch"
        return _selection(name, chosen, chosen, block_size, [f"cpu: {obstacle.what}"] if obstacle else [])

    obstacles: dict[str, _Obstacle] = {}
    prefill = _first(PROMPT_ORDER, facts, probes, block_size, obstacles)
    decode = _first(DECODE_ORDER, facts, probes, block_size, obstacles)
    why = [f"{other}: {obstacle.what}" for other, obstacle in obstacles.items()]
    if facts.capability is not None:
        why.append("sm_{}{}".format(*facts.capability))
    return _selection(name, prefill, decode, block_size, why)


def _selection(name: str, prefill: str, decode: str, block_size: int | None, why: list[str]) -> Selection:
    if block_size is None:
        block_size = max(BACKENDS[prefill].default_block_size, BACKENDS[decode].default_block_size)
    uses = f"{prefill} for prompts and decodes" if prefill == decode else f"{prefill} for prompts, {decode} for decodes"
    reason = f"attention={name}: {uses} ({'; '.join([*why, f'block_size {block_size}'])})"
    return Selection(prefill, decode, block_size, reason)


def _first(
    order: tuple[str, ...],
    facts: DeviceFacts,
    probes: Mapping[str, str | None],
    block_size: int | None,
    obstacles: dict[str, _Obstacle],
) -> str:
    """The first of `order` that can serve, else torch. What keeps the others from it is added to `obstacles`."""
    for candidate in order:
        obstacle = _obstacle(candidate, facts, probes, block_size)
        if obstacle is None:
            return candidate
        obstacles[candidate] = obstacle
    return "torch"


def _obstacle(
    name: str, facts: DeviceFacts, probes: Mapping[str, str | None], block_size: int | None
) -> _Obstacle | None:
    """The obstacle that keeps a backend from serving, or None; a trial is asked for last."""
    if name == "torch":
        return None
    obstacle = _cpu_obstacle(facts) if name == "cpu" else _gpu_obstacle(name, facts)
    if obstacle is None and block_size is not None:
        obstacle = _block_obstacle(name, block_size)
    if obstacle is None and name != "cpu" and (failure := probes[name]) is not None:
        return _Obstacle(failure)
    return obstacle


def _block_obstacle(name: str, block_size: int) -> _Obstacle | None:
    multiple = BACKENDS[name].block_multiple
    if name == "triton" and block_size >= multiple and block_size & (block_size - 1):
        fit = 1 << block_size.bit_length()
        rule = "a power of two"
    elif block_size % multiple:
        fit = -(-block_size // multiple) * multiple
        rule = f"a multiple of {multiple}"
    else:
        return None
    return _Obstacle(f"block_size={block_size} must be {rule}", f"block_size={fit}, or attention=auto")


def _cpu_obstacle(facts: DeviceFacts) -> _Obstacle | None:
    if not facts.cpu_kernels:
        return _Obstacle(f"phalanx's C++ kernels are not built or do not serve {facts.device} and {facts.dtype}")
    if facts.head_dim % cpu.PANEL:
        return _Obstacle(f"heads of {facts.head_dim} are no multiple of {cpu.PANEL}")
    return None


def _gpu_obstacle(name: str, facts: DeviceFacts) -> _Obstacle | None:
    """Return what keeps flash-attn or Triton from serving, as far as it shows without a trial."""
    # What Triton and flash-attn both need.
    if facts.device == "cuda" and facts.capability is None:
        return _Obstacle("torch finds no NVIDIA GPU")
    if not facts.triton:
        return _Obstacle(
            "Triton is not installed" if facts.device == "cuda" else f"it needs a GPU, here is {facts.device}"
        )
    if facts.head_dim > LARGEST_HEAD:
        return _Obstacle(f"heads of {facts.head_dim} are larger than {LARGEST_HEAD}")
    if name == "triton":
        return None

    # What flash-attn needs beyond that.
    if facts.capability is None:
        return _Obstacle(f"it needs a GPU, here is {facts.device}")
    if name == "flash_attn_3" and facts.capability != (9, 0):
        return _Obstacle("it needs sm_90 (H100, H200), here is sm_{}{}".format(*facts.capability))
    if facts.capability < (8, 0):
        return _Obstacle("it needs sm_80 or newer, here is sm_{}{}".format(*facts.capability))
    if facts.dtype not in HALF_PRECISION:
        return _Obstacle(f"it computes no {facts.dtype}", "dtype=bfloat16, or attention=auto")
    if facts.head_dim % 8:
        return _Obstacle(f"heads of {facts.head_dim} are no multiple of 8")
    return None


def _must_use_cpu_kernels(name: str, facts: DeviceFacts, block_size: int | None) -> Selection:
    if name in ("auto", "cpu") and _obstacle("cpu", facts, {}, block_size) is None:
        return _selection(name, "cpu", "cpu", block_size, [])
    setting, value = ("kv_cache_dtype", "int8") if facts.int8_cache else ("attention", "cpu")
    raise ValueError(
        f"{setting}={value} needs phalanx's C++ kernels, a CPU, dtype bfloat16 or float32, and a head size and "
        f"block_size that are multiples of {cpu.PANEL}; here are attention={name}, {facts.device}, {facts.dtype}, "
        f"heads of {facts.head_dim}, block_size={block_size} and kernels that are "
        f"{'built' if cpu.native else 'not built'}: set {setting}=auto"
    )


def choose_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_size: int | None,
    kv_cache_dtype: str = "auto",
    group: int = 1,
) -> AttentionBackend:
    """The backend for an `attention` setting and what it is to compute with; its `reason` is why.

    `block_size` is the one asked for, None if any will do; `group` the query heads of a KV head. On a GPU, packages
    that may serve are imported and tried. Raises ValueError for an unknown name, and for a backend that cannot serve.
    """
    facts = DeviceFacts(
        device=device.type,
        capability=torch.cuda.get_device_capability(device) if _has_gpu(device) else None,
        dtype=dtype,
        head_dim=head_dim,
        int8_cache=kv_cache_dtype == "int8",
        cpu_kernels=cpu.usable(device, dtype),
        triton=cuda.usable(device),
    )

    selection = select(name, facts, _Probes(device, dtype, head_dim, group), block_size)
    backend = _backend(selection, device, facts.int8_cache)
    backend.reason = selection.reason
    return backend


def _has_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def _backend(selection: Selection, device: torch.device, int8_cache: bool) -> AttentionBackend:
    if selection.prefill == "cpu":
        return CpuAttention(int8_cache)
    if selection.prefill == "torch":
        return TorchAttention()
    prefill = _kernels(selection.prefill, device)[1]
    return CudaAttention(_kernels(selection.decode, device)[0], prefill)


def _kernels(name: str, device: torch.device) -> tuple[AttentionKernel, AttentionKernel]:
    """The kernels of decodes and of prompts; ImportError where a package is missing."""
    if name == "triton":
        return TritonDecode(), TritonPrefill()
    if name == "flash_attn_2":
        kernel: AttentionKernel = FlashAttention2()
    else:
        properties = torch.cuda.get_device_properties(device) if _has_gpu(device) else None
        kernel = FlashAttention3(properties.multi_processor_count if properties else 1)
    return kernel, kernel


class _Probes(dict[str, str | None]):
    """The result of a trial of each backend, by name; tried when first asked for."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> None:
        super().__init__()
        self._trial = device, dtype, head_dim, group

    def __missing__(self, name: str) -> str | None:
        # Triton's interpreter is for tests, and slow.
        in_test = name == "triton" and self._trial[0].type == "cpu"
        self[name] = None if in_test else probe(name, *self._trial)
        return self[name]


def probe(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> str | None:
    """None if flash_attn_3, flash_attn_2 or triton computes a small step on this device as torch does, else why not."""
    try:
        backend = CudaAttention(*_kernels(name, device))
        with torch.inference_mode():
            error = _trial(backend, device, dtype, head_dim, group)
    except Exception as failure:  # of any kind: they are other people's packages and compilers
        lines = str(failure).splitlines()
        return f"{type(failure).__name__}: {lines[0][:REASON_LENGTH]}" if lines else type(failure).__name__
    return None if error <= TOLERANCE else f"in a trial its results differed from torch's by {error:.2g}"


def _trial(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> float:
    """The largest difference to torch's results, NaN being 1, in a step of decodes and prompt chunks."""
    # Two decodes, a whole prompt, and a chunk that continues one; keys of one block and of two.
    block_size = backend.default_block_size
    kv_heads = 2
    query_lengths = (1, 1, 40, 7)
    key_lengths = (3, block_size + 2, 40, block_size + 20)
    tokens = sum(query_lengths)
    rows = len(query_lengths)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    metadata = AttentionMetadata(
        num_decodes=2,
        slot_mapping=torch.zeros(tokens, dtype=torch.int64, device=device),
        block_table=torch.randperm(2 * rows, generator=generator).view(rows, 2).to(device),
        cu_q=torch.tensor((0, *query_lengths)).cumsum(0).to(device, torch.int32),
        seqused_k=torch.tensor(key_lengths, dtype=torch.int32, device=device),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        block_size=block_size,
    )

    q = normal(tokens, kv_heads * group, head_dim)
    k_cache, v_cache = (normal(2 * rows, block_size, kv_heads, head_dim) for _ in range(2))
    out, expected = (
        each.attend(q, k_cache, v_cache, each.plan(metadata)).float() for each in (backend, TorchAttention())
    )
    return float((out - expected).abs().nan_to_num(nan=1.0).max())
