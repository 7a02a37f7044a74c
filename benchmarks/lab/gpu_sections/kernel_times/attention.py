"""Attention alone, in one layer of a model's shape: phalanx's kernels beside others', and torch's SDPA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from phalanx.engine.models.spec import ModelSpec
from phalanx.kernels import cuda
from phalanx.kernels.attention import AttentionBackend, AttentionMetadata
from phalanx.kernels.backend_selector import choose_backend
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..device import best_s
from ..shapes import Shape
from .roofline import Ceilings, attention_bytes, attention_flops

DTYPE = torch.bfloat16
CACHES_BYTES = 2**29
"""Size of the copies of keys and values that are read in turn: more than the caches of any GPU hold."""
MOST_COPIES = 64
GPU_BACKENDS = ("triton", "flash_attn_3", "flash_attn_2")
CPU_BACKENDS = ("cpu", "torch")
WORKSPACE_BYTES = 2**27


@dataclass(frozen=True)
class Case:
    """`rows` sequences of `keys` tokens, of which the last `queries` are asked for."""

    rows: int
    keys: int
    queries: int

    @property
    def name(self) -> str:
        """As in the results."""
        return f"decode_{self.rows}x{self.keys}" if self.queries == 1 else f"prefill_{self.queries}_of_{self.keys}"


@dataclass(frozen=True)
class Inputs:
    """Queries (T, heads, head_dim), and keys and values (rows, keys, kv_heads, head_dim) in each of the copies."""

    case: Case
    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @classmethod
    def random(cls, case: Case, spec: ModelSpec, device: torch.device) -> Inputs:
        """Normal numbers of a fixed seed, in so many copies that on a GPU its caches hold none of them."""
        generator = torch.Generator(device).manual_seed(0)
        size = attention_bytes(case.keys, case.rows, spec.num_kv_heads, spec.head_dim, DTYPE.itemsize)
        copies = min(MOST_COPIES, -(-CACHES_BYTES // size)) if device.type == "cuda" else 2

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, spec.head_dim, generator=generator, device=device, dtype=DTYPE)

        shape = case.rows, case.keys, spec.num_kv_heads
        q = normal(case.rows * case.queries, spec.num_query_heads)
        return cls(case, q, [normal(*shape) for _ in range(copies)], [normal(*shape) for _ in range(copies)])


Kernel = list[Callable[[], torch.Tensor]]
"""Attention over each copy of the keys and values, as (T, heads, head_dim)."""


def cases_of(shape: Shape) -> list[Case]:
    """Decodes of every batch, and of one long sequence; a prompt; and a chunk at the end of a longer one."""
    sizes = shape.sizes
    longest = sizes.prompts[-1]
    decodes = [Case(rows, sizes.context, 1) for rows in sizes.batches] + [Case(1, longest, 1)]
    prompt = sizes.prompts[1]
    return [*decodes, Case(1, prompt, prompt), Case(1, longest, prompt)]


def sdpa(inputs: Inputs) -> Kernel:
    """torch's scaled_dot_product_attention, which need not look keys up in blocks."""
    case = inputs.case
    q = inputs.q
    kv_heads = inputs.k[0].shape[2]
    options: dict[str, Any] = {}
    if case.queries == 1:
        # The query heads of a group stand where query positions usually do, so each key is read once a group.
        queries = q.view(case.rows, kv_heads, -1, q.shape[2])
    else:
        queries = q.view(case.rows, case.queries, *q.shape[1:]).transpose(1, 2)
        options = {"is_causal": True, "enable_gqa": True}
    keys, values = ([x.transpose(1, 2) for x in copies] for copies in (inputs.k, inputs.v))
    if case.queries not in (1, case.keys):
        options = {"attn_mask": causal_lower_right(case.queries, case.keys)}
        # The fast kernels take this mask without grouped queries only.
        group = q.shape[1] // kv_heads
        keys, values = ([x.repeat_interleave(group, 1) for x in copies] for copies in (keys, values))

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = scaled_dot_product_attention(queries, k, v, **options)
        return out.reshape(q.shape) if case.queries == 1 else out.transpose(1, 2).reshape(q.shape)

    return [partial(attend, k, v) for k, v in zip(keys, values, strict=True)]


class Paged:
    """The same keys and values in blocks, in random order, each sequence's last one filled in part maybe."""

    def __init__(self, inputs: Inputs, block_size: int) -> None:
        case = inputs.case
        device = inputs.q.device
        self.block_size = block_size
        self.blocks = -(-case.keys // block_size)

        # Blocks lie anywhere in the pool, as in a cache that has served for a while.
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(case.rows * self.blocks, generator=generator).view(case.rows, self.blocks)
        positions = torch.arange(case.keys)
        slot_mapping = order[:, positions // block_size] * block_size + positions % block_size
        self.table = order.to(device)
        self.slot_mapping = slot_mapping.flatten().to(device)

        self.metadata = AttentionMetadata(
            num_decodes=case.rows if case.queries == 1 else 0,
            slot_mapping=self.slot_mapping,
            block_table=self.table,
            cu_q=torch.arange(case.rows + 1, dtype=torch.int32, device=device) * case.queries,
            seqused_k=torch.full((case.rows,), case.keys, dtype=torch.int32, device=device),
            query_lengths=(case.queries,) * case.rows,
            key_lengths=(case.keys,) * case.rows,
            block_size=block_size,
        )

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros for these blocks' keys or values."""
        return x.new_zeros(self.table.numel(), self.block_size, *x.shape[2:])


def backend_kernel(name: str, inputs: Inputs) -> Kernel:
    """One of phalanx's attention backends. Raises ValueError if it cannot serve here."""
    q = inputs.q
    kv_heads, head_dim = inputs.k[0].shape[2:]
    backend = choose_backend(
        name, device=q.device, dtype=DTYPE, head_dim=head_dim, block_size=None, group=q.shape[1] // kv_heads
    )
    paged = Paged(inputs, backend.default_block_size)
    pools = []
    for k, v in zip(inputs.k, inputs.v, strict=True):
        k_pool, v_pool = paged.pool(k), paged.pool(v)
        backend.store_kv(k.flatten(0, 1), v.flatten(0, 1), k_pool, v_pool, paged.slot_mapping)
        pools.append((k_pool, v_pool))
    plan = backend.plan(paged.metadata)
    return [partial(_attend, backend, q, *pool, plan, paged) for pool in pools]


def _attend(
    backend: AttentionBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, keep: Paged
) -> torch.Tensor:
    """A plan may be good only as long as the tensors that it was made from: `keep` is who has them."""
    assert keep.metadata.block_size == k.shape[1]
    return backend.attend(q, k, v, plan)


def flashinfer_kernel(inputs: Inputs) -> Kernel:
    """FlashInfer's paged attention. Raises ImportError without it."""
    import flashinfer

    case = inputs.case
    q = inputs.q
    kv_heads, head_dim = inputs.k[0].shape[2:]
    paged = Paged(inputs, 16)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    rows = torch.arange(case.rows + 1, dtype=torch.int32, device=q.device)
    last = torch.full_like(rows[1:], (case.keys - 1) % paged.block_size + 1)
    where = rows * paged.blocks, paged.table.flatten().int(), last
    model = q.shape[1], kv_heads, head_dim, paged.block_size
    dtypes = {"q_data_type": DTYPE, "kv_data_type": DTYPE}
    if case.queries == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        wrapper.plan(*where, *model, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper.plan(rows * case.queries, *where, *model, causal=True, **dtypes)
    pools = []
    for pair in zip(inputs.k, inputs.v, strict=True):
        pool = tuple(paged.pool(x) for x in pair)
        for x, values in zip(pool, pair, strict=True):
            x.flatten(0, 1)[paged.slot_mapping] = values.flatten(0, 1)
        pools.append(pool)
    return [partial(wrapper.run, q, pool) for pool in pools]


def kernels_for(device: torch.device) -> Iterator[tuple[str, Callable[[Inputs], Kernel]]]:
    """The kernels to measure, by name; phalanx's own comes first."""
    names = GPU_BACKENDS if device.type == "cuda" else CPU_BACKENDS
    if device.type == "cpu" and cuda.interpreting():
        names = ("triton", *names)
    for name in names:
        yield name, partial(backend_kernel, name)
    if device.type == "cuda":
        yield "flashinfer", flashinfer_kernel


def measure_case(case: Case, shape: Shape, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """Every kernel's time, its share of the ceilings, and its largest difference to SDPA's results."""
    spec = shape.spec
    inputs = Inputs.random(case, spec, device)
    repeats = 5 if device.type == "cuda" else 2
    reference = sdpa(inputs)
    expected = reference[0]().float()
    results: dict[str, Any] = {"sdpa": _figures(case, spec, best_s(reference, device, repeats, graph=True), ceilings)}

    kernels = dict(kernels_for(device))
    for name, make in kernels.items():
        try:
            kernel = make(inputs)
            error = float((kernel[0]().float() - expected).abs().max())
            figures = _figures(case, spec, best_s(kernel, device, repeats, graph=True), ceilings)
            results[name] = {**figures, "largest_error": round(error, 5)}
        except (ValueError, ImportError) as reason:
            results[name] = {"skipped": str(reason)}
        except Exception as failure:  # of any kind: most are other people's packages
            results[name] = {"error": f"{type(failure).__name__}: {failure}"[:400]}

    own = results[next(iter(kernels))]
    for other in results.values():
        if "us" in own and "us" in other and other is not own:
            other["speed_of_own_to_this"] = round(other["us"] / own["us"], 3)
    return results


def _figures(case: Case, spec: ModelSpec, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    if case.queries == 1:
        read = attention_bytes(case.keys, case.rows, spec.num_kv_heads, spec.head_dim, DTYPE.itemsize)
        rate = {"gb_s": round(read / seconds / 1e9, 1)}
        rate["share_of_copy_bandwidth"] = round(read / seconds / 1e9 / ceilings.copy_gb_s, 3)
    else:
        flops = attention_flops(case.queries, case.keys, spec.num_query_heads, spec.head_dim)
        rate = {"tflops": round(flops / seconds / 1e12, 3)}
        rate["share_of_matmul_rate"] = round(flops / seconds / 1e12 / ceilings.matmul_tflops, 3)
    return {"us": round(1e6 * seconds, 2), **rate}


def measure_attention(shape: Shape, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """Every case's figures, or how the case failed."""
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for case in cases_of(shape):
            try:
                results[case.name] = measure_case(case, shape, device, ceilings)
            except RuntimeError as failure:  # out of memory is one
                results[case.name] = {"error": f"{type(failure).__name__}: {failure}"[:400]}
    return {"shape": shape.name, "dtype": str(DTYPE), "cases": results}
