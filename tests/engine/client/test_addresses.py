"""Where the sockets of an engine and its clients are, and what is said of an address that is none."""

from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
import torch
from phalanx import LLM, ConfigError, EngineConfig, Timeout
from phalanx.engine.client import group_process
from phalanx.engine.protocol.transport import SOCKET_PATH_BYTES, ZmqConnection


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is shorter than pytest's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("length", [SOCKET_PATH_BYTES - 24, SOCKET_PATH_BYTES - 23, 200])
def test_a_groups_folder_has_room_for_its_socket_whatever_tmpdir_is(
    short: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    home = short / ("t" * (length - len(str(short)) - 1))
    home.mkdir()
    other = short / "o"
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(group_process, "SHORT_TMPDIR", str(other))
    folder = group_process._private_folder()
    assert folder.parent == (home if len(f"{home}/phalanx-12345678/engine") <= SOCKET_PATH_BYTES else other)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_tmpdir_that_no_address_can_hold_is_passed_over(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, other = Path(os.fsdecode(os.fsencode(short) + b"/\xff")), short / "other"
    home.mkdir()
    other.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(group_process, "SHORT_TMPDIR", str(other))
    assert group_process._private_folder().parent == other


def test_a_folder_goes_although_a_rank_writes_into_it_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    remove, removals = shutil.rmtree, []

    def rmtree(path: Path, **options: Any) -> None:
        remove(path, **options)
        removals.append(path)
        if len(removals) < 3:
            path.mkdir()
            (path / "store").touch()

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    group_process._remove(folder)
    assert not folder.exists()
    assert len(removals) == 3


def test_without_any_folder_for_its_socket_the_setting_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("t" * 200)))
    monkeypatch.setattr(group_process, "SHORT_TMPDIR", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match=r"absent: No such file.*set TMPDIR to a folder that"):
        group_process._private_folder()


@pytest.mark.parametrize("address", [f"ipc:///tmp/{'x' * 200}", "ipc://"])
def test_an_address_that_no_socket_can_have_is_refused_and_leaves_no_thread(address: str) -> None:
    before = set(threading.enumerate())  # some of other tests', which may end meanwhile
    with pytest.raises(ConfigError, match=r"address='ipc://.*cannot be used: .*ipc://PATH with a path of at most 107"):
        ZmqConnection(address)
    with pytest.raises(ConfigError, match="cannot be used"):
        LLM.connect(address, timeout_s=1)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("address", ["tcp://host", "tcp://host:port", "ipc:///tmp/a\0b"])
def test_an_address_without_a_port_or_with_a_byte_that_no_path_has_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"address='(tcp|ipc)://.*must be .*tcp://HOST:PORT"):
        ZmqConnection(address, b"a secret of some length")


def _raise(error: Exception) -> NoReturn:
    raise error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("subprocess.Popen", OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "may start processes"),
        ("Path.write_bytes", FULL, "No space left.*TMPDIR sets another"),
        ("tempfile.gettempdir", FULL, "No space left.*set TMPDIR"),
        ("tempfile.mkdtemp", FULL, "No space left.*set TMPDIR"),
        ("ZmqConnection", ConfigError("no descriptor is left"), "no descriptor is left"),
    ],
)
def test_a_group_that_cannot_be_started_says_why_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, short: Path, part: str, error: Exception, words: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    children = set(psutil.Process().children(recursive=True))
    with monkeypatch.context() as patched:
        patched.setattr(f"phalanx.engine.client.group_process.{part}", lambda *_, **__: _raise(error))
        with pytest.raises(ConfigError, match=words):
            group_process.GroupProcess(EngineConfig(model=str(tiny), ranks=2))
    assert list(short.iterdir()) == []
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize("address", [None, 5, b"ipc:///tmp/x", Path("/tmp/x"), ["ipc:///tmp/x"]])
def test_what_is_no_text_is_no_address(address: Any) -> None:
    with pytest.raises(ConfigError, match=r"address=.* must be ipc://PATH or tcp://HOST:PORT"):
        LLM.connect(address, timeout_s=0.1)


@pytest.mark.parametrize("name", ["timeout_s", "restart_wait_s"])
@pytest.mark.parametrize("value", [-1, math.nan, "5", True, b"5", [5], object()])
def test_a_time_to_wait_is_a_number_of_seconds(short: Path, name: str, value: Any) -> None:
    before = set(threading.enumerate())  # some of other tests', which may end meanwhile
    with pytest.raises(ConfigError, match=rf"{name}=.* must be a number of seconds of at least 0"):
        LLM.connect(f"ipc://{short}/nobody", **{"timeout_s": 0.1, name: value})
    assert set(threading.enumerate()) <= before


def test_times_are_those_of_any_library(short: Path) -> None:
    for value in (0, Decimal("0.01"), np.float32(0.01), torch.tensor(0.01)):
        with pytest.raises(Timeout, match="no engine answered"):
            LLM.connect(f"ipc://{short}/nobody", timeout_s=value, restart_wait_s=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("secret_file", [5, "a\0b", object()])
def test_what_is_no_path_is_no_file_of_a_secret(secret_file: Any) -> None:
    with pytest.raises(ConfigError, match=r"secret_file=.* is no path of a file"):
        LLM.connect("tcp://127.0.0.1:1", secret_file=secret_file)
