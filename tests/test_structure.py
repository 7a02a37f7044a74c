"""The architecture's own rules: imports run one way, rooms stay small, every setting is explained."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from phalanx.engine.config import EngineConfig
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.launch.cli.schema import field_docs
from phalanx.tests.cpp_functions import functions

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "parallel", "engine", "serving", "launch"]  # each may import those before it
# The rooms of engine/: each may import those before it, too.
ENGINE_ROOMS = [
    "errors",
    "protocol",
    "config",
    "scheduling",
    "constraints",
    "sampling",
    "models",
    "memory",
    "execution",
    "coordinator",
    "assembly",
    "client",
]
FILE_LINES, FUNCTION_LINES, FOLDER_FILES = 400, 60, 12


def _sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return sorted(path for path in paths if path.suffix in suffixes)


ALL_SUFFIXES, CPP_SUFFIXES = (".py", ".h", ".cpp"), (".h", ".cpp")
PACKAGE = [ROOT / "__init__.py", *_sources(*LAYERS)]


def _imported_modules(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports, relatively, as paths from the root."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            target = [part for part in target if part]
            for alias in node.names:
                named = ROOT.joinpath(*target, alias.name)
                yield (*target, alias.name) if named.is_dir() or named.with_suffix(".py").exists() else tuple(target)


def _imported_packages(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", _sources(*LAYERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_launch_to_serving_to_engine_to_parallel_to_kernels(path: Path) -> None:
    allowed = LAYERS[: LAYERS.index(path.relative_to(ROOT).parts[0]) + 1]
    assert {module[0] for module in _imported_modules(path)} <= set(allowed)


@pytest.mark.parametrize("path", _sources("engine"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_rooms_of_the_engine_import_only_what_is_below_them(path: Path) -> None:
    room = _engine_room(path.relative_to(ROOT).with_suffix("").parts)
    below = ENGINE_ROOMS[: ENGINE_ROOMS.index(room) + 1]
    imported = {module for module in _imported_modules(path) if module[0] == "engine"}
    assert {_engine_room(module) for module in imported} <= set(below)
    if room == "execution":  # a rank obeys plans and knows no requests: of the protocol only what a sampler makes
        assert not [module for module in imported if module[1] == "protocol" and module[2] != "logprobs"]


def _engine_room(module: tuple[str, ...]) -> str:
    """The room of a module of engine/; `engine.py`, which puts the others together, is one by itself."""
    if len(module) < 2 or module[1] == "__init__":
        return "errors"
    return "assembly" if module == ("engine", "engine") else module[1]


def test_no_docstring_or_help_text_begins_with_of() -> None:
    assert [path for path in _sources(*LAYERS, "benchmarks") if re.search(r'"""Of\b', path.read_text())] == []


def test_serving_speaks_to_the_engine_as_its_clients_do() -> None:
    for path in _sources("serving"):
        rooms = {_engine_room(module) for module in _imported_modules(path) if module[0] == "engine"}
        assert rooms <= {"errors", "protocol", "config", "client"}, path


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in _sources(*LAYERS, "benchmarks", suffixes=ALL_SUFFIXES)}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_a_folder_has_at_most_twelve_files(folder: Path) -> None:
    assert len([path for path in folder.iterdir() if path.suffix in ALL_SUFFIXES]) <= FOLDER_FILES


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


@pytest.mark.parametrize(
    "path",
    _sources(*LAYERS, "benchmarks", suffixes=CPP_SUFFIXES),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_cpp_file_and_no_cpp_function_outgrows_its_room(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    assert [function for function in functions(text) if function.lines > FUNCTION_LINES] == []


@pytest.mark.parametrize("path", _sources(*LAYERS, suffixes=CPP_SUFFIXES), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_cpp_file_includes_only_files_that_there_are(path: Path) -> None:
    included = re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE)
    assert [name for name in included if not (path.parent / name).is_file()] == []


def _cpp_function(head: str, lines: int) -> str:
    """A function of so many lines, with braces that open nothing."""
    return "\n".join([f"{head} {{", *["    if (x) { f('{', \"}\"); }  // }"] * (lines - 2), "}"])


def test_a_cpp_function_of_61_lines_is_found_wherever_it_stands() -> None:
    source = f"""
#define OPEN {{
namespace a {{
enum class E : int {{ kOne, kTwo }};
const int kTable[] = {{1, 2}};
struct alignas(64) S {{
    std::atomic<int> count{{0}};
    template <class T, int N = (1 + 1)>
    T short_one(T x) const {{ return x; }}  /* {{ */

    {_cpp_function("explicit S(int x) : count(x)", 61)}
}};
{_cpp_function("void just_fits(int x)", 60)}
{_cpp_function("PYBIND11_MODULE(_native, m)", 61)}
}}  // namespace a
"""
    assert [(function.head, function.lines) for function in functions(source)] == [
        ("template <class T, int N = (1 + 1)> T short_one(T x) const", 2),
        ("explicit S(int x) : count(x)", 61),
        ("void just_fits(int x)", 60),
        ("PYBIND11_MODULE(_native, m)", 61),
    ]


def test_cpp_braces_that_do_not_match_are_an_error() -> None:
    for source in ("void f() {", "void f() {}\n}"):
        with pytest.raises(ValueError, match="brace"):
            list(functions(source))


def test_scheduling_constraints_and_the_protocol_know_no_torch() -> None:
    for path in _sources("engine/scheduling", "engine/protocol"):
        assert not _imported_packages(path) & {"torch", "numpy"}, path
    for path in _sources("engine/constraints"):
        assert not _imported_packages(path) & {"torch", "transformers"}, path


def test_only_launch_reads_the_environment() -> None:
    for path in _sources("kernels", "parallel", "engine", "serving"):
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
