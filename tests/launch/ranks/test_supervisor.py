"""The supervisor of a client's own group: what it says of a rank that failed, and which doors the group leaves open."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest
from phalanx import LLM, EngineConfig, SamplingParams
from phalanx.engine.client.group_failure import GroupFailure, read_failure
from phalanx.launch.ranks.failure import failure_file, report_failure
from phalanx.launch.ranks.own_group import count_oom_kills, first_failure
from phalanx.launch.ranks.rank_info import RankInfo
from phalanx.parallel.child_python import python_command

RECORDER = """
import os, pickle, _pickle
def _record(*_args, **_kwargs):
    import traceback
    with open(os.environ["UNPICKLED"], "a") as file:
        file.write("".join(traceback.format_stack()) + "\\n")
class Unpickler(_pickle.Unpickler):
    def load(self):
        _record()
        return super().load()
def loads(data, **options):
    _record()
    return _pickle.loads(data, **options)
pickle.Unpickler, pickle.loads = Unpickler, loads
"""
"""A sitecustomize.py that notes every unpickling of a Python process."""


def _ended(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code])
    process.wait()
    return process


@pytest.mark.parametrize(("after_s", "removed"), [(0.0, False), (0.15, False), (0.3, False), (0.0, True)])
def test_a_client_that_goes_while_its_supervisor_starts_leaves_nothing(
    tiny: Path, tmp_path: Path, after_s: float, removed: bool
) -> None:
    folder = tmp_path / "run"
    folder.mkdir(0o700)
    (folder / "config.json").write_bytes(msgspec.json.encode(EngineConfig(model=str(tiny), ranks=2)))
    command = python_command("phalanx.launch.ranks.own_group", str(folder))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stderr is not None
    time.sleep(after_s)
    process.stdin.close()
    if removed:  # as a client does that is interrupted while it starts the process
        shutil.rmtree(folder)
    words = process.stderr.read()
    assert (process.wait(60), words) == (128 + signal.SIGTERM, b"")
    assert not folder.exists()


def test_a_failed_rank_is_named_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.launch.ranks.failure.die_on_signals", lambda: None)
    rank = RankInfo(2, 3, 2, 3, launched=True, folder=tmp_path)
    assert report_failure(ValueError("seven is too many"), rank) == 1
    failure = first_failure(tmp_path, 2, _ended("raise SystemExit(1)"))
    assert failure == GroupFailure(2, "ValueError", "seven is too many")


def test_a_rank_that_could_say_nothing_is_named_by_how_it_ended(tmp_path: Path) -> None:
    killed = _ended("import os; os.kill(os.getpid(), 9)")
    assert first_failure(tmp_path, 1, killed) == GroupFailure(1, "SIGKILL", f"process {killed.pid} was killed")
    assert first_failure(tmp_path, 1, killed, count_oom_kills()).from_outside
    assert not first_failure(tmp_path, 1, killed, -1).from_outside  # the system had no memory left meanwhile
    crashed = _ended("import os; os.kill(os.getpid(), 11)")
    assert not first_failure(tmp_path, 1, crashed, count_oom_kills()).from_outside
    unnamed = _ended("import os; os.kill(os.getpid(), 40)")
    assert first_failure(tmp_path, 1, unnamed).error == "signal 40"
    left = _ended("raise SystemExit(5)")
    assert first_failure(tmp_path, 0, left).message == f"process {left.pid} ended with exit code 5"


def _listening() -> list[str]:
    """Addresses at which this process's descendants and itself wait for TCP or UDP from anybody."""
    found = []
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and connection.laddr:
                found.append(connection.laddr.ip)
    return found


@pytest.mark.parametrize("collectives", ["auto", "gloo"])
def test_a_group_of_one_host_opens_no_door_and_unpickles_nothing(
    tiny: Path, tmp_path: Path, collectives: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "unpickled"
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    monkeypatch.setenv("UNPICKLED", str(notes))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    before = _listening()
    with LLM(str(tiny), ranks=2, dtype="float32", max_model_len=256, collectives=collectives) as llm:
        [answer] = llm.generate(["any"], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(answer.outputs[0].token_ids) == 3
        opened = _listening()
        for address in before:
            opened.remove(address)
        # Shared memory needs no socket at all; gloo's pairs meet on the loopback interface.
        assert [address for address in opened if collectives == "auto" or not address.startswith("127.")] == []
    assert not notes.exists(), notes.read_text()


def test_the_recorder_of_unpickling_sees_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    notes = tmp_path / "unpickled"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "UNPICKLED": str(notes)}
    code = "import io, pickle; pickle.loads(pickle.dumps(1)); pickle.Unpickler(io.BytesIO(pickle.dumps(2))).load()"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert notes.read_text().count("_record()") == 2


def test_a_process_forked_by_the_client_keeps_no_group_alive(tiny: Path) -> None:
    program = (
        "import os, sys, time\nfrom phalanx import LLM\n"
        f"llm = LLM({str(tiny)!r}, ranks=2, max_model_len=256)\n"
        "child = os.fork()\nif child == 0:\n    time.sleep(60)\n    os._exit(0)\n"
        "print(child, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    forked = psutil.Process(int(client.stdout.readline()))
    try:
        client.wait()
        deadline = time.monotonic() + 60
        while (left := _supervisors(tiny)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert left == []
    finally:
        forked.kill()


def _supervisors(model: Path) -> list[int]:
    """Process ids of supervisors and ranks whose group runs this model."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any("phalanx.launch.ranks" in part for part in command):
            config = Path(command[-1]) / "config.json"
            if config.exists() and str(model) in config.read_text():
                found.append(process.pid)
    return found


@pytest.mark.parametrize("written", [b"", b"\xff", b'{"rank": "x"}', b"[1]"])
def test_a_failure_that_cannot_be_read_is_a_failure_still(written: bytes, tmp_path: Path) -> None:
    assert read_failure(tmp_path / "failure.json") is None
    (tmp_path / "failure.json").write_bytes(written)
    assert read_failure(tmp_path / "failure.json") is None
    failure_file(tmp_path, 0).write_bytes(written)
    assert first_failure(tmp_path, 0, _ended("raise SystemExit(5)")).error == "SystemExit"


def test_a_signal_handler_starts_nothing_and_the_limit_holds(tmp_path: Path) -> None:
    program = (
        "import os, signal, threading, time\nfrom phalanx.launch.ranks.process import stop_on_signals\n"
        "stop_on_signals(lambda number: None, within_s=0.3)\n"
        "before = threading.active_count()\nos.kill(os.getpid(), signal.SIGTERM)\n"
        "print(threading.active_count() - before, flush=True)\ntime.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("0\n", 128 + 15)


def test_a_signal_ends_a_process_that_waits_in_c(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, threading, datetime\nfrom torch.distributed import FileStore\n"
        "from phalanx.launch.ranks.process import stop_on_signals\n"
        "stop_on_signals(within_s=0.3)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "store = FileStore(sys.argv[1], 2)\nstore.set_timeout(datetime.timedelta(seconds=60))\n"
        "store.get('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], timeout=120, check=False)
    assert done.returncode == 128 + 15
