"""A journal that cannot be written for a while, as on a full disk: what was accepted is answered once it can be."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from phalanx.serving.gateway.durable import requests
from phalanx.serving.journal.journal import Journal
from phalanx.serving.journal.writer import JournalError
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.journal.journaled import COMPLETIONS, batch_now, create, journaled, jsonl, line


class FullDisk:
    """Lets no answer be kept while it is `full`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = True
        self.refused = threading.Event()
        finish = Journal.finish

        def finished(journal: Journal, *values: Any) -> Future[bool]:
            if not self.full:
                return finish(journal, *values)
            failed: Future[bool] = Future()
            failed.set_exception(JournalError("the journal cannot be used: database or disk is full"))
            self.refused.set()
            return failed

        monkeypatch.setattr(Journal, "finish", finished)
        monkeypatch.setattr(requests, "RETRY_S", 0.01)


def test_a_batch_s_answers_are_kept_once_the_disk_has_room_and_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with journaled(tmp_path) as server:
        batch = create(server.http, jsonl(line(0), line(1)))
        assert disk.refused.wait(60)
        # Whoever waits has the answer at once.
        assert server.http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        wait_until(lambda: len(server.pool.submits) == 3)
        assert batch_now(server.http, batch["id"])["request_counts"]["completed"] == 0
        disk.full = False
        wait_until(lambda: batch_now(server.http, batch["id"])["status"] == "completed")
        assert len(server.pool.submits) == 3


def test_what_a_full_disk_has_not_kept_is_computed_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with journaled(tmp_path) as server:
        batch = create(server.http, jsonl(line(0)))
        assert disk.refused.wait(60)
    disk.full = False
    with journaled(tmp_path) as server:
        wait_until(lambda: batch_now(server.http, batch["id"])["status"] == "completed")
        assert len(server.pool.submits) == 1


def test_a_response_in_the_background_is_kept_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with journaled(tmp_path) as server:
        made = server.http.post("/v1/responses", json={"input": "Hi", "background": True})
        assert made.status_code == 200, made.text
        assert disk.refused.wait(60)
        assert server.gateway.journaling.journal.size.unfinished == 1
        disk.full = False
        wait_until(lambda: server.gateway.journaling.journal.size.unfinished == 0)
        assert len(server.pool.submits) == 1
