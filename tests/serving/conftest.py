"""Fixtures of the tests of servers."""

from __future__ import annotations

from phalanx.tests.launch.conftest import tiny

__all__ = ["tiny"]
