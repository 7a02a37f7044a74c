"""Nothing that comes from outside is executed: the package has no call that could, and reads a model without code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from phalanx.tests.test_structure import LAYERS, PACKAGE, ROOT

EXECUTING = {
    "eval", "exec", "compile", "__import__", "execfile",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load",
    "dill.loads", "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "torch.load", "torch.jit.load",
    "torch.hub.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp",
    "dist.TCPStore", "torch.distributed.TCPStore",
    "multiprocessing.Pipe", "multiprocessing.Queue", "multiprocessing.Process", "multiprocessing.Manager",
    "multiprocessing.get_context", "concurrent.futures.ProcessPoolExecutor", "ProcessPoolExecutor",
}  # fmt: skip
"""Calls that run what they read, or unpickle it: some by themselves, some in what they start."""
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "code"}
OBJECTS = {
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
"""torch.distributed's collectives of pickled objects, under whichever name the module goes."""
ASKING = {"launch/cli/terminal.py"}
"""Where a person at a terminal is asked for the next line of a chat."""


def _calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _keywords(call: ast.Call) -> dict[str, object]:
    return {
        keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        for keyword in call.keywords
        if keyword.arg
    }


def _faults(path: Path) -> list[str]:
    """The calls and imports of a file that may run, or unpickle, what somebody else wrote."""
    found = []
    for name, call in _calls(path):
        last = name.rpartition(".")[2]
        options = _keywords(call)
        allowed = (
            name not in EXECUTING
            and last not in OBJECTS
            and options.get("shell", False) is False
            and options.get("allow_pickle", False) is False
            and options.get("trust_remote_code", False) is False
        )
        if not allowed:
            found.append(f"line {call.lineno}: {name}")
        reads = last == "from_pretrained" or (last == "from_config" and name.startswith("Auto"))
        if reads and (options.get("trust_remote_code"), options.get("local_files_only")) != (False, True):
            found.append(f"line {call.lineno}: {name} without trust_remote_code=False, local_files_only=True")

    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES]
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_runs_and_unpickles_nothing_that_it_reads(path: Path) -> None:
    assert _faults(path) == []


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_is_asked_on_standard_input_but_in_a_chat(path: Path) -> None:
    asks = any(name in ("input", "getpass.getpass", "sys.stdin.readline") for name, _ in _calls(path))
    assert not asks or str(path.relative_to(ROOT)) in ASKING


def test_what_the_security_linter_is_told_to_overlook_has_a_reason() -> None:
    for path in PACKAGE:
        for line in path.read_text().splitlines():
            assert "# nosec" not in line or re.search(r"# nosec B\d{3} # \w+ \w+", line), (path, line)


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "torch.load(path)",
        "import pickle",
        "from multiprocessing import Queue",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=asked)",
        "np.load(path, allow_pickle=True)",
        "dist.broadcast_object_list(objects)",
        "yaml.load(text)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=True)",
        "AutoModel.from_config(config, trust_remote_code=trusted)",
    ],
)
def test_each_such_call_would_be_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(f"{line}\n")
    assert _faults(tmp_path / "module.py")


def test_the_whole_package_is_looked_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in PACKAGE if path.name == "__init__.py"} >= {
        layer for layer in LAYERS if (ROOT / layer).exists()
    }
