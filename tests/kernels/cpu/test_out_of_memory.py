"""A thread of the kernels' pool that gets no memory: an error that the caller raises, not the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from phalanx.kernels import cpu

IN_USE = """
import resource

before = resource.getrlimit(resource.RLIMIT_AS)

def allow(more):
    in_use = 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (in_use + more, before[1]))
"""

PROGRAM = """
import torch
from phalanx.kernels import cpu
from phalanx.kernels.attention import AttentionMetadata
from phalanx.kernels.cpu.attention import CpuAttention

# A KV head of a token is a task, and so many query heads of one are some 40 MB of scratch memory for the thread.
ROWS, KV_HEADS, GROUP, HEAD_DIM = 3, 2, 80_000, 64
cpu.set_threads(2)
cpu.native.use_kernels({kernels!r})
backend = CpuAttention()
q = torch.randn(ROWS, KV_HEADS * GROUP, HEAD_DIM).bfloat16()
caches = [torch.zeros(ROWS, 16, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)]
heads = torch.randn(ROWS, KV_HEADS, HEAD_DIM).bfloat16()
slots = 16 * torch.arange(ROWS)
backend.store_kv(heads, heads, *caches, slots)
metadata = AttentionMetadata(
    ROWS, slots, torch.arange(ROWS)[:, None], torch.arange(ROWS + 1, dtype=torch.int32),
    torch.ones(ROWS, dtype=torch.int32), (1,) * ROWS, (1,) * ROWS, 16)
backend.attend(q[:, :8], *caches, backend.plan(metadata))  # starts the pool's thread
plan = backend.plan(metadata)

allow(q.nbytes + (8 << 20))  # the result, and a little
messages = set()
for _ in range(30):
    try:
        backend.attend(q, *caches, plan)
    except MemoryError as error:
        messages.add(str(error))
resource.setrlimit(resource.RLIMIT_AS, before)

# Each query sees one key: the result is its value, once there is memory again.
assert torch.equal(backend.attend(q, *caches, plan), heads.repeat_interleave(GROUP, dim=1))
print(*messages, sep="\\n")
"""

NO_THREADS = """
import torch
from phalanx.kernels import cpu
from phalanx.tests.kernels.packing import pack

cpu.set_threads(1)  # packing starts none
weight, x = pack(torch.ones(512, 64), 512), torch.ones(4, 64)
cpu.set_threads(2)
allow(1 << 20)  # less than a thread's stack
try:
    weight.linear(x, None)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, before)
assert weight.linear(x, None).sum() == 4 * 512 * 64
"""


def _run(program: str) -> list[str]:
    """The lines that a process of its own prints.

    All its threads allocate from one heap: glibc reserves 64 MiB of addresses more for a thread that allocates beside
    another, at any time, and under a limit of addresses the caller's own memory would be what is refused.
    """
    command = [sys.executable, "-c", IN_USE + program]
    one_heap = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=one_heap)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.skipif(cpu.native is None, reason="phalanx is built without its kernels for CPUs")
@pytest.mark.parametrize(
    "kernels", [name for name in ("avx512_amx", "avx2", "portable") if cpu.native and cpu.native.can_run(name)]
)
def test_memory_that_a_thread_of_the_pool_does_not_get_is_the_callers_error(kernels: str) -> None:
    [message] = _run(PROGRAM.format(kernels=kernels))
    assert message.startswith("the CPU kernels cannot allocate ")
    assert "bytes of scratch memory for attention's scores and sums: free memory on this host, or set" in message


@pytest.mark.skipif(cpu.native is None, reason="phalanx is built without its kernels for CPUs")
def test_a_thread_that_the_system_does_not_start_is_an_error_that_says_so() -> None:
    [message] = _run(NO_THREADS)
    assert message.startswith("the system does not start thread 1 of 2 of the CPU kernels (")
