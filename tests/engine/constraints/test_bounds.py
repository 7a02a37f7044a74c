"""Grammars made to hurt: refused, or compiled within bounds; and the official suite of JSON Schema, where it is."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from phalanx import CapacityExceeded, InvalidRequest, StructuredOutput
from phalanx.benchmarks.parts.json_schema_suite import run_suite
from phalanx.engine.constraints import bounded
from phalanx.engine.constraints.compiler import GrammarCompiler
from phalanx.engine.coordinator.tokenizer import Tokenizer
from phalanx.tests.engine.constraints.hurtful import HURTFUL

SUITE = os.environ.get("JSON_SCHEMA_SUITE", "")
"""The folder draft2020-12 of the suite's tests."""


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    made = GrammarCompiler(tokenizer.definition, tokenizer.size, 2)
    made.prepare()
    return made


@pytest.mark.parametrize("name", HURTFUL)
def test_what_is_made_to_hurt_is_refused_or_bounded(compiler: GrammarCompiler, name: str) -> None:
    fields, why = HURTFUL[name]
    before = time.process_time()
    if why is None:
        compiler.compile(StructuredOutput(**fields))
    else:
        with pytest.raises(InvalidRequest, match=why):
            compiler.compile(StructuredOutput(**fields))
    assert time.process_time() - before < 20  # a bound against hanging: it takes less than two seconds


def test_compiling_takes_less_than_200_megabytes(compiler: GrammarCompiler) -> None:
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("this system does not tell a process's peak of memory")
    for name in ("a million times", "1,000 triggers", "a chain of properties", "10,000 values"):
        peak.write_text("5")
        before = _megabytes("VmRSS")
        compiler.compile(StructuredOutput(**HURTFUL[name][0]))
        assert _megabytes("VmHWM") - before < 200, name


def _megabytes(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def test_what_takes_too_long_is_given_up_and_no_third_one_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "CPU_S", 0.05)
    go_on = threading.Event()

    def busy() -> None:
        while not go_on.is_set():
            sum(range(1000))

    assert bounded.run_bounded(lambda: 5, "structured.regex") == 5
    with pytest.raises(KeyError):
        bounded.run_bounded(lambda: {}["a"], "structured.regex")
    for _ in range(bounded.ABANDONED):
        with pytest.raises(InvalidRequest, match="regex is too complex: it takes more than"):
            bounded.run_bounded(busy, "structured.regex")
    with pytest.raises(CapacityExceeded, match="retry"):
        bounded.run_bounded(lambda: 5, "structured.regex")
    go_on.set()
    for thread in list(bounded._abandoned):
        thread.join()
    assert bounded.run_bounded(lambda: 5, "structured.regex") == 5


def test_a_thread_that_the_machine_lets_wait_has_taken_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "CPU_S", 0.05)
    run = bounded._Work.run
    monkeypatch.setattr(bounded._Work, "run", lambda work: (time.sleep(0.5), run(work))[1])
    assert bounded.run_bounded(lambda: 5, "structured.regex") == 5


def test_an_answer_whose_grammar_becomes_too_complex_fails_by_itself(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    matcher = compiler.compile(StructuredOutput(regex="((a{1,1000}){1,1000}){1,1000}")).matcher([2])
    [token] = tokenizer.encode("a", special=False)
    for _ in range(200):
        if matcher.allowed() is None:
            break
        matcher.advance(token)
    assert matcher.failure is None or "tokens of the answer" in matcher.failure


@pytest.mark.slow
@pytest.mark.skipif(not SUITE, reason="JSON_SCHEMA_SUITE names no folder of the JSON-Schema test suite")
def test_the_official_suites_schemas_constrain_rightly_or_are_refused(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    verdict = run_suite(Path(SUITE), tokenizer, compiler)
    assert verdict.wrong == []
    assert verdict.right > 190
    assert all(": structured.json_schema" in line for line in verdict.refused)
