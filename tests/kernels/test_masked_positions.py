"""What a query may not see changes no bit of its attention, were it infinite or NaN; what it sees reaches it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from phalanx.kernels import cpu, cuda
from phalanx.kernels.attention import AttentionBackend, AttentionMetadata, TorchAttention
from phalanx.kernels.cpu.attention import CpuAttention
from phalanx.kernels.cuda.attention import CudaAttention, TritonDecode, TritonPrefill

INSTRUCTION_SETS = [
    name
    for name in ("avx512_amx", "emulated_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
    if cpu.native and cpu.native.can_run(name)
]
KV_HEADS, BLOCK_SIZE = 2, 16


@pytest.fixture(params=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = cpu.native.kernels()
    cpu.native.use_kernels(request.param)
    yield request.param
    cpu.native.use_kernels(chosen)


@pytest.fixture
def triton() -> Iterator[CudaAttention]:
    """The Triton kernels, run by Triton's interpreter."""
    pytest.importorskip("triton")
    cuda.interpret(True)
    yield CudaAttention(TritonDecode(), TritonPrefill())
    cuda.interpret(False)


class _Prompt:
    """One sequence, of which some keys and values are not finite: those of `poisoned`, (token, value) each."""

    def __init__(
        self, tokens: int, group: int, head_dim: int, dtype: torch.dtype, block_size: int = BLOCK_SIZE
    ) -> None:
        self.block_size = block_size
        generator = torch.Generator().manual_seed(0)
        self.q = torch.randn(tokens, KV_HEADS * group, head_dim, generator=generator).to(dtype)
        self.k, self.v = (torch.randn(tokens, KV_HEADS, head_dim, generator=generator).to(dtype) for _ in range(2))

    def attend(
        self, backend: AttentionBackend, first: int, last: int, poisoned: list[tuple[int, float]], what: str = "v"
    ) -> torch.Tensor:
        """Queries `first` to `last` - 1 over a cache that has all tokens, (last - first, heads, head_dim)."""
        tokens, _, head_dim = self.k.shape
        k, v = self.k.clone(), self.v.clone()
        for token, value in poisoned:
            (k if what == "k" else v)[token, :, 3 : 3 + token % 5 + 1] = value  # of some dimensions

        blocks = -(-tokens // self.block_size)
        width, kept_as = backend.cache_head(head_dim, self.k.dtype)
        caches = [torch.zeros(blocks, self.block_size, KV_HEADS, width, dtype=kept_as) for _ in range(2)]
        backend.store_kv(k, v, *caches, torch.arange(tokens))
        metadata = AttentionMetadata(
            num_decodes=int(last - first == 1),
            slot_mapping=torch.arange(first, last),
            block_table=torch.arange(blocks).unsqueeze(0),
            cu_q=torch.tensor([0, last - first], dtype=torch.int32),
            seqused_k=torch.tensor([last], dtype=torch.int32),
            query_lengths=(last - first,),
            key_lengths=(last,),
            block_size=self.block_size,
        )
        return backend.attend(self.q[first:last], *caches, backend.plan(metadata))


def _check(
    backend: AttentionBackend, prompt: _Prompt, first: int, last: int, poisoned: list[tuple[int, float]], what: str
) -> None:
    """A row has the bits of a run in which what comes after it is finite; a row that sees poison is not finite."""
    whole = prompt.attend(backend, first, last, poisoned, what)
    ends = [first, *(min(last, max(first, token)) for token, _ in poisoned), last]
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        without = prompt.attend(backend, first, last, poisoned[:i], what)
        rows = slice(start - first, end - first)
        same = torch.isclose(whole[rows].float(), without[rows].float(), rtol=0, atol=0, equal_nan=True)
        assert same.all(), (what, poisoned, start, end)
        if i == 0:
            assert whole[rows].isfinite().all()
        elif what == "v" or all(math.isnan(value) for _, value in poisoned[:i]):  # a score of -inf is a weight of 0
            assert not whole[rows].isfinite().flatten(1).all(dim=1).any(), (what, poisoned, start, end)


POISON = [
    [(0, torch.inf)],
    [(37, torch.inf)],
    [(38, -torch.inf), (39, torch.nan)],
    [(21, torch.nan), (22, torch.inf), (60, -torch.inf), (69, torch.nan)],
]


@pytest.mark.parametrize("what", ["v", "k"])
@pytest.mark.parametrize(
    ("group", "head_dim", "dtype", "int8_cache"),
    [
        (1, 64, torch.bfloat16, False),
        (3, 80, torch.bfloat16, False),
        (7, 16, torch.bfloat16, False),
        (3, 256, torch.bfloat16, False),
        (1, 48, torch.float32, False),
        (5, 64, torch.float32, False),
        (3, 64, torch.bfloat16, True),
        (2, 80, torch.float32, True),
    ],
)
def test_what_a_token_may_not_see_changes_none_of_its_bits(
    instructions: str, group: int, head_dim: int, dtype: torch.dtype, int8_cache: bool, what: str
) -> None:
    backend = CpuAttention(int8_cache)
    prompt = _Prompt(70, group, head_dim, dtype)
    for poisoned in POISON:
        _check(backend, prompt, 0, 70, poisoned, what)
        _check(backend, prompt, 30, 67, poisoned, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("first", "last"), [(1090, 1110), (1020, 1029), (200, 300), (1279, 1281)])
def test_nor_where_the_keys_are_cut_into_splits_and_tiles(
    instructions: str, first: int, last: int, dtype: torch.dtype
) -> None:
    prompt = _Prompt(last + 3, 3, 64, dtype)
    middle = (first + last) // 2
    _check(CpuAttention(), prompt, first, last, [(middle, torch.inf), (last - 1, torch.nan)], "v")
    _check(CpuAttention(), prompt, first, last, [(middle, torch.nan)], "k")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nor_what_stands_beside_a_decodes_last_value(instructions: str, dtype: torch.dtype) -> None:
    prompt = _Prompt(50, 3, 64, dtype)  # two bfloat16 of neighbouring tokens are one word of the cache
    for position in (32, 33, 46):
        _check(CpuAttention(), prompt, position, position + 1, [(position + 1, torch.inf)], "v")


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("tokens", [20, 1500])
def test_what_is_seen_and_not_a_number_reaches_the_result(instructions: str, tokens: int, int8_cache: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        prompt, backend = _Prompt(tokens, 3, 64, dtype), CpuAttention(int8_cache)
        assert prompt.attend(backend, tokens - 1, tokens, [(7, torch.nan)], "k").isnan().all()
        prompt.q[-1] = torch.nan
        assert prompt.attend(backend, tokens - 1, tokens, []).isnan().all()


@pytest.mark.parametrize("what", ["v", "k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_attention_keeps_to_it_too(dtype: torch.dtype, what: str) -> None:
    prompt = _Prompt(70, 3, 64, dtype)
    for poisoned in POISON:
        for first, last in ((0, 70), (30, 67), (33, 34)):
            _check(TorchAttention(), prompt, first, last, poisoned, what)


@pytest.mark.parametrize("what", ["v", "k"])
def test_tritons_prefill_and_decode_keep_to_it_too(triton: CudaAttention, what: str) -> None:
    prompt = _Prompt(24, 1, 32, torch.float32)
    _check(triton, prompt, 0, 24, [(9, torch.inf), (17, torch.nan)], what)
    _check(triton, prompt, 16, 17, [(17, torch.inf)], what)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["v", "k"])
@pytest.mark.parametrize(("group", "head_dim", "dtype"), [(3, 80, torch.float16), (2, 64, torch.bfloat16)])
def test_so_they_do_over_several_tiles_of_any_kind(
    triton: CudaAttention, group: int, head_dim: int, dtype: torch.dtype, what: str
) -> None:
    prompt = _Prompt(70, group, head_dim, dtype)
    _check(triton, prompt, 0, 70, POISON[-1], what)
    _check(triton, prompt, 30, 67, POISON[-2], what)
    _check(triton, prompt, 33, 34, [(34, torch.nan)], what)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["v", "k"])
def test_so_they_do_where_a_whole_tile_is_copied_at_once(
    triton: CudaAttention, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phalanx.kernels.cuda.prefill.gains_by_tma", lambda device: True)
    prompt = _Prompt(150, 2, 64, torch.bfloat16, block_size=128)
    _check(triton, prompt, 120, 150, [(125, torch.inf), (140, torch.nan)], what)
