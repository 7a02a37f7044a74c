"""A batch that was broken off goes on from what its journal has of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.protocol.messages import (
    Accepted,
    Completion,
    Delta,
    Event,
    Finished,
    ResumedCompletion,
    Submit,
    Timings,
    Usage,
)
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.launch.cli.jsonl import LineRequest
from phalanx.launch.cli.run_journal import RunJournal
from phalanx.launch.generate import Batch
from phalanx.serving.journal import progress
from phalanx.serving.journal.journal import Journal
from phalanx.serving.journal.writer import JournalError


class FakeLLM:
    """Answers with three tokens from wherever a request is; a run is broken off at its second token."""

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks
        self.submits: list[Submit] = []

    def submit(self, submit: Submit, on_event: Callable[[Event], None], *, quick: bool) -> None:
        self.submits.append(submit)
        on_event(Accepted(id=submit.id, prompt_tokens=1, seed=5, max_tokens=3))
        begin = len(submit.resume.completions[0].token_ids) if submit.resume is not None else 0
        for place in range(begin, 2 if self.breaks else 3):
            on_event(Delta(submit.id, 0, f" {place}", [place], None, place))
        if self.breaks:
            raise KeyboardInterrupt
        on_event(Finished(submit.id, [Completion(0, "length")], Usage(1, 3), Timings(0.0, 0.0, 0.0, 0.0)))


class Answers:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class Silent:
    def submitted(self, item: object) -> None: ...
    def refused(self, item: object) -> None: ...
    def delta(self, event: object) -> None: ...
    def ended(self, request_id: str, record: object) -> None: ...


@pytest.fixture(autouse=True)
def every_token_is_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(progress, "PROGRESS_S", 0.0)


def run(path: Path, *, breaks: bool, prompt: str = "Hi", model: str = "m", done: Collection[str] = ()) -> Any:
    """(the submits, the records) of one run of two lines."""
    llm, answers = FakeLLM(breaks), Answers()
    lines = [LineRequest(name, Submit(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=3))) for name in "ab"]
    with closing(RunJournal(str(path), model)) as journal:
        journal.read(done)
        batch = Batch(llm, answers, Silent(), 1, journal)  # type: ignore[arg-type]
        try:
            batch.run(iter([line for line in lines if line.id not in done]))
        except KeyboardInterrupt:
            while not batch._events.empty():
                batch._take(batch._events.get())
    return llm.submits, answers.records


def test_a_broken_off_request_goes_on_and_the_others_begin(tmp_path: Path) -> None:
    run(tmp_path / "j", breaks=True)
    submits, records = run(tmp_path / "j", breaks=False)
    first, second = submits
    assert first.resume is not None
    assert first.resume.completions == [ResumedCompletion(token_ids=[0, 1], characters=4)]
    assert first.sampling.seed == 5
    assert second.resume is None
    assert [(each["id"], each["text"], each["token_ids"]) for each in records] == [
        (name, " 0 1 2", [0, 1, 2]) for name in "ab"
    ]
    submits, _ = run(tmp_path / "j", breaks=False)
    assert [each.resume for each in submits] == [None, None]  # what has its record is forgotten


def test_another_line_or_model_begins_anew_and_what_is_done_is_forgotten(tmp_path: Path) -> None:
    for changes in ({"prompt": "Ho"}, {"model": "another"}):
        run(tmp_path / "j", breaks=True)
        submits, records = run(tmp_path / "j", breaks=False, **changes)  # type: ignore[arg-type]
        assert [each.resume for each in submits] == [None, None]
        assert [each["text"] for each in records] == [" 0 1 2"] * 2
    run(tmp_path / "j", breaks=True)
    submits, _ = run(tmp_path / "j", breaks=False, done={"a"})
    assert [each.id for each in submits] == ["b"]
    submits, _ = run(tmp_path / "j", breaks=False)
    assert submits[0].resume is None


@pytest.mark.parametrize("broken", ["accept", "progress", "progress_of", "withdraw"])
def test_a_run_outlives_a_journal_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def full(*_: object) -> Future[Any]:
        failed: Future[Any] = Future()
        failed.set_exception(JournalError("the journal cannot be used: database or disk is full"))
        return failed

    run(tmp_path / "j", breaks=True)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, broken, full)
        _, records = run(tmp_path / "j", breaks=False, model="another" if broken == "withdraw" else "m")
        assert [(each["id"], each["text"]) for each in records] == [(name, " 0 1 2") for name in "ab"]
    _, records = run(tmp_path / "j", breaks=False)
    assert [each["text"] for each in records] == [" 0 1 2"] * 2
