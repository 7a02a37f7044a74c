"""The kept inputs of each fuzzing target, tried again. How to fuzz on: CONTRIBUTING.md."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.fuzz.targets import CORPUS, TARGETS
from phalanx.tests.hostile_values import little_memory

MOST_BYTES = 50 * 1024
"""Bytes of a target's inputs together."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Bad inputs fill the log with warnings."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _inputs(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_worth_keeping_of_fuzzing_does_no_harm(target: str) -> None:
    fuzz_one = importlib.import_module(f"phalanx.tests.fuzz.targets.{TARGETS[target]}").fuzz_one
    fuzz_one(b"")  # what it makes once counts for no input
    with little_memory():
        for file in _inputs(target):
            try:
                fuzz_one(file.read_bytes())
            except Exception as error:
                raise AssertionError(f"{target}/{file.name}: {error!r}") from error


@pytest.mark.parametrize("target", TARGETS)
def test_a_targets_inputs_are_few_and_small(target: str) -> None:
    assert 5 <= len(_inputs(target)) <= 100
    assert sum(file.stat().st_size for file in _inputs(target)) <= MOST_BYTES


def test_choices_end_with_the_bytes_and_the_same_bytes_choose_the_same() -> None:
    assert Choices(b"").value(("a",)) is None
    data = bytes(range(256)) * 4
    first, second = Choices(data), Choices(data)
    while not first.exhausted:
        assert repr(first.value(("a", "b"))) == repr(second.value(("a", "b")))
    assert Choices(bytes([1, 0, 1, 7])).mutated(b"a") == b"\x07"
