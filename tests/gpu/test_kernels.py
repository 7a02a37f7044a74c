"""Every Triton kernel on the device against torch's operations on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phalanx.kernels import activation, norm, sampling
from phalanx.kernels.attention import HeadNorms, TorchAttention
from phalanx.kernels.cuda.attention import CudaAttention, TritonDecode, TritonPrefill
from phalanx.kernels.rope import RotaryEmbedding
from phalanx.tests.gpu.place import DEVICE, DTYPES, ON_GPU, close, normal, torch_alone

SHAPES = [(0, 64), (1, 5120), (7, 64), (33, 1024), (256, 5120)] if ON_GPU else [(0, 64), (1, 96), (3, 640)]
VOCABULARY = 152_064 if ON_GPU else 5000


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double().cpu(), (x.shape[-1],), weight.double().cpu(), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = 3 * normal(*shape), normal(shape[1], seed=1)
    close(norm.rms_norm(x, weight, 1e-6, dtype), _rms_norm(x, weight))


def test_rms_norm_of_heads_in_a_projection() -> None:
    qkv, weight = normal(5, 9, 128, dtype=torch.bfloat16), normal(128, seed=1)
    heads = qkv[:, 2:7]
    close(norm.rms_norm(heads, weight, 1e-6, torch.bfloat16), _rms_norm(heads, weight))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, biased: bool) -> None:
    total, weight = normal(*shape), normal(shape[1], seed=1)
    addend = normal(*shape, dtype=dtype, seed=2)
    bias = normal(shape[1], dtype=dtype, seed=3) if biased else None
    expected = total.double().cpu() + addend.double().cpu() + (0 if bias is None else bias.double().cpu())
    normed = norm.add_rms_norm(total, addend, bias, weight, 1e-6, dtype)
    close(total, expected)
    close(normed, _rms_norm(expected, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = 4 * normal(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = gate_up.double().cpu().chunk(2, dim=-1)
    close(activation.silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


def _tables(positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    embedding = RotaryEmbedding(
        head_dim=head_dim, max_position=4096, table_length=4096, dtype=dtype, device=DEVICE,
        kind="default", theta=10000.0, factor=1.0, original_max_position=0, beta_fast=32.0, beta_slow=1.0,
        attention_factor=None, mscale=None, mscale_all_dim=None, truncate=True, low_freq_factor=1.0,
        high_freq_factor=4.0,
    )  # fmt: skip
    return embedding(positions, positions + 1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (40, 8, 128), (7, 1, 80)])
@pytest.mark.parametrize("tokens", [0, 1, 200] if ON_GPU else [0, 3])
def test_heads_are_normalised_rotated_and_stored(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool
) -> None:
    block_size, blocks = 16, tokens // 16 + 2
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    slot_mapping = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(1))[:tokens]
    norms = HeadNorms(normal(head_dim, seed=2), normal(head_dim, seed=3), 1e-6) if normed else None
    tables = _tables(torch.arange(tokens, device=DEVICE) * 7, head_dim, dtype)
    pools = [torch.full((blocks, block_size, kv_heads, head_dim), 9.0, dtype=dtype, device=DEVICE) for _ in "kv"]
    of_cpu = [pool.cpu() for pool in pools]
    with torch_alone():
        norms_there = HeadNorms(norms.query.cpu(), norms.key.cpu(), norms.eps) if norms else None
        cos, sin = (table.cpu() for table in tables)
        expected = TorchAttention().rotate_and_store(qkv.cpu().clone(), cos, sin, norms_there, *of_cpu, slot_mapping)
    triton = CudaAttention(TritonDecode(), TritonPrefill())
    q = triton.rotate_and_store(qkv.clone(), *tables, norms, *pools, slot_mapping.to(DEVICE))
    # Between norm and rotation torch rounds to the dtype, as the kernel does, but of another sum.
    close(q, expected, slack=4.0)
    close(pools[0], of_cpu[0], slack=4.0)
    assert torch.equal(pools[1].cpu(), of_cpu[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_stored_in_their_places_and_nowhere_else(dtype: torch.dtype) -> None:
    pools = [torch.zeros(5, 32, 8, 128, dtype=dtype, device=DEVICE) for _ in "kv"]
    slot_mapping = torch.tensor([3, 150, 32, 159, 0], device=DEVICE)
    heads = normal(5, 24, 128, dtype=dtype)
    k, v = heads[:, 8:16], heads[:, 16:]
    CudaAttention(TritonDecode(), TritonPrefill()).store_kv(k, v, *pools, slot_mapping)
    for pool, x in zip(pools, (k, v), strict=True):
        expected = torch.zeros_like(pool)
        expected.flatten(0, 1)[slot_mapping] = x
        assert torch.equal(pool, expected)


def _columns(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    temperature = torch.linspace(0.1, 2.0, rows).unsqueeze(1)
    seed = torch.arange(rows).unsqueeze(1) * 12345 - 7
    return temperature.to(DEVICE), seed.to(DEVICE), (torch.arange(rows, device=DEVICE) + 3).unsqueeze(1) << 32


@pytest.mark.parametrize("rows", [1, 3, 64] if ON_GPU else [1, 3])
def test_the_largest_and_the_noisy_largest_are_those_of_a_cpu(rows: int) -> None:
    values = 3 * normal(rows, VOCABULARY)
    values[0, VOCABULARY // 2 :] = values[0, 0]  # equals: the first counts
    most, places = sampling.argmax(values)
    columns = _columns(rows)
    noisy = sampling.gumbel_argmax(values, *columns)
    with torch_alone():
        expected = values.cpu().max(dim=1)
        drawn = sampling.gumbel_argmax(values.cpu(), *(column.cpu() for column in columns))
    assert torch.equal(most.cpu(), expected.values)
    assert torch.equal(values.gather(1, places.unsqueeze(1)).squeeze(1), most)
    assert not any((values[row, : places[row]] == most[row]).any() for row in range(rows))
    assert torch.equal(noisy[1].cpu(), drawn[1])
    close(noisy[0], drawn[0], slack=8.0)


@pytest.mark.parametrize("block", [64, 48])
def test_block_maxima(block: int) -> None:
    values = normal(3, VOCABULARY - 5)
    padded = torch.nn.functional.pad(values.cpu(), (0, -values.shape[1] % block), value=-torch.inf)
    assert torch.equal(sampling.block_maxima(values, block).cpu(), padded.view(3, -1, block).amax(dim=2))


def test_nan_is_the_largest() -> None:
    values = normal(2, VOCABULARY)
    values[1, 77] = torch.nan
    most, places = sampling.argmax(values)
    assert np.isnan(float(most[1]))
    assert int(places[1]) == 77
    assert bool(most[0].isfinite())
