"""The C++ extensions are optional for users; where the tests run and could build them, they must be there."""

from __future__ import annotations

import shutil
import sys

import pytest
from phalanx.kernels import cpu
from phalanx.parallel.collectives import shared_memory


def test_both_extensions_are_built_where_there_is_a_compiler() -> None:
    if not sys.platform.startswith("linux") or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler is found: the tests of the extensions are skipped, as this one is")
    assert cpu.native is not None
    assert shared_memory.unavailable() is None
