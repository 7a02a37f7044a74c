"""Processes that phalanx starts import from where it does itself, and not from the working folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import phalanx
import pytest
from phalanx.launch.cli.presets import load_preset
from phalanx.launch.model_files.random_model import make_random_model
from phalanx.parallel.child_python import python_command

ROOT = Path(phalanx.__file__).parent
MODULES = ("phalanx", "msgspec", "torch", "zmq", "json", "selectors", "runpy", "jinja2", "pip", "sitecustomize")
PROGRAM = """
import sys
from phalanx import LLM, SamplingParams
with LLM(sys.argv[1], ranks=int(sys.argv[2]), device="cpu", max_model_len=64) as llm:
    print(len(llm.chat([{"role": "user", "content": "x"}], SamplingParams(max_tokens=2)).outputs))
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder, such as /tmp, in which somebody else has put modules."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    return folder


def test_a_child_imports_from_the_folders_of_its_parent_alone(hostile: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "child.py").write_text("import sys, json, msgspec\nprint(json.dumps([sys.argv, sys.path, __name__]))\n")
    parent = f"""
import json, subprocess, sys
sys.path[:0] = [{str(own)!r}, {str(ROOT.parent)!r}]
from phalanx.parallel.child_python import python_command
print(json.dumps(sys.path)); sys.stdout.flush()
subprocess.run(python_command("child", "a", "-b"), check=True)
"""
    (own / "parent.py").write_text(parent)
    run = subprocess.run(
        [sys.executable, str(own / "parent.py")], cwd=hostile, capture_output=True, text=True, check=True
    )
    theirs, seen = run.stdout.splitlines()
    arguments, folders, name = json.loads(seen)
    assert (arguments[1:], name) == (["a", "-b"], "__main__")
    assert folders == json.loads(theirs)
    assert not (tmp_path / "ran").exists()


def test_the_command_ends_as_that_of_a_module_does() -> None:
    assert python_command("a.b", "c")[-3:] == ["-m", "a.b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_process_of_an_engine_imports_from_the_working_folder(hostile: Path, tmp_path: Path, ranks: int) -> None:
    shape = {**load_preset("qwq_tiny")["shape"], "num_hidden_layers": 1}
    model = make_random_model(tmp_path / "model", shape, dtype="float32")
    (tmp_path / "own").mkdir()
    program = tmp_path / "own" / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT.parent)!r})\n{PROGRAM}")
    command = [sys.executable, str(program), str(model), str(ranks)]
    run = subprocess.run(command, cwd=hostile, capture_output=True, text=True, check=False)
    assert (run.stdout, run.returncode) == ("1\n", 0), run.stderr
    assert not (tmp_path / "ran").exists()


def test_every_python_is_started_so() -> None:
    for room in ("engine", "parallel", "kernels", "serving", "launch"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "child_python.py":
                assert not re.search(r"sys\.executable|import multiprocessing", path.read_text()), path
