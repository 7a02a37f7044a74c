"""Who listens, and what is unpickled, in every process of every way to start an engine: nothing of ours, nowhere.

What torchrun itself opens, and what a caller's own process group opens, is theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import phalanx
import psutil
import pytest
import torch
from phalanx import LLM, AsyncLLM, SamplingParams
from phalanx.tests.launch.programs import TORCHRUN

RECORDER = """
import os, pickle, sys, _pickle
_loads, _load, _Unpickler = _pickle.loads, _pickle.load, _pickle.Unpickler
def _record():
    import traceback
    with open(os.environ["UNPICKLED"], "a") as file:
        file.write("".join(traceback.format_stack()) + "\\x00")
class Unpickler(_Unpickler):
    def load(self):
        _record()
        return super().load()
def loads(data, **options):
    _record()
    return _loads(data, **options)
def load(file, **options):
    _record()
    return _load(file, **options)
class PurePython(pickle._Unpickler):
    def load(self):
        _record()
        return super().load()
for module in (pickle, _pickle):
    module.Unpickler, module.loads, module.load = Unpickler, loads, load
pickle._Unpickler = PurePython
sys.addaudithook(lambda event, _arguments: _record() if event == "pickle.find_class" else None)
"""
"""A sitecustomize.py that notes every unpickling of a Python process: torch.load, multiprocessing and the collectives
of objects all come by here."""
SAMPLING = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
TIMEOUT_S = 120.0


class Recorded:
    """What the processes that were started since have unpickled."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def stacks(self) -> list[str]:
        return self._notes.read_text().split("\x00")[:-1] if self._notes.exists() else []

    def ours(self) -> list[str]:
        """Those that code of the package has brought about."""
        return [stack for stack in self.stacks() if any(map(_is_ours, re.findall('File "([^"]+)"', stack)))]


def _is_ours(file: str) -> bool:
    """Whether a file is the package's, and not of an environment that lies in its folder."""
    package = Path(phalanx.__file__).parent
    path = Path(file)  # "<string>" is none
    return path.is_relative_to(package) and "site-packages" not in path.relative_to(package).parts


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("UNPICKLED", str(tmp_path / "unpickled"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return Recorded(tmp_path / "unpickled")


def listening(pid: int | None = None) -> set[tuple[int, str, int]]:
    """(process, address, port) of all sockets by which a process tree waits for TCP or UDP from anybody."""
    root = psutil.Process(pid)
    found = set()
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                # A UDP socket with a peer, as one that asks for a host's name, hears nobody else.
                waits = connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and not connection.raddr
                if waits and connection.laddr:
                    found.add((process.pid, connection.laddr.ip, connection.laddr.port))
    return found


@contextlib.contextmanager
def _program(source: str, *arguments: str, launcher: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A program that prints "ready" and reads a line before it goes on."""
    file = Path(os.environ["UNPICKLED"]).with_name("program.py")
    file.write_text(textwrap.dedent(source))
    process = subprocess.Popen(
        [sys.executable, *launcher, str(file), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_llm_listens_nowhere_and_unpickles_nothing(tiny: Path, recorded: Recorded, ranks: int) -> None:
    program = """
        import sys
        from phalanx import LLM, SamplingParams
        if __name__ == "__main__":
            with LLM(sys.argv[1], ranks=int(sys.argv[2]), dtype="float32", max_model_len=256) as llm:
                llm.generate(["any"], SamplingParams(max_tokens=3, ignore_eos=True))
                llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=3))
                print("ready", flush=True)
                sys.stdin.readline()
    """
    with _program(program, str(tiny), str(ranks)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(psutil.Process(process.pid).children(recursive=True)) >= (ranks if ranks > 1 else 0)
        assert listening(process.pid) == set()
        process.communicate("\n", TIMEOUT_S)
    assert recorded.stacks() == []


@pytest.mark.slow
def test_an_async_llm_listens_nowhere_and_unpickles_nothing(tiny: Path, recorded: Recorded) -> None:
    before = listening()

    async def answer() -> int:
        llm = AsyncLLM(str(tiny), ranks=2, dtype="float32", max_model_len=256)
        try:
            count = 0
            async for event in llm.stream("any", sampling=SAMPLING):
                count += len(getattr(event, "token_ids", ()))
            assert listening() == before
            return count
        finally:
            await llm.close()

    assert asyncio.run(answer()) == 3
    assert recorded.stacks() == []


def _use_and_end(address: str, worker: subprocess.Popen[bytes]) -> int:
    """How many tokens a worker answers with; it is ended then."""
    try:
        with LLM.connect(address, timeout_s=TIMEOUT_S) as llm:
            return len(llm.generate(["any"], SAMPLING)[0].outputs[0].token_ids)
    finally:
        worker.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN])
@pytest.mark.parametrize("program", ["generate", "chat", "worker"])
def test_a_program_listens_nowhere_beside_torchrun(
    tiny: Path, recorded: Recorded, tmp_path: Path, program: str, launcher: tuple[str, ...]
) -> None:
    if program == "worker" and not launcher:
        pytest.skip("a worker is torchrun's")
    requests = tmp_path / "requests.jsonl"
    requests.write_text("".join(f'{{"id": {i}, "prompt": "any"}}\n' for i in range(40)))
    address = f"ipc://{tmp_path / 'engine'}"
    settings = {
        "generate": [f"input={requests}", f"output={tmp_path / 'out.jsonl'}", "sampling.max_tokens=200"],
        "chat": ["sampling.max_tokens=200"],
        "worker": [f"address={address}"],
    }[program]
    command = [sys.executable, *launcher, "-m", f"phalanx.launch.{program}", f"model={tiny}", "ranks=2",
               "max_model_len=256", "dtype=float32", *settings]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    seen = set()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        if program == "chat":
            process.stdin.write(b"hello\n")
            process.stdin.close()  # it ends with the answer
        # From its first process to its last, every 50 ms.
        with ThreadPoolExecutor(1) as thread:
            used = thread.submit(_use_and_end, address, process) if program == "worker" else None
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen |= listening(process.pid)
                time.sleep(0.05)
            assert process.poll() is not None, "it has not ended"
        assert used is None or used.result() == 3
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)
    torchruns = {entry for entry in seen if launcher and entry[0] == process.pid}
    assert seen - torchruns == set()
    assert recorded.ours() == []
    assert launcher or recorded.stacks() == []


@pytest.mark.slow
def test_an_engine_in_a_group_opens_nothing_beyond_the_callers_group(tiny: Path, recorded: Recorded) -> None:
    program = """
        import os, sys
        import torch.distributed as dist
        from phalanx import LLM, SamplingParams
        from phalanx.tests.launch.ranks.test_open_doors import listening
        dist.init_process_group("gloo")
        before = listening()
        llm = LLM.in_group(dist.group.WORLD, sys.argv[1], dtype="float32", max_model_len=256)
        llm.generate([[5, 6]], SamplingParams(max_tokens=3))
        opened = listening() - before
        assert not opened, opened
        llm.close()
        dist.destroy_process_group()
    """
    with _program(program, str(tiny), launcher=TORCHRUN):
        pass
    assert recorded.ours() == []


def test_the_recorder_of_unpickling_sees_each_way(recorded: Recorded, tmp_path: Path) -> None:
    code = (
        "import io, pickle, _pickle, datetime\nfrom _pickle import loads\n"
        "data = pickle.dumps(1)\n"
        "pickle.loads(data), loads(data), pickle.load(io.BytesIO(data)), pickle.Unpickler(io.BytesIO(data)).load()\n"
        "pickle._Unpickler(io.BytesIO(data)).load(), _pickle.Unpickler(io.BytesIO(data)).load()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(recorded.stacks()) == 6
    assert recorded.ours() == []


def test_unpickling_that_the_package_brings_about_is_told_from_others(recorded: Recorded, tmp_path: Path) -> None:
    code = "import pickle, sys\nexec(compile('pickle.loads(pickle.dumps(1))', sys.argv[1], 'exec'))"
    for file in (phalanx.__file__, torch.__file__, tmp_path / "phalanx" / "program.py"):
        subprocess.run([sys.executable, "-c", code, str(file)], check=True)
    assert len(recorded.stacks()) == 3
    assert len(recorded.ours()) == 1
