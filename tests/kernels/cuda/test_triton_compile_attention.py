"""The Triton attention kernels, compiled for GPUs that are not here: do they fit?"""

from __future__ import annotations

import functools

import pytest
import torch
from phalanx.tests.compile_triton import REGISTERS, SHARED_LIMIT, Compiled, compile_calls

pytest.importorskip("triton")

from phalanx.kernels.cuda.decode import decode_attention
from phalanx.kernels.cuda.prefill import prefill_attention

# head_dim, group, block_size, dtype: QwQ's heads of 128 in groups of 5, Qwen2.5-0.5B's of 64 in groups of 7.
CASES = [
    (128, 5, 128, torch.bfloat16),
    (64, 7, 128, torch.bfloat16),
    (128, 5, 16, torch.bfloat16),
    (80, 1, 32, torch.float16),
    (256, 40, 64, torch.bfloat16),
    (128, 5, 64, torch.float32),
]
SMALL_SHARED = 99 * 1024
"""Bytes that a block may have on GPUs of sm_86, sm_89 and sm_120, which compile as sm_80 does."""
FEW_BYTES = 64
"""Spilled by prefill of heads of 128: sm_80 takes whole tiles to registers, sm_90 larger ones."""


def _calls(cases: list[tuple[int, int, int, torch.dtype]]) -> dict[str, functools.partial[None]]:
    calls = {}
    for head_dim, group, block_size, dtype in cases:
        q = torch.empty(4, 8 * group, head_dim, dtype=dtype, device="meta")
        pool = torch.empty(64, block_size, 8, head_dim, dtype=dtype, device="meta")
        table, lengths = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((4, 16), (4,)))
        name = f"{dtype} heads of {head_dim} in groups of {group}, blocks of {block_size}"
        decode = functools.partial(decode_attention, q, pool, pool, table, lengths, q, 4096, 2)
        prefill = functools.partial(prefill_attention, q, pool, pool, table, lengths, lengths, q, 4, False)
        calls |= {f"decode, {name}": decode, f"prefill, {name}": prefill}
    return calls


@pytest.mark.parametrize("cases", [CASES[:1], pytest.param(CASES[1:], marks=pytest.mark.slow)])
def test_the_kernels_fit_every_architecture(cases: list[tuple[int, int, int, torch.dtype]]) -> None:
    compiled = compile_calls(_calls(cases))
    assert {(kernel.kernel, kernel.arch) for kernel in compiled} == {
        (name, arch) for name in ("decode_kernel", "merge_kernel", "prefill_kernel") for arch in (80, 90, 100)
    }
    assert [problem for kernel in compiled if not _spills_little(kernel) for problem in kernel.problems()] == []
    assert [kernel for kernel in compiled if kernel.arch == 80 and kernel.shared > SMALL_SHARED] == []


@pytest.mark.parametrize("head_dim", [128, pytest.param(64, marks=pytest.mark.slow)])
def test_prefill_that_copies_whole_tiles_fits_the_architecture_that_does(head_dim: int) -> None:
    q = torch.empty(4, 40, head_dim, dtype=torch.bfloat16, device="meta")
    pool = torch.empty(64, 128, 8, head_dim, dtype=torch.bfloat16, device="meta")
    table, lengths = (torch.empty(size, dtype=torch.int32, device="meta") for size in ((4, 16), (4,)))
    call = functools.partial(prefill_attention, q, pool, pool, table, lengths, lengths, q, 4, True)
    [kernel] = compile_calls({f"prefill of heads of {head_dim}": call}, (90,))
    assert kernel.shared <= SHARED_LIMIT[90]
    assert kernel.spilled <= FEW_BYTES
    assert kernel.registers * kernel.num_warps * 32 <= REGISTERS


def _spills_little(kernel: Compiled) -> bool:
    return (kernel.kernel, kernel.arch) == ("prefill_kernel", 80) and kernel.spilled <= FEW_BYTES
