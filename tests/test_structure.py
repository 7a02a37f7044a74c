"""The architecture's own rules: imports run one way, rooms stay small, every setting is explained."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from phalanx.engine.config import EngineConfig
from phalanx.engine.params import SamplingParams
from phalanx.launch.schema import field_docs

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "parallel", "engine", "launch"]  # each may import those before it
FILE_LINES, FUNCTION_LINES = 400, 60


def _sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE = [ROOT / "__init__.py", *_sources(*LAYERS)]


def _imported_layers(path: Path) -> Iterator[str]:
    """The layers that a file imports from, relatively."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield target[0]


@pytest.mark.parametrize("path", _sources(*LAYERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_launch_to_engine_to_parallel_to_kernels(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    assert set(_imported_layers(path)) <= set(allowed)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_itself_relatively(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        assert not [name for name in names if name.split(".")[0] == "phalanx"]


@pytest.mark.parametrize("path", [*PACKAGE, *_sources("benchmarks")], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_function_outgrows_its_room(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, node.name


def test_the_scheduler_knows_no_torch() -> None:
    for name in ("scheduler", "blocks", "draft", "request", "plan"):
        tree = ast.parse((ROOT / "engine" / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not {name for name in imported if name.split(".")[0] in ("torch", "numpy")}


def test_only_launch_reads_the_environment() -> None:
    for path in _sources("kernels", "parallel", "engine"):
        assert "os.environ" not in path.read_text(), path
        assert "getenv" not in path.read_text(), path


@pytest.mark.parametrize("owner", [EngineConfig, SamplingParams])
def test_every_setting_is_explained(owner: type) -> None:
    names = (
        [field.name for field in dataclasses.fields(owner)]
        if dataclasses.is_dataclass(owner)
        else [field.name for field in msgspec.structs.fields(owner)]
    )
    docs = field_docs(owner)
    assert [name for name in names if not docs.get(name)] == []


def test_every_module_says_what_it_is() -> None:
    empty = [
        path for path in PACKAGE if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert empty == []


def test_setup_lists_every_package() -> None:
    listed = (ROOT / "setup.py").read_text()
    for path in _sources(*LAYERS, "configs"):
        if path.name == "__init__.py":
            assert f'"phalanx.{".".join(path.relative_to(ROOT).parts[:-1])}"' in listed
