"""The Triton kernels around attention, compiled for the GPUs that phalanx is written for, at real models' shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from phalanx.kernels.attention import HeadNorms
from phalanx.kernels.cuda.activation import silu_mul
from phalanx.kernels.cuda.norm import add_rms_norm, rms_norm
from phalanx.kernels.cuda.rope import rotate_and_store, store_kv
from phalanx.kernels.cuda.sampling import argmax, block_maxima, gumbel_argmax
from phalanx.tests.compile_triton import ARCHITECTURES, Compiled, compile_calls


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


FLOAT, INT = torch.float32, torch.int64
TOTAL, WEIGHT = _meta(4, 5120, dtype=FLOAT), _meta(5120, dtype=FLOAT)
LONG, LONG_WEIGHT = _meta(4, 16384, dtype=FLOAT), _meta(16384, dtype=FLOAT)
POOL, SLOTS, TABLE = _meta(64, 64, 8, 128), _meta(4, dtype=INT), _meta(4, 1, 128)
NORMS = HeadNorms(_meta(128, dtype=FLOAT), _meta(128, dtype=FLOAT), 1e-6)
NARROW = _meta(64, 64, 1, 80)
LOGITS, COLUMN = _meta(4, 152_064, dtype=FLOAT), _meta(4, 1, dtype=INT)

CASES = {
    "rms_norm": partial(rms_norm, TOTAL, WEIGHT, 1e-6, torch.bfloat16),
    "rms_norm of heads": partial(rms_norm, _meta(4, 56, 128)[:, :40], NORMS.query, 1e-6, torch.bfloat16),
    "add_rms_norm": partial(add_rms_norm, TOTAL, _meta(4, 5120), _meta(5120), WEIGHT, 1e-6, torch.bfloat16),
    "add_rms_norm, long": partial(add_rms_norm, LONG, LONG, None, LONG_WEIGHT, 1e-6, torch.float16),
    "silu_mul": partial(silu_mul, _meta(4, 2 * 27_648)),
    "store_kv": partial(store_kv, _meta(4, 8, 128), _meta(4, 8, 128), POOL, POOL, SLOTS),
    "rotate, QwQ-32B": partial(rotate_and_store, _meta(4, 56 * 128), TABLE, TABLE, None, POOL, POOL, SLOTS),
    "rotate, Qwen3": partial(rotate_and_store, _meta(4, 32 * 128), TABLE, TABLE, NORMS, POOL, POOL, SLOTS),
    "rotate, 80": partial(
        rotate_and_store, _meta(4, 7 * 80), TABLE[:, :, :80], TABLE[:, :, :80], None, NARROW, NARROW, SLOTS
    ),
    "argmax": partial(argmax, LOGITS),
    "gumbel_argmax": partial(gumbel_argmax, LOGITS, _meta(4, 1, dtype=FLOAT), COLUMN, COLUMN),
    "block_maxima": partial(block_maxima, LOGITS, 32),
}


def test_the_kernels_fit_every_architecture() -> None:
    compiled = compile_calls(CASES)
    assert [problem for kernel in compiled for problem in kernel.problems()] == []
    for arch in ARCHITECTURES:
        assert {kernel.case for kernel in compiled if kernel.arch == arch} == set(CASES)
    assert all(kernel.cubin and kernel.registers for kernel in compiled)


def test_what_does_not_compile_is_named() -> None:
    complex_rows = partial(rms_norm, _meta(4, 64, dtype=torch.complex64), WEIGHT, 1e-6, torch.bfloat16)
    with pytest.raises(RuntimeError) as raised:
        compile_calls({"nothing": partial(abs, 1), "a norm": CASES["rms_norm"], "no norm": complex_rows}, [90])
    assert "nothing for sm_90: it launches no kernel" in str(raised.value)
    assert "no norm for sm_90, by Triton " in str(raised.value)
    assert "a norm for sm_90" not in str(raised.value)


def test_an_architecture_that_the_compiler_does_not_know_is_named() -> None:
    with pytest.raises(
        RuntimeError, match=r"'sm_999a' is not a recognized processor(.|\n)*a norm for sm_999: not compiled"
    ):
        compile_calls({"a norm": CASES["rms_norm"]}, [999])


def test_what_a_kernel_has_too_much_of_is_told() -> None:
    assert Compiled("decode", "kernel", 90, 8, 227 * 1024, 255, 0, 1).problems() == []
    assert Compiled("decode", "kernel", 80, 16, 164 * 1024, 255, 8, 1).problems() == [
        "decode: kernel for sm_80: 167936 bytes of shared memory, of 166912",
        "decode: kernel for sm_80: 255 registers for each of 512 threads, of 65536",
        "decode: kernel for sm_80: 8 bytes a thread are spilled",
    ]
