"""What is left behind is seen whoever left it, and what others have at the time is not taken for it."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from phalanx.tests import left_behind
from phalanx.tests.left_behind import nothing_left_behind

HOLDER = """
import os, sys
file = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR) if len(sys.argv) > 1 else None
print("holds", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def _holder(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """A process that has a file open until the end of the block, in which it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


@pytest.fixture
def segment() -> Iterator[str]:
    """A path in /dev/shm, with a name as ours have."""
    path = Path(f"/dev/shm/phalanx-{secrets.token_hex(8)}")
    yield str(path)
    path.unlink(missing_ok=True)


def test_a_file_in_the_temporary_folder_is_left_behind_but_not_what_torchrun_keeps() -> None:
    with nothing_left_behind():
        Path(os.environ["TMPDIR"], "torchelastic_x").mkdir()
    with pytest.raises(AssertionError, match="phalanx-x"), nothing_left_behind():
        Path(os.environ["TMPDIR"], "phalanx-x").mkdir()


def test_a_process_is_left_behind_whoever_its_parent_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "END_S", 0.1)
    child = "[sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL"
    orphan = f"import subprocess, sys; print(subprocess.Popen({child}).pid)"
    with pytest.raises(AssertionError, match=r"time\.sleep"), nothing_left_behind():
        run = subprocess.run([sys.executable, "-c", orphan], stdout=subprocess.PIPE, text=True, check=True)
    os.kill(int(run.stdout), 9)


def test_memory_of_a_process_that_has_died_is_left_behind(segment: str) -> None:
    with pytest.raises(AssertionError, match=segment), nothing_left_behind(), _holder(segment):
        pass


def test_memory_of_this_process_is_left_behind_whatever_its_name_is(segment: str) -> None:
    path = Path(segment).with_name(f"other-{secrets.token_hex(8)}")
    try:
        with pytest.raises(AssertionError, match=path.name), nothing_left_behind() as traces, path.open("w"):
            # It counts although nobody has it open at the end.
            assert traces.shared_memory() == {path.name}
    finally:
        path.unlink()


def test_what_others_have_at_the_time_is_not_left_behind(segment: str) -> None:
    others = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    with contextlib.ExitStack() as stack, nothing_left_behind():
        # A server or a test run beside this one that starts within the block and outlives it.
        stack.enter_context(_holder(segment, environment=others))


def test_ports_of_the_runs_processes_are_told() -> None:
    listener = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); s.accept()"
    )
    with nothing_left_behind() as traces:
        with subprocess.Popen([sys.executable, "-c", listener], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            found = traces.listening()
            process.kill()
        assert found == {port}
        assert traces.listening() == set()
