"""A batch that is cancelled, or past its window: what is computed of it is aborted, what had ended stays."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from phalanx.serving.gateway.durable import batches, open_request, recovery
from phalanx.serving.journal.entries import Request
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.journal.journaled import COMPLETIONS, Journaled, batch_now, create, journaled, jsonl, line

AT_ONCE = 4  # a part of max_open_requests
LINES = [
    line(number, body={"prompt": f"Number {number}", "max_tokens": 1 if number == 0 else 500}) for number in range(9)
]


def started(server: Journaled, batch: Any) -> None:
    """Wait until the first line of a batch has ended, and as many as may be are computed."""
    wait_until(lambda: batch_now(server.http, batch["id"])["request_counts"]["completed"] == 1)
    wait_until(lambda: len(server.pool.submits) == 1 + AT_ONCE)


def slow(server: Journaled) -> Any:
    """A batch of which one line ends soon, and no other does."""
    server.pool.answer, server.pool.token_s = "a" * 1000, 0.2
    return create(server.http, jsonl(*LINES))


def output(server: Journaled, batch: Any) -> list[str]:
    content = server.http.get(f"/v1/files/{batch['output_file_id']}/content").text
    return [json.loads(each)["custom_id"] for each in content.splitlines()]


def test_cancelling_a_batch_aborts_what_is_computed_and_keeps_what_has_ended(tmp_path: Path) -> None:
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        batch = slow(server)
        started(server, batch)
        cancelled = server.http.post(f"/v1/batches/{batch['id']}/cancel").json()
        assert (cancelled["status"], cancelled["cancelled_at"]) == ("cancelling", None)
        assert all(ticket.aborted.wait(60) for ticket in server.pool.tickets[1:])

        wait_until(lambda: batch_now(server.http, batch["id"])["status"] == "cancelled")
        ended = batch_now(server.http, batch["id"])
        assert ended["request_counts"] == {"total": 9, "completed": 1, "failed": 0}
        assert ended["cancelling_at"] <= ended["cancelled_at"]
        assert (output(server, ended), ended["error_file_id"]) == (["line 0"], None)
        again = server.http.post(f"/v1/batches/{batch['id']}/cancel").json()
        assert again == ended

        # Nothing of it is begun later, and others are computed.
        wait_until(lambda: server.open_requests == 0)
        server.pool.token_s = 0.0
        assert server.http.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
        other = create(server.http, jsonl(line()))
        wait_until(lambda: batch_now(server.http, other["id"])["status"] == "completed")
        assert len(server.pool.submits) == 1 + AT_ONCE + 2
        assert server.gateway.journaling.journal.size.unfinished == 0


def test_a_batch_whose_cancelling_was_interrupted_is_cancelled_after_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.get_running_loop().create_future()

    with monkeypatch.context() as patch:
        patch.setattr(recovery.Recovery, "abort", hang)
        with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
            batch = slow(server)
            started(server, batch)
            for _ in range(2):
                cancelled = server.http.post(f"/v1/batches/{batch['id']}/cancel").json()
                assert cancelled["status"] == "cancelling"
            assert batch_now(server.http, batch["id"])["status"] == "cancelling"
    with journaled(tmp_path) as server:
        ended = batch_now(server.http, batch["id"])
        assert (ended["status"], ended["cancelled_at"]) == ("cancelled", ended["cancelling_at"])
        assert (ended["request_counts"]["completed"], output(server, ended)) == (1, ["line 0"])
        assert server.pool.submits == []


def test_a_line_that_has_just_ended_stays_though_its_batch_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = open_request.OpenRequest.finish

    async def finish_and_go_on(opened: open_request.OpenRequest, status: int, answer: bytes) -> bool:
        kept = await finish(opened, status, answer)
        await asyncio.get_running_loop().create_future()
        return kept

    monkeypatch.setattr(open_request.OpenRequest, "finish", finish_and_go_on)
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        batch = slow(server)
        wait_until(lambda: batch_now(server.http, batch["id"])["request_counts"]["completed"] == 1)
        server.http.post(f"/v1/batches/{batch['id']}/cancel")
        wait_until(lambda: batch_now(server.http, batch["id"])["status"] == "cancelled")
        ended = batch_now(server.http, batch["id"])
        assert (ended["request_counts"]["completed"], output(server, ended)) == (1, ["line 0"])


def test_a_batch_past_its_window_is_aborted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW_S", -1)
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        batch = slow(server)
        started(server, batch)
        asyncio.run_coroutine_threadsafe(server.gateway.journaling.batches.prune(), server.loop).result(60)
        assert all(ticket.aborted.wait(60) for ticket in server.pool.tickets[1:])
        ended = batch_now(server.http, batch["id"])
        assert (ended["status"], ended["request_counts"]) == ("expired", {"total": 9, "completed": 1, "failed": 8})
        assert ended["expired_at"] >= ended["created_at"]
        assert output(server, ended) == ["line 0"]
        assert server.gateway.journaling.journal.size.unfinished == 0


def test_the_lines_that_an_expired_batch_did_not_reach_stand_in_its_error_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "WINDOW_S", -1)
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        batch = slow(server)
        started(server, batch)
        before = server.kept_bytes
        asyncio.run_coroutine_threadsafe(server.gateway.journaling.batches.prune(), server.loop).result(60)
        assert server.kept_bytes < before
    with journaled(tmp_path) as server:
        ended = batch_now(server.http, batch["id"])
        lines = server.http.get(f"/v1/files/{ended['error_file_id']}/content").text.splitlines()
        found = [json.loads(each) for each in lines]
        assert [each["custom_id"] for each in found] == [f"line {number}" for number in range(1, 9)]
        assert all((each["response"], each["error"]["code"]) == (None, "batch_expired") for each in found)

        # As after any end: it cannot be cancelled, its lines can be asked for one by one, and it is forgotten whole.
        assert server.http.post(f"/v1/batches/{batch['id']}/cancel").json() == ended
        name = found[0]["id"].removeprefix("batch_req_")
        response = server.http.get(f"/v1/requests/{name}").json()["response"]
        assert (response["status_code"], response["body"]["error"]["code"]) == (504, "batch_expired")
        assert server.pool.submits == []
        journal = server.gateway.journaling.journal
        assert (journal.size.unfinished, journal.size.finished) == (0, 9)
        journal.keep_s = -2.0
        asyncio.run_coroutine_threadsafe(server.gateway.journaling.batches.prune(), server.loop).result(60)
        assert (server.kept_bytes, journal.size.finished) == (0, 0)


def test_a_batch_is_told_as_expired_as_soon_as_one_of_its_lines_is(tmp_path: Path) -> None:
    # What is told of a batch is read before its lines are counted: it may expire in between.
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        batch = slow(server)
        started(server, batch)
        assert server.gateway.journaling.journal.expire_batch(batch["id"]).result() == 8
        assert batch_now(server.http, batch["id"])["status"] == "expired"


def test_files_and_batches_are_forgotten_in_time(tmp_path: Path) -> None:
    with journaled(tmp_path, max_open_requests=4 * AT_ONCE) as server:
        done, running = create(server.http, jsonl(line())), slow(server)
        wait_until(lambda: batch_now(server.http, done["id"]).get("status") == "completed")
        server.gateway.journaling.journal.keep_s = -2.0  # as if so many seconds had passed
        asyncio.run_coroutine_threadsafe(server.gateway.journaling.batches.prune(), server.loop).result(60)
        assert [each["id"] for each in server.http.get("/v1/batches").json()["data"]] == [running["id"]]
        assert server.http.get("/v1/files").json()["data"] == []
        assert batch_now(server.http, running["id"])["status"] == "in_progress"


def test_what_is_given_up_is_not_begun_meanwhile(tmp_path: Path) -> None:
    with journaled(tmp_path) as server:
        requests = server.gateway.journaling.requests
        requests.journal.accept([Request("r0", COMPLETIONS, body=b"{}")]).result()
        entry = requests.journal.by_id("r0").result()

        async def both() -> list[Any]:
            return await asyncio.gather(requests.give_up("r0"), requests.opened(entry))

        assert asyncio.run_coroutine_threadsafe(both(), server.loop).result(60) == [True, None]
        assert requests.journal.by_id("r0").result() is None
