"""Compile Triton kernels for GPUs that are not here, and say what they need.

Host functions are called as they would be on a GPU, with tensors of torch's "meta" device, which have shapes and no
memory. What they launch is compiled with the very specialisation and options that the launch has, and not run. Meta
tensors count as aligned to 16 bytes, as fresh tensors on a GPU are.

All of it happens in a process of its own: this one may have imported Triton for its interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities)."""
REGISTERS = 65536
"""Registers of a multiprocessor, and so the most that a block may have."""
WORKERS = 2
TIMEOUT_S = 600
Job = tuple[str, Callable[[], Any], int]  # name, call, architecture


@dataclass(frozen=True)
class Compiled:
    """A kernel's needs on one architecture (80 for sm_80, and so on)."""

    case: str
    kernel: str
    arch: int
    num_warps: int
    shared: int  # bytes a block
    registers: int  # of 32 bits, a thread
    spilled: int  # bytes a thread that did not fit its registers
    cubin: int  # bytes of the binary

    def problems(self) -> list[str]:
        """What keeps it from running well, in words."""
        found = []
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, of {SHARED_LIMIT[self.arch]}")
        if self.registers * self.num_warps * 32 > REGISTERS:
            found.append(f"{self.registers} registers for each of {self.num_warps * 32} threads, of {REGISTERS}")
        if self.spilled:
            found.append(f"{self.spilled} bytes a thread are spilled")
        return [f"{self.case}: {self.kernel} for sm_{self.arch}: {problem}" for problem in found]


def compile_calls(
    cases: Mapping[str, Callable[[], Any]], architectures: Sequence[int] = ARCHITECTURES
) -> list[Compiled]:
    """Compile every kernel that the named calls launch, for each architecture.

    A call is what pickle can carry: a functools.partial of a module's function and its arguments, meta tensors among
    them, which must launch on such a device too. A kernel that two calls launch in the same way may be listed once.
    Raises RuntimeError if something does not compile, and says what, for which architecture and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        # Triton keeps what it compiled, and leaves what does not compile among the temporary files.
        environment.update(TRITON_CACHE_DIR=folder, TMPDIR=folder, OMP_NUM_THREADS="1")
        ran = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import _main; _main()"],
            input=pickle.dumps((dict(cases), tuple(architectures))),
            capture_output=True,
            env=environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    if ran.returncode:
        raise RuntimeError(ran.stderr.decode(errors="replace"))
    return pickle.loads(ran.stdout)  # type: ignore[no-any-return]


def _main() -> None:
    cases, architectures = pickle.load(sys.stdin.buffer)
    jobs = [(name, call, arch) for name, call in cases.items() for arch in architectures]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        results = [_result(job, future) for job, future in [(job, pool.submit(_compile, job)) for job in jobs]]
    failed = [result for result in results if isinstance(result, str)]
    if failed:
        sys.exit("\n".join(failed))
    sys.stdout.buffer.write(pickle.dumps([kernel for kernels in results for kernel in kernels]))


def _result(job: Job, future: Future[list[Compiled] | str]) -> list[Compiled] | str:
    try:
        return future.result()
    except BrokenProcessPool:
        return f"{job[0]} for sm_{job[2]}: not compiled, as the compiler crashed, here or at another"


def _compile(job: Job) -> list[Compiled] | str:
    """The kernels of one case, or what is wrong with it."""
    import triton

    case, call, arch = job
    launched = _use_architecture(arch)
    launched.clear()
    try:
        call()
    except Exception:
        return f"{case} for sm_{arch}, by Triton {triton.__version__}: {traceback.format_exc()}"
    if not launched:
        return f"{case} for sm_{arch}: it launches no kernel on tensors of the meta device"
    return [_describe(case, arch, kernel, log) for kernel, log in launched if log]


def _describe(case: str, arch: int, kernel: Any, log: str) -> Compiled:
    """From what ptxas -v prints of a kernel."""
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None or not spilled:
        raise RuntimeError(f"{case} for sm_{arch}: ptxas does not say what the kernel needs: {log}")
    return Compiled(
        case,
        kernel.metadata.name,
        arch,
        kernel.metadata.num_warps,
        kernel.metadata.shared,
        int(registers.group(1)),
        max(map(int, spilled)),
        len(kernel.asm["cubin"]),
    )


class _Driver:
    """What Triton asks its driver for until a kernel is compiled: a device for each architecture, of its number."""

    def __init__(self) -> None:
        self.arch = 0

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def _use_architecture(arch: int) -> list[tuple[Any, str]]:
    """Let launches compile for `arch`. Returns where kernels will be and what ptxas said, if it was asked."""
    driver, launched = _instead_of_launching()
    driver.arch = arch
    return launched


@functools.cache
def _instead_of_launching() -> tuple[_Driver, list[tuple[Any, str]]]:
    import triton

    driver, launched = _Driver(), []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((kernel, log.getvalue()))

    triton.JITFunction.run = compile_only
    triton.runtime.driver.set_active(driver)
    triton.knobs.nvidia.dump_ptxas_log = True
    return driver, launched
