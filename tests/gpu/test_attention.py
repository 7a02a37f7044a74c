"""Every attention backend that serves on the device against the definition of attention, and long rows against SDPA."""

from __future__ import annotations

import random

import pytest
import torch
from phalanx.kernels.attention import AttentionBackend, AttentionMetadata
from phalanx.kernels.backend_selector import choose_backend
from phalanx.kernels.reference import paged_attention
from phalanx.tests.gpu.place import DEVICE, ON_GPU, normal

BACKENDS = ("triton", "torch", "flash_attn_2", "flash_attn_3") if ON_GPU else ("triton", "torch")
KV_HEADS = 2
# (query heads of a KV head, elements of a head, dtype, block sizes beside the backend's own): few, each is compiled.
SHAPES = [
    (5, 128, torch.bfloat16, (16, 64, 256)),
    (1, 64, torch.bfloat16, ()),
    (7, 64, torch.float16, ()),
    (8, 80, torch.bfloat16, ()),
    (4, 128, torch.float32, ()),
]


def _backend(name: str, dtype: torch.dtype, head_dim: int, group: int, block_size: int | None) -> AttentionBackend:
    try:
        return choose_backend(name, device=DEVICE, dtype=dtype, head_dim=head_dim, block_size=block_size, group=group)
    except ValueError as reason:
        if not name.startswith("flash_attn"):  # a package that may not be installed; what is ours must serve
            raise
        pytest.skip(str(reason))


class _Rows:
    """Decodes and prompt chunks over pools that are NaN wherever nobody's keys and values are."""

    def __init__(
        self, queries: list[int], keys: list[int], group: int, head_dim: int, block_size: int, dtype: torch.dtype
    ) -> None:
        self.queries, self.keys = queries, keys
        used = [-(-count // block_size) for count in keys]
        generator = torch.Generator().manual_seed(sum(keys))
        order = iter((1 + torch.randperm(sum(used) + 3, generator=generator)).tolist())  # block 0 is nobody's
        table = torch.zeros(len(keys), max(used), dtype=torch.int64)
        self.k, self.v = (
            torch.full((sum(used) + 5, block_size, KV_HEADS, head_dim), torch.nan, dtype=dtype) for _ in "kv"
        )
        for row, count in enumerate(keys):
            table[row, : used[row]] = torch.tensor([next(order) for _ in range(used[row])])
            places = torch.arange(count)
            where = table[row, places // block_size], places % block_size
            for pool in (self.k, self.v):
                pool[where] = torch.randn(count, KV_HEADS, head_dim, generator=generator).to(dtype)
        self.table = table
        self.q = normal(sum(queries), KV_HEADS * group, head_dim, dtype=dtype, seed=2)

    def fill_gaps(self) -> None:
        """Zeros for NaN: others than Triton's kernels multiply what is past a row's end with a weight of zero."""
        self.k, self.v = self.k.nan_to_num(), self.v.nan_to_num()

    def attend(self, backend: AttentionBackend) -> torch.Tensor:
        metadata = AttentionMetadata(
            num_decodes=len([count for count in self.queries if count == 1]),
            slot_mapping=torch.zeros(len(self.q), dtype=torch.int64, device=DEVICE),
            block_table=self.table.to(DEVICE),
            cu_q=torch.tensor([0, *self.queries]).cumsum(0).to(DEVICE, torch.int32),
            seqused_k=torch.tensor(self.keys, dtype=torch.int32, device=DEVICE),
            query_lengths=tuple(self.queries),
            key_lengths=tuple(self.keys),
            block_size=self.k.shape[1],
        )
        return backend.attend(self.q, self.k.to(DEVICE), self.v.to(DEVICE), backend.plan(metadata)).cpu()


def _close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    exact = actual.dtype == torch.float32
    torch.testing.assert_close(actual.float(), expected, atol=2e-5 if exact else 2e-2, rtol=1e-5 if exact else 1e-2)


@pytest.mark.parametrize(("group", "head_dim", "dtype", "sizes"), SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_mix_of_decodes_and_chunks_is_attention(
    name: str, group: int, head_dim: int, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    rng = random.Random(group * head_dim)
    default = _backend(name, dtype, head_dim, group, None).default_block_size
    longest = 700 if ON_GPU else 70
    for block_size in (default, *(sizes if name == "triton" else ())):
        backend = _backend(name, dtype, head_dim, group, block_size)
        chunks = [rng.randrange(2, 40), rng.randrange(2, 9)]
        queries = [1, 1, 1, *chunks]
        keys = [1, rng.randrange(1, longest), longest, chunks[0], chunks[1] + rng.randrange(longest)]
        rows = _Rows(queries, keys, group, head_dim, block_size, dtype)
        if name != "triton":
            rows.fill_gaps()
        _close(rows.attend(backend), paged_attention(rows.q.cpu(), rows.k, rows.v, rows.table, queries, keys))


LONG = 8000 if ON_GPU else 300


@pytest.mark.parametrize("queries", [1, LONG // 5, LONG])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch"])
def test_long_rows_are_attention(name: str, queries: int) -> None:
    group, head_dim, keys = 5, 128, LONG
    backend = _backend(name, torch.bfloat16, head_dim, group, None)
    rows = _Rows([queries], [keys], group, head_dim, backend.default_block_size, torch.bfloat16)
    if name != "triton":
        rows.fill_gaps()
    places = torch.arange(keys)
    where = rows.table[0, places // rows.k.shape[1]], places % rows.k.shape[1]
    k, v = (pool[where].to(DEVICE).float().transpose(0, 1).unsqueeze(0) for pool in (rows.k, rows.v))
    mask = places.to(DEVICE) <= (places[keys - queries :, None]).to(DEVICE)
    q = rows.q.float().transpose(0, 1).unsqueeze(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    _close(rows.attend(backend), expected[0].transpose(0, 1).cpu())


def test_many_decodes_of_different_lengths_are_each_its_own() -> None:
    count, longest = (256, 3000) if ON_GPU else (6, 150)
    rng = random.Random(1)
    backend = _backend("triton", torch.bfloat16, 64, 5, None)
    keys = [rng.randrange(1, longest) for _ in range(count)]
    rows = _Rows([1] * count, keys, 5, 64, backend.default_block_size, torch.bfloat16)
    together = rows.attend(backend)
    for row in rng.sample(range(count), 5):
        alone = _Rows.__new__(_Rows)
        alone.__dict__.update(rows.__dict__)
        alone.queries, alone.keys, alone.table, alone.q = (
            [1],
            [keys[row]],
            rows.table[row : row + 1],
            rows.q[row : row + 1],
        )
        _close(together[row : row + 1], alone.attend(backend).float())
