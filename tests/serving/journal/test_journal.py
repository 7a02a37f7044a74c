"""The journal's file and what it keeps: checked at the door, bounded, of one process, and whole after any death."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from phalanx.engine.errors import ConfigError
from phalanx.serving.journal.documents import Document
from phalanx.serving.journal.entries import Request, digest_of
from phalanx.serving.journal.journal import Journal, KeyInUse
from phalanx.serving.journal.writer import JournalError, JournalFull

WRITER = """
import itertools, sys
from phalanx.serving.journal.entries import Request
from phalanx.serving.journal.journal import Journal

journal = Journal(sys.argv[1], "gateway", max_bytes=2**26, keep_s=3600)
begin = int(sys.argv[2])
for number in itertools.count(begin):
    [row] = journal.accept([Request(f"r{number}", "/v1/completions", body=b"x" * (number % 9000))]).result()
    print("accepted", number, row, flush=True)
    if number % 2:
        assert journal.finish(row, 200, str(number).encode()).result()
        print("finished", number, row, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def opened(path: Path, max_bytes: int = 2**24, keep_s: float = 3600.0, purpose: str = "gateway") -> Journal:
    return Journal(str(path), purpose, max_bytes=max_bytes, keep_s=keep_s)


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    with closing(opened(folder / "journal")) as journal:
        yield journal


def ask(number: int, body: bytes = b"{}", key: str | None = None) -> Request:
    return Request(f"r{number}", "/v1/completions", "ann", f"name{number}", key, body=body, digest=digest_of(body))


def test_what_is_accepted_is_there_until_it_is_finished_once(folder: Path) -> None:
    with closing(opened(folder / "journal")) as journal:
        first, second = journal.accept([ask(1, b"one", "k"), ask(2, b"two")]).result()
        assert journal.progress(first, 0, b"so far").result()
        assert journal.finish(second, 200, b"answer").result()
        assert not journal.finish(second, 500, b"another").result()
        assert not journal.progress(second, 0, b"late").result()
    with closing(opened(folder / "journal")) as journal:
        assert (journal.size.unfinished, journal.size.finished) == (1, 1)
        [entry] = journal.unfinished(0, 10).result()
        assert (entry.number, entry.request) == (first, ask(1, b"one", "k"))
        assert journal.progress_of(first).result() == {0: [b"so far"]}
        ended = journal.by_name("ann", "name2").result()
        assert ended is not None
        assert (ended.status, ended.answer, ended.request.body) == (200, b"answer", b"")
        assert journal.by_name("bob", "name2").result() is None
        assert journal.by_key("ann", "k").result() == entry
        for number in (first, second):
            assert journal.withdraw(number).result()
        assert journal.size.bytes == 0


def test_an_id_and_a_key_are_taken_once_and_all_of_a_list_or_none_is(journal: Journal) -> None:
    journal.accept([ask(1, key="k")]).result()
    with pytest.raises(KeyInUse):
        journal.accept([ask(2), ask(3, key="k")]).result()
    with pytest.raises(KeyInUse):
        journal.accept([ask(1)]).result()
    assert journal.size.unfinished == 1
    journal.accept([Request("r4", "/v1/completions", "bob", key="k")]).result()


def test_a_full_journal_forgets_the_oldest_answers_and_then_refuses(folder: Path) -> None:
    with closing(opened(folder / "journal", max_bytes=100_000)) as journal:
        rows = []
        for number in range(20):
            [row] = journal.accept([ask(number, b"x" * 5000)]).result()
            rows.append(row)
            journal.finish(row, 200, b"y" * 5000).result()
            assert journal.size.bytes <= 100_000
        kept = [row for number, row in enumerate(rows) if journal.by_id(f"r{number}").result() is not None]
        assert kept == rows[-len(kept) :]
        assert 5 < len(kept) < 20

        refused = [journal.accept([ask(number, b"x" * 5000)]) for number in range(100, 200)][-1]
        with pytest.raises(JournalFull, match=r"may hold 100000 \(journal_max_mb\)"):
            refused.result()
        assert (journal.size.finished, journal.size.bytes <= 100_000) == (0, True)
        unfinished = journal.unfinished(0, 100).result()
        assert len(unfinished) == journal.size.unfinished > 5

        # An answer that is longer than all there is: the request has ended, and its answer is left out.
        assert not journal.progress(unfinished[0].number, 0, b"z" * 100_000).result()
        assert journal.finish(unfinished[0].number, 200, b"z" * 100_000).result()
        ended = journal.by_id(unfinished[0].request.id).result()
        assert ended is not None
        assert (ended.status, ended.answer) == (200, None)
        assert journal.size.bytes <= 100_000


def test_the_file_stays_near_its_bound(folder: Path) -> None:
    with closing(opened(folder / "journal", max_bytes=2**20)) as journal:
        for number in range(150):
            [row] = journal.accept([ask(number, os.urandom(number * 130))]).result()
            journal.progress(row, 0, os.urandom(3000)).result()
            journal.finish(row, 200, os.urandom(8000)).result()
        assert (folder / "journal").stat().st_size < 2 * 2**20
        assert (folder / "journal-wal").stat().st_size < 20 * 2**20


def test_answers_are_forgotten_after_a_while(folder: Path) -> None:
    now = 1000.0
    with closing(Journal(str(folder / "j"), "gateway", max_bytes=2**20, keep_s=60, clock=lambda: now)) as journal:
        old, open_one = journal.accept([ask(1), ask(2)]).result()
        journal.finish(old, 200, b"").result()
        assert journal.prune().result() == 0
        now += 61
        assert journal.prune().result() == 1
        assert [entry.number for entry in journal.unfinished(0, 9).result()] == [open_one]


def test_documents_are_kept_by_kind_owner_and_id(journal: Journal) -> None:
    document = Document("response", "ann", "a", b"head", b"content")
    journal.documents.put(document).result()
    journal.documents.put(Document("response", "ann", "a", b"other", b"content")).result()
    assert journal.documents.get("response", "ann", "a").result() == Document(
        "response", "ann", "a", b"other", b"content"
    )
    assert journal.documents.get("response", "bob", "a").result() is None
    assert [each.id for each in journal.documents.heads("response").result()] == ["a"]
    assert journal.documents.delete("response", "ann", "a").result()
    assert journal.size.bytes == 0


def test_only_its_user_may_touch_the_file(folder: Path) -> None:
    opened(folder / "journal").close()
    assert {path.name for path in folder.iterdir()} == {"journal", "journal.lock"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    with closing(opened(folder / "journal")) as journal:
        journal.accept([ask(1)]).result()
        assert (folder / "journal-wal").stat().st_mode & 0o777 == 0o600

    (folder / "journal").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        opened(folder / "journal")
    (folder / "link").symlink_to(folder / "journal")
    with pytest.raises(ConfigError, match="is a link"):
        opened(folder / "link")
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        opened(folder / "journal")
    folder.chmod(0o700)
    with pytest.raises(ConfigError, match="make it"):
        opened(folder / "no such" / "journal")


def test_a_second_owner_is_refused_and_told_who_the_first_is(folder: Path) -> None:
    with closing(opened(folder / "journal")):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            opened(folder / "journal")
        other = subprocess.run(
            [sys.executable, "-c", WRITER, folder / "journal", "0"], capture_output=True, text=True, check=False
        )
        assert "is in use by process" in other.stderr
    opened(folder / "journal").close()


def test_what_is_no_journal_is_refused_and_left_as_it_is(folder: Path) -> None:
    (folder / "text").write_bytes(b"precious")
    with closing(sqlite3.connect(folder / "foreign")) as foreign:
        foreign.execute("CREATE TABLE mine (a)")
    for name in ("text", "foreign"):
        (folder / name).chmod(0o600)
        before = (folder / name).read_bytes()
        with pytest.raises(ConfigError, match="give the path of a new file"):
            opened(folder / name)
        assert (folder / name).read_bytes() == before


def test_another_version_purpose_or_schema_is_refused_by_name(folder: Path) -> None:
    path = folder / "journal"
    opened(path).close()
    with pytest.raises(ConfigError, match="not one of generate"):
        opened(path, purpose="generate")
    for statement, message in (
        ("PRAGMA user_version=7", "schema version 7, and this phalanx reads version 1"),
        ("CREATE TRIGGER t AFTER INSERT ON request BEGIN DELETE FROM request; END", "tables that phalanx has not made"),
    ):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()
        with pytest.raises(ConfigError, match=message):
            opened(path)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version=1")
            connection.commit()


def test_a_damaged_file_is_a_clear_error(folder: Path) -> None:
    path = folder / "journal"
    with closing(opened(path)) as journal:
        journal.accept([ask(number, b"x" * 3000) for number in range(200)]).result()
    whole = path.read_bytes()
    random.seed(1)
    damaged = [whole[: len(whole) // 2], whole[:50], whole[:4096]]
    damaged.append(whole[:8192] + random.randbytes(len(whole) - 8192))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="journal=") as error:
            opened(path)
        assert "\n" not in str(error.value)


def test_a_killed_process_has_lost_nothing_that_it_said_was_accepted(folder: Path) -> None:
    path = folder / "journal"
    accepted: dict[int, int] = {}
    finished: set[int] = set()
    begin = 0
    for lines in (1, 7, 30, 120):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, str(begin)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        # The rest may say more while the kill is on its way.
        for place, line in enumerate(process.stdout, 1):
            word, number, row = line.split()
            begin = int(number) + 1
            if word == "accepted":
                accepted[int(number)] = int(row)
            else:
                finished.add(int(number))
            if place == lines:
                process.send_signal(signal.SIGKILL)
        process.wait()
        begin += 100  # what was accepted and not said is there too

    with closing(opened(path, max_bytes=2**26)) as journal:
        for number, row in accepted.items():
            entry = journal.by_id(f"r{number}").result()
            assert entry is not None
            assert entry.number == row
            if number in finished:
                assert (entry.status, entry.answer) == (200, str(number).encode())
        numbers = [entry.number for entry in journal.unfinished(0, 10_000).result()]
        assert len(set(numbers)) == len(numbers) == journal.size.unfinished


def test_many_threads_are_committed_together_and_none_is_lost(journal: Journal) -> None:
    def accept(begin: int) -> None:
        for number in range(begin, begin + 25):
            [row] = journal.accept([ask(number)]).result()
            assert journal.finish(row, 200, b"").result()

    threads = [threading.Thread(target=accept, args=(1000 * each,)) for each in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (journal.size.unfinished, journal.size.finished) == (0, 200)


def test_a_transaction_that_fails_fails_its_requests_and_counts_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.accept([ask(1)]).result()
    before = journal.size.bytes
    with monkeypatch.context() as patch:

        def broken(*_: object) -> int:
            raise sqlite3.OperationalError("disk I/O error")

        patch.setattr("phalanx.serving.journal.rows.insert", broken)
        with pytest.raises(JournalError, match="disk I/O error"):
            journal.accept([ask(2)]).result()
    assert journal.size.bytes == before
    journal.accept([ask(2)]).result()
    assert journal.size.unfinished == 2
