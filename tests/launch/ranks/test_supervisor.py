"""The supervisor of a client's own group: what it says of a rank that failed, and which doors the group leaves open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from phalanx import LLM, SamplingParams
from phalanx.engine.client.group_failure import GroupFailure
from phalanx.launch.ranks.failure import report_failure
from phalanx.launch.ranks.own_group import first_failure
from phalanx.launch.ranks.rank_info import RankInfo

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


def test_a_failed_rank_is_named_with_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phalanx.launch.ranks.failure.die_on_signals", lambda: None)
    rank = RankInfo(2, 3, 2, 3, launched=True, folder=tmp_path)
    assert report_failure(ValueError("seven is too many"), rank) == 1
    failure = first_failure(tmp_path, 2, _ended("raise SystemExit(1)"))
    assert failure == GroupFailure(2, "ValueError", "seven is too many")


def test_a_rank_that_could_say_nothing_is_named_by_how_it_ended(tmp_path: Path) -> None:
    killed = _ended("import os; os.kill(os.getpid(), 9)")
    assert first_failure(tmp_path, 1, killed) == GroupFailure(1, "SIGKILL", f"process {killed.pid} was killed")
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
