"""Fixtures of the tests of the journal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from phalanx.tests.serving.journal.gate import KEYS, Gate


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    tmp_path.chmod(0o700)
    (tmp_path / "keys").write_text("\n".join(KEYS.values()))
    (tmp_path / "keys").chmod(0o600)
    gate = Gate(tmp_path)
    with contextlib.closing(gate.engine):
        yield gate
