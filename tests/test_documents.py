"""What the documents name is there: files, folders, modules, commands, names of the code, and each other."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SCREEN_LINES = 40
_TOP = ("launch", "engine", "parallel", "kernels", "configs", "tests", "benchmarks", "docs", "serving")
_SOURCES = (".py", ".h", ".cpp", ".yaml", ".toml")

_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*)(?:::\w+)?`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"`([A-Za-z_][\w.]*)(?:\(\)|=[^`\n]*)?`")
_MODULE = re.compile(r"-m phalanx((?:\.\w+)+)((?:\|\w+)*)")
_SCRIPT = re.compile(r"python ((?:benchmarks|tests)/[\w/.-]+\.py)")
_TARGET = re.compile(r"(?:`|^    )make ([a-z][\w-]*)", re.MULTILINE)
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]+")
"""Other programs' variables; those of the project are looked for all the same where they stand without a value."""


@functools.cache
def _files() -> tuple[Path, ...]:
    """The files of the project, without what is built or kept in models/."""
    return tuple(path for folder in _TOP for path in (ROOT / folder).rglob("*") if path.is_file())


@functools.cache
def _words() -> frozenset[str]:
    """Every word in the project's sources."""
    outside = [ROOT / name for name in ("__init__.py", "setup.py", "pyproject.toml", "Makefile")]
    sources = [path for path in _files() if path.suffix in _SOURCES]
    return frozenset(word for path in (*sources, *outside) for word in re.findall(r"[A-Za-z_]\w*", path.read_text()))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    named = [path for path in _PATH.findall(text) if path.split("/")[0] in _TOP]
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    missing += [path for path in _LINK.findall(text) if not (document.parent / path).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_name_that_a_document_quotes_is_one_of_the_code(document: Path) -> None:
    names = {path.name for path in _files()}
    missing = []
    for match in _NAME.finditer(_FENCE.sub("", document.read_text())):
        name = match[1]
        if name in names or ("=" in match[0] and _ENVIRONMENT.fullmatch(name)):
            continue
        missing += [match[0] for word in name.split(".") if word and word not in _words()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_that_a_document_gives_is_there(document: Path) -> None:
    text = document.read_text()
    missing = [path for path in _SCRIPT.findall(text) if not (ROOT / path).is_file()]
    for module, others in _MODULE.findall(text):
        *rooms, last = module[1:].split(".")
        for name in (last, *others.split("|")[1:]):
            if not any(ROOT.joinpath(*rooms, path).is_file() for path in (f"{name}.py", f"{name}/__main__.py")):
                missing.append(f"-m phalanx.{'.'.join([*rooms, name])}")

    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing += [f"make {target}" for target in _TARGET.findall(text) if target not in targets]
    assert missing == []


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "ARCHITECTURE.md").read_text()
    assert [path.name for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name not in listed] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda path: path.stem)
def test_a_decision_is_one_screen(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= SCREEN_LINES
