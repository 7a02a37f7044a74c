"""The adapters of FlashAttention 3 and 2, against stand-ins as strict as the real functions, and by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from phalanx.kernels.attention import AttentionMetadata
from phalanx.kernels.cuda.attention import AttentionKernel, CudaAttention, Rows
from phalanx.kernels.cuda.flash import SPLIT_QUERIES, FlashAttention2, FlashAttention3
from phalanx.kernels.reference import paged_attention
from phalanx.tests.kernels.cuda import flash_attn_stubs as stubs

MULTIPROCESSORS = 132
INSTALL = {
    "flash_attn_interface": stubs.install_flash_attn_3,
    "fa3_fwd": stubs.install_fa3_fwd,
    "flash_attn": stubs.install_flash_attn_2,
}


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.remove_all(monkeypatch)


@pytest.fixture(params=INSTALL)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[AttentionKernel, stubs.Calls]:
    """Each package's adapter, and the calls that it makes."""
    calls = INSTALL[request.param](monkeypatch)
    kernel = FlashAttention2() if request.param == "flash_attn" else FlashAttention3(MULTIPROCESSORS)
    return kernel, calls


def _step(
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    *,
    block_size: int,
    kv_heads: int = 2,
    group: int = 5,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    spare_blocks: int = 0,
) -> tuple[torch.Tensor, list[torch.Tensor], AttentionMetadata]:
    """Queries, a pool and the metadata of decodes of so many keys, and of chunks (queries, keys before them)."""
    query_lengths = [1] * len(decode_keys) + [queries for queries, _ in chunks]
    key_lengths = decode_keys + [queries + before for queries, before in chunks]
    rows, width = len(key_lengths), max(-(-keys // block_size) for keys in key_lengths) + spare_blocks
    generator = torch.Generator().manual_seed(len(decode_keys))
    blocks = rows * width + 2
    # As the worker's queries are: a part of a projection's rows.
    heads = torch.randn(sum(query_lengths), kv_heads * (group + 2), head_dim, generator=generator).to(dtype)
    caches = [torch.randn(blocks, block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2)]
    metadata = AttentionMetadata(
        num_decodes=len(decode_keys),
        slot_mapping=torch.zeros(sum(query_lengths), dtype=torch.int64),
        block_table=torch.randperm(blocks, generator=generator)[: rows * width].view(rows, width),
        cu_q=torch.tensor([0, *query_lengths]).cumsum(0).to(torch.int32),
        seqused_k=torch.tensor(key_lengths, dtype=torch.int32),
        query_lengths=tuple(query_lengths),
        key_lengths=tuple(key_lengths),
        block_size=block_size,
    )
    return heads[:, : kv_heads * group], caches, metadata


def _check(backend: CudaAttention, step: tuple[torch.Tensor, list[torch.Tensor], AttentionMetadata]) -> None:
    q, caches, metadata = step
    out = backend.attend(q, *caches, backend.plan(metadata))
    table, queries, keys = metadata.block_table, list(metadata.query_lengths), list(metadata.key_lengths)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out, paged_attention(q, *caches, table, queries, keys).to(q.dtype))


@pytest.mark.parametrize(
    ("decode_keys", "chunks"),
    [
        ([1, 300, 255, 256, 257], []),
        ([], [(40, 0), (7, 290)]),
        ([5, 400], [(30, 0), (1, 12), (2, 255)]),
        ([9], [(1, 3), (1, 300)]),
        ([], [(300, 0)]),
    ],
    ids=["decodes", "prompts", "mixed", "chunks of one token", "a long prompt"],
)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 5), (1, 7), (3, 1), (1, 8)])
def test_a_step_of_decodes_and_chunks_is_computed(
    installed: tuple[AttentionKernel, stubs.Calls],
    decode_keys: list[int],
    chunks: list[tuple[int, int]],
    head_dim: int,
    kv_heads: int,
    group: int,
) -> None:
    kernel, calls = installed
    block_size = kernel.default_block_size
    step = _step(decode_keys, chunks, block_size=block_size, kv_heads=kv_heads, group=group, head_dim=head_dim)
    _check(CudaAttention(decode=kernel, prefill=kernel), step)
    assert len(calls.take()) == bool(decode_keys) + bool(chunks)


def test_float16_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    for install, make in ((stubs.install_flash_attn_3, _flash_attn_3), (stubs.install_flash_attn_2, FlashAttention2)):
        install(monkeypatch)
        _check(CudaAttention(decode=(kernel := make()), prefill=kernel), _mixed(kernel, dtype=torch.float16))


def _flash_attn_3() -> FlashAttention3:
    return FlashAttention3(MULTIPROCESSORS)


def _mixed(kernel: AttentionKernel, **changes: Any) -> tuple[torch.Tensor, list[torch.Tensor], AttentionMetadata]:
    return _step([5, 300], [(30, 0), (7, 250)], **{"block_size": kernel.default_block_size, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"head_dim": 264}, "at most 256"),
        ({"head_dim": 20}, "multiple of 8"),
    ],
)
def test_what_the_packages_refuse_is_refused(
    installed: tuple[AttentionKernel, stubs.Calls], changes: dict[str, Any], message: str
) -> None:
    kernel, _ = installed
    q, caches, metadata = _mixed(kernel, **changes)
    backend = CudaAttention(decode=kernel, prefill=kernel)
    with pytest.raises(RuntimeError, match=message):
        backend.attend(q, *caches, backend.plan(metadata))


@pytest.mark.parametrize(
    ("install", "make"), [(stubs.install_flash_attn_2, FlashAttention2), (stubs.install_fa3_fwd, _flash_attn_3)]
)
def test_pages_that_a_package_does_not_take_are_no_multiple_of_what_its_adapter_says(
    monkeypatch: pytest.MonkeyPatch, install: Callable[..., stubs.Calls], make: Callable[[], AttentionKernel]
) -> None:
    install(monkeypatch)
    kernel = make()
    backend = CudaAttention(decode=kernel, prefill=kernel)
    assert backend.block_multiple == backend.default_block_size == kernel.block_multiple
    _check(backend, _mixed(kernel, block_size=2 * kernel.block_multiple))
    q, caches, metadata = _mixed(kernel, block_size=kernel.block_multiple // 2)
    with pytest.raises(RuntimeError, match=r"divisible by 256|does not support paged KV"):
        backend.attend(q, *caches, backend.plan(metadata))


def test_a_decodes_call_depends_on_nothing_but_shapes(installed: tuple[AttentionKernel, stubs.Calls]) -> None:
    # What a CUDA graph records is replayed with other lengths and tables in the same tensors.
    kernel, calls = installed
    backend = CudaAttention(decode=kernel, prefill=kernel)
    for keys in ([3, 500, 1], [512, 2, 257]):
        _check(backend, _step(keys, [], block_size=256))
    first, second = (
        {name: tuple(value.shape) if isinstance(value, torch.Tensor) else value for name, value in call.items()}
        for call in calls.take()
    )
    assert first == second


def test_rows_with_a_table_wider_than_their_keys_are_computed(installed: tuple[AttentionKernel, stubs.Calls]) -> None:
    kernel, _ = installed
    _check(CudaAttention(decode=kernel, prefill=kernel), _mixed(kernel, spare_blocks=3))


def test_flash_attention_3_splits_keys_of_few_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for install, splits in ((stubs.install_flash_attn_3, 0), (stubs.install_fa3_fwd, MULTIPROCESSORS // 2)):
        stubs.remove_all(monkeypatch)
        calls = install(monkeypatch)
        kernel = _flash_attn_3()
        for queries, expected in ((SPLIT_QUERIES, splits), (SPLIT_QUERIES + 1, 1)):
            _check(CudaAttention(decode=kernel, prefill=kernel), _step([], [(queries, 0)], block_size=128, head_dim=8))
            assert [call["num_splits"] for call in calls.take()] == [expected]


def test_a_build_without_slow_loads_is_told_of_a_query_that_fills_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {}
    for install in (stubs.install_flash_attn_3, stubs.install_fa3_fwd):
        stubs.remove_all(monkeypatch)
        calls = install(monkeypatch)
        kernel = _flash_attn_3()
        _check(CudaAttention(decode=kernel, prefill=kernel), _step([5, 300], [(60, 0)], block_size=128))
        lengths[install] = [call["max_seqlen_q"] for call in calls.take()]
    assert lengths == {stubs.install_flash_attn_3: [1, 60], stubs.install_fa3_fwd: [39, 60]}


def test_flash_attention_2_sums_key_lengths_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stubs.install_flash_attn_2(monkeypatch)
    backend = CudaAttention(decode=(kernel := FlashAttention2()), prefill=kernel)
    sums = []
    for before in (10, 300):
        q, caches, metadata = _step([], [(3, before), (4, 0)], block_size=256)
        plan = backend.plan(metadata)
        layers = [backend.attend(q, *caches, plan) for _ in range(2)]
        assert torch.equal(*layers)
        first, second = (call["cu_seqlens_k"] for call in calls.take())
        assert first is second
        sums.append(first.tolist())
    assert sums == [[0, 13, 17], [0, 303, 307]]


def test_flash_attention_2_computes_rows_of_one_query_with_split_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stubs.install_flash_attn_2(monkeypatch)
    backend = CudaAttention(decode=(kernel := FlashAttention2()), prefill=kernel)
    _check(backend, _step([5, 300], [(1, 20), (1, 0)], block_size=256))
    assert [(call["function"], call["num_splits"]) for call in calls.take()] == [("kvcache", 0), ("kvcache", 0)]


def test_the_projects_own_build_of_flash_attention_3_comes_before_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, own = stubs.install_fa3_fwd(monkeypatch), stubs.install_flash_attn_3(monkeypatch)
    kernel = _flash_attn_3()
    _check(CudaAttention(decode=kernel, prefill=kernel), _mixed(kernel))
    assert (len(own), len(wheel)) == (2, 0)


def test_without_the_packages_the_import_error_names_them() -> None:
    with pytest.raises(ModuleNotFoundError, match="flash_attn_interface"):
        _flash_attn_3()
    with pytest.raises(ModuleNotFoundError, match="flash_attn"):
        FlashAttention2()


def test_rows_are_written_where_the_caller_said(installed: tuple[AttentionKernel, stubs.Calls]) -> None:
    kernel, _ = installed
    q, caches, metadata = _step([300, 4], [], block_size=256)
    rows = Rows(metadata.block_table.int(), metadata.cu_q, metadata.seqused_k, max_q=1, max_k=512)
    whole = torch.full((4, *q.shape[1:]), 7.0, dtype=q.dtype)
    kernel(q, *caches, rows, whole[1:3])
    expected = paged_attention(q, *caches, metadata.block_table, [1, 1], [300, 4]).to(q.dtype)
    torch.testing.assert_close(whole[1:3], expected)
    assert (whole[[0, 3]] == 7.0).all()
