"""What the documents name is there: files, folders and each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_QUOTED = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*)(?:::\w+)?`")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
_TOP = ("launch", "engine", "parallel", "kernels", "configs", "tests", "benchmarks", "docs", "serving")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_that_a_document_names_is_there(document: Path) -> None:
    text = document.read_text()
    named = [path for path in _QUOTED.findall(text) if path.split("/")[0] in _TOP]
    missing = [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    missing += [path for path in _LINK.findall(text) if not (document.parent / path).exists()]
    assert missing == []


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "ARCHITECTURE.md").read_text()
    assert [path.name for path in (ROOT / "docs" / "decisions").glob("*.md") if path.name not in listed] == []
