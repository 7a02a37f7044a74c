"""bf16 multiplied as floats: on which processors, and how exactly."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from phalanx.kernels import cpu
from phalanx.tests.kernels.packing import pack

pytestmark = pytest.mark.skipif(cpu.native is None, reason="not built; see test_extensions.py")
BEST_FIRST = ("avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable")
HERE = [name for name in BEST_FIRST if cpu.native and cpu.native.can_run(name)]


@pytest.fixture
def chosen() -> Iterator[None]:
    before = cpu.native.kernels()
    yield
    cpu.native.use_kernels(before)


def test_a_processor_gets_the_kernels_that_are_best_on_it() -> None:
    path = Path("/proc/cpuinfo")
    lines = path.read_text() if path.exists() else ""
    facts = {
        name: re.search(rf"^{name}\s*: (.*)$", lines, re.MULTILINE) for name in ("vendor_id", "cpu family", "model")
    }
    vendor, family, model = (found and found[1] for found in facts.values())
    is_slow = (vendor, family) == ("GenuineIntel", "6") and model in {"143", "173", "174", "207"}
    best = next(name for name in HERE if not (is_slow and name == "avx512_bf16"))

    program = "from phalanx.kernels import cpu; print(cpu.native.kernels())"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == best


@pytest.mark.parametrize("name", [name for name in HERE if name not in {"avx512_amx", "avx512_bf16"}])
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_products_as_floats_are_exact(chosen: None, name: str, rows: int) -> None:
    cpu.native.use_kernels(name)
    x, weight = torch.zeros(rows, 64).bfloat16(), torch.zeros(32, 64).bfloat16()
    x[:, ::7] = 2.0**100
    weight[:, ::7] = 2.0**-130  # a denormal number, which vdpbf16ps takes for zero
    product = pack(weight, 32).linear_float(x)
    assert torch.equal(product, torch.full((rows, 32), 10 * 2.0**-30))
