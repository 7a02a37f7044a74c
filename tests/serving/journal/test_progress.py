"""What is noted of a request as it grows, and how it goes on from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from phalanx.engine.protocol.messages import Accepted, Delta, Submit
from phalanx.engine.protocol.sampling_params import SamplingParams
from phalanx.serving.journal.entries import Request
from phalanx.serving.journal.journal import Journal
from phalanx.serving.journal.progress import ProgressNotes, digest_of_submit, resume

SUBMIT = Submit(id="now", prompt="Hi", sampling=SamplingParams(n=2, max_tokens=9))
DIGEST = digest_of_submit(SUBMIT, "model")
ACCEPTED = Accepted(id="before", prompt_tokens=2, seed=77, max_tokens=9)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    tmp_path.chmod(0o700)
    with closing(Journal(str(tmp_path / "journal"), "gateway", max_bytes=2**20, keep_s=60)) as journal:
        journal.accept([Request("r", "/v1/completions")]).result()
        yield journal


def pieces(journal: Journal) -> list[bytes]:
    return journal.progress_of(1).result().get(0, [])


def test_notes_are_taken_once_a_second_and_hold_what_came_since(journal: Journal) -> None:
    now = 0.0
    notes = ProgressNotes(journal, lambda: 1, 0, DIGEST, lambda: now)
    notes.add(ACCEPTED)
    for place in range(30):
        now += 0.1
        notes.add(Delta("before", 0, f" {place}", [place], None, place, "t" if place < 2 else ""))
        if place % 2:
            notes.add(Delta("before", 1, "x", [7], None, place // 2))
    assert 2 <= len(pieces(journal)) <= 3

    resumed = resume(SUBMIT, pieces(journal), DIGEST)
    assert resumed is not None
    accepted, first, second = resumed.events
    assert isinstance(accepted, Accepted)
    assert isinstance(first, Delta)
    assert isinstance(second, Delta)
    count = len(first.token_ids)
    assert 19 <= count <= 30
    assert (first.id, first.token_ids, first.reasoning) == ("now", list(range(count)), "tt")
    assert first.text == "".join(f" {place}" for place in range(count))
    assert second.token_ids == [7] * (count // 2)

    submit = resumed.submit
    assert submit.resume is not None
    assert submit.sampling.seed == 77  # the one that the engine gave it
    assert [each.token_ids for each in submit.resume.completions] == [first.token_ids, second.token_ids]
    assert submit.resume.completions[0].characters == len(first.text)


def test_notes_of_another_question_or_with_a_gap_are_no_beginning(journal: Journal) -> None:
    now = 0.0
    notes = ProgressNotes(journal, lambda: 1, 0, DIGEST, lambda: now)
    notes.add(ACCEPTED)
    for place in range(2):
        now += 2
        notes.add(Delta("before", 0, "a", [1], None, place))
    first, second = pieces(journal)
    assert resume(SUBMIT, [first, second], DIGEST) is not None
    assert resume(SUBMIT, [second], DIGEST) is None
    assert resume(SUBMIT, [first, first], DIGEST) is None
    assert resume(SUBMIT, [first, b"\xff"], DIGEST) is None
    assert resume(SUBMIT, [], DIGEST) is None
    for other in (
        digest_of_submit(SUBMIT, "another model"),
        digest_of_submit(Submit(id="now", prompt="Ho", sampling=SUBMIT.sampling), "model"),
    ):
        assert resume(SUBMIT, [first, second], other) is None
    assert digest_of_submit(Submit(id="x", prompt="Hi", sampling=SUBMIT.sampling), "model") == DIGEST


def test_what_has_no_room_is_not_noted_and_costs_only_time(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    now = 0.0
    with closing(Journal(str(tmp_path / "full"), "gateway", max_bytes=600, keep_s=60)) as journal:
        journal.accept([Request("r", "/v1/completions")]).result()
        notes = ProgressNotes(journal, lambda: 1, 0, DIGEST, lambda: now)
        notes.add(ACCEPTED)
        for place in range(5):
            now += 2
            notes.add(Delta("before", 0, "a" * 50, [1], None, place))
        assert resume(SUBMIT, pieces(journal), DIGEST) is None
        assert journal.size.bytes <= 600
