"""Ranks that are forked: from a process in which nothing runs yet, and as if each had been started by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from phalanx.launch.ranks import rank_process
from phalanx.launch.ranks.failure import failure_file
from phalanx.launch.ranks.rank_process import RankProcess, RankStarter, Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")

WAIT_S = 60

FORKABLE = """
import sys, threading
from phalanx.launch.ranks.fork import preload, why_not_forkable
preload()
print(why_not_forkable(), "phalanx.engine.engine" in sys.modules)
import torch
torch.cuda.is_initialized = lambda: True
print(why_not_forkable())
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(why_not_forkable())
"""

THREADED = """
import sys, threading
if any(part.endswith("ranks.fork") for part in sys.orig_argv):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
"""A sitecustomize.py by which a fork server has a thread."""

TITLED = """
import os
from phalanx.launch.ranks.fork import replace_in_arguments, replace_in_environment
replace_in_arguments("long", "name")
replace_in_environment({"A": "--", "B": "--"}, {"A": "7", "B": "13"})
print(open("/proc/self/cmdline").read().split("\\0")[-3:], open("/proc/self/environ").read().rstrip("\\0").split("\\0"))
"""


REFUSING = """
from phalanx.launch.ranks import fork
fork.preload = lambda: None
fork.why_not_forkable = lambda: "not here"
fork.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A group's folder whose ranks wait for their configuration until they are ended."""
    folder = tmp_path_factory.mktemp("group")
    os.mkfifo(folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def starter(folder: Path) -> Iterator[RankStarter]:
    with RankStarter(folder, 12) as starter:
        yield starter


def _server(rank: RankProcess) -> psutil.Process:
    parent = psutil.Process(rank.pid).parent()
    assert parent is not None
    return parent


def test_a_process_is_forked_only_while_it_has_one_thread_and_no_gpu() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FORKABLE], stdout=subprocess.PIPE, text=True, timeout=WAIT_S, check=True
    )
    ready, with_gpu, with_thread = ended.stdout.splitlines()
    assert ready == "None True"
    assert "CUDA" in with_gpu
    assert "2 threads" in with_thread


def test_a_forked_rank_looks_as_if_it_had_been_started_by_itself(starter: RankStarter, folder: Path) -> None:
    first, last = starter.start(0), starter.start(11)
    server = _server(first)
    assert _server(last) == server
    assert server.cmdline()[-2:] == ["phalanx.launch.ranks.fork", str(folder)]
    assert server.num_threads() == 1

    for rank, name in ((first, "0"), (last, "11")):
        process = psutil.Process(rank.pid)
        # It is told of as soon as it is forked, and then makes itself look so.
        deadline = time.monotonic() + WAIT_S
        while process.environ().get("RANK") != name or "phalanx.launch.ranks.rank" not in process.cmdline():
            assert time.monotonic() < deadline, (process.cmdline(), process.environ())
            time.sleep(0.01)
        environment = process.environ()
        assert process.cmdline()[-3:] == ["-m", "phalanx.launch.ranks.rank", str(folder)]
        assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == (name, name, "12")
        assert os.readlink(f"/proc/{rank.pid}/fd/0") == os.devnull
        assert rank.poll() is None
        rank.kill()
        assert rank.wait(WAIT_S) == -signal.SIGKILL


def test_signals_reach_a_forked_rank_and_its_end_is_told_as_it_was(starter: RankStarter) -> None:
    rank = starter.start(1)
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.01)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(WAIT_S) == -signal.SIGTERM
    rank.send_signal(signal.SIGTERM)  # to nobody: its number may be another process's by now
    assert rank.returncode == -signal.SIGTERM


def test_a_rank_is_started_again_by_the_same_fork_server(starter: RankStarter, tmp_path: Path) -> None:
    before = starter.start(3)
    server = _server(before)
    before.kill()
    before.wait(WAIT_S)
    after = starter.start(3)
    assert after.pid != before.pid
    assert _server(after) == server
    after.kill()
    after.wait(WAIT_S)


def test_ranks_end_with_a_fork_server_that_is_killed_and_another_takes_its_place(starter: RankStarter) -> None:
    ranks = [starter.start(rank) for rank in range(2)]
    server = _server(ranks[0])
    server.kill()
    assert [rank.wait(WAIT_S) for rank in ranks] == [-signal.SIGKILL] * 2
    assert not any(_runs(rank.pid) for rank in ranks)

    again = starter.start(0)
    assert _server(again) != server
    again.kill()
    again.wait(WAIT_S)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_what_ends_a_forked_rank_is_recorded_by_it(tmp_path: Path) -> None:
    with RankStarter(tmp_path, 2) as starter:
        rank = starter.start(0)
        assert rank.wait(WAIT_S) == 1
    assert b"FileNotFoundError" in failure_file(tmp_path, 0).read_bytes()


@pytest.mark.parametrize("fork", [pytest.param(True, marks=pytest.mark.slow), False])
def test_where_no_rank_can_be_forked_each_is_started_by_itself(
    folder: Path, tmp_path: Path, fork: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sitecustomize.py").write_text(THREADED)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with RankStarter(folder, 2, fork=fork) as starter:
        ranks = [starter.start(rank) for rank in range(2)]
        assert [_server(rank).pid for rank in ranks] == [os.getpid()] * 2
        for rank in ranks:
            rank.kill()
            assert rank.wait(WAIT_S) == -signal.SIGKILL
    assert len(caplog.records) == fork
    assert not fork or "2 threads" in caplog.text


@pytest.mark.parametrize("missing", ["os.pidfd_open", "signal.pidfd_send_signal"])
def test_a_rank_that_could_not_be_signalled_is_not_forked(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise PermissionError("by a sandbox")

    monkeypatch.setattr(missing, refuse)
    with RankStarter(folder, 2) as starter:
        rank = starter.start(0)
        assert _server(rank).pid == os.getpid()
        rank.kill()
        assert rank.wait(WAIT_S) == -signal.SIGKILL


def test_a_process_shows_other_arguments_and_variables_of_no_more_bytes() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TITLED, "long", "last"],
        env={**os.environ, "A": "--", "B": "--"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert ended.stdout.startswith("['name', 'last', ''] ")
    assert ended.stdout.rstrip().endswith("'A=7', 'B=13']")


@pytest.mark.parametrize("unread", [False, True])
def test_a_fork_server_whose_supervisor_has_gone_ends_quietly(tmp_path: Path, unread: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # With what it was asked for before: its answer finds nobody.
        for _ in range(2):
            ours.send(msgspec.json.encode(Start(0)))
        if unread:
            theirs.send(b"not read")
        ours.close()
        server = subprocess.run(
            [sys.executable, "-c", REFUSING, str(tmp_path)],
            stdin=theirs.fileno(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert (server.returncode, server.stdout, server.stderr) == (0, "", "")


def test_a_fork_server_that_is_stopped_holds_up_no_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RankStarter(folder, 2) as starter:
        first = starter.start(0)
        os.kill(_server(first).pid, signal.SIGSTOP)
        monkeypatch.setattr(rank_process, "START_S", 0.2)
        second = starter.start(1)  # by itself
        try:
            assert first.wait(WAIT_S) == -signal.SIGKILL  # nobody would hear of its end any more
            assert second.poll() is None
        finally:
            second.kill()
            second.wait(WAIT_S)
