"""A gateway with a journal: killed in mid-work and started again, it answers every accepted request once."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from phalanx.engine.protocol.messages import Completion, Delta, Finished, Timings, Usage
from phalanx.serving.gateway.durable.recovery import MOST_ATTEMPTS
from phalanx.serving.journal.entries import Request
from phalanx.serving.journal.journal import Journal
from phalanx.tests.serving.fake_engine import address
from phalanx.tests.serving.journal.gate import (
    COMPLETION,
    KEYS,
    PATHS,
    PATIENCE_S,
    Gate,
    client,
    gateway,
    kill,
    until,
    whole,
)
from phalanx.tests.serving.servers import running


def ask_all(threads: ThreadPoolExecutor, http: httpx.Client, who: str) -> list[Future[Any]]:
    """Send a request of each kind, with a key, and one without."""

    def ask(path: str, headers: dict[str, str]) -> None:
        with contextlib.suppress(httpx.TransportError):  # the gateway is killed
            http.post(path, json=PATHS[path], headers=headers)

    names = {path: {"Idempotency-Key": f"k{path}", "X-Request-Id": f"{who}{path[4:7]}"} for path in PATHS}
    keyed = [threads.submit(ask, path, headers) for path, headers in names.items()]
    return [*keyed, threads.submit(ask, "/v1/completions", {"X-Request-Id": f"{who}-alone"})]


def test_every_kind_of_request_is_completed_once_after_a_kill(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with (
        ThreadPoolExecutor(16) as threads,
        gateway(tmp_path, keys=True) as server,
        client(server, "ann") as ann,
        client(server, "bob") as bob,
    ):
        asked = [*ask_all(threads, ann, "ann"), *ask_all(threads, bob, "bob")]
        background = ann.post("/v1/responses", json={"model": "fake", "input": "Hi", "background": True}).json()
        assert background["status"] in ("queued", "in_progress")
        until(lambda: len(gate.engine.requests) == 13)
        kill(server)
        for each in asked:
            each.result()

    seeds = sorted(submit.sampling.seed or 0 for submit in gate.engine.requests)
    assert len(set(seeds)) == 13
    gate.open = True
    with gateway(tmp_path, keys=True) as server, client(server, "ann") as ann, client(server, "bob") as bob:
        until(lambda: len(gate.finished) == 13)
        for http, who in ((ann, "ann"), (bob, "bob")):
            for path, body in PATHS.items():
                headers = {"Idempotency-Key": f"k{path}"}
                first, second = (http.post(path, json=body, headers=headers) for _ in range(2))
                assert first.status_code == 200
                assert first.content == second.content
                assert second.headers["idempotency-replayed"] == "true"
                assert second.headers["x-request-id"] == f"{who}{path[4:7]}"
            alone = http.get(f"/v1/requests/{who}-alone").json()
            assert (alone["status"], alone["response"]["status_code"]) == ("completed", 200)
            assert "seed" in alone["response"]["body"]["choices"][0]["text"]
        assert bob.get("/v1/requests/ann-alone").status_code == 404
        until(lambda: ann.get(f"/v1/responses/{background['id']}").json()["status"] == "completed")
        assert bob.get(f"/v1/responses/{background['id']}").status_code == 404
    # Once each, and each with the seed of before.
    assert sorted(submit.sampling.seed or 0 for submit in gate.finished) == seeds
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("journal*"))
    assert not any(key.encode() in stored for key in KEYS.values())

    # Nothing is left over for a third one; what is kept is there.
    with gateway(tmp_path, keys=True) as server, client(server, "ann") as ann:
        assert ann.get("/v1/requests/ann-alone").json()["status"] == "completed"
        follow_up = {"model": "fake", "input": "And?", "previous_response_id": background["id"]}
        assert ann.post("/v1/responses", json=follow_up).status_code == 200
    assert len(gate.finished) == 14


def test_a_key_is_for_one_body_and_one_running_request(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    headers = {"Idempotency-Key": "k"}
    with ThreadPoolExecutor(4) as threads, gateway(tmp_path) as server, client(server) as http:
        both = [threads.submit(http.post, "/v1/completions", json=COMPLETION, headers=headers) for _ in range(2)]
        until(lambda: len(gate.engine.requests) == 1)
        for path, body in (("/v1/completions", {**COMPLETION, "max_tokens": 5}), ("/v1/chat/completions", COMPLETION)):
            refused = http.post(path, json=body, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_reused")
        # A caller that goes away comes back for the same answer.
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=COMPLETION, headers=headers, timeout=0.2)
        gate.engine.send(*whole(gate.engine.requests[0])[1:])
        assert len({answer.result().content for answer in both}) == 1
        assert http.post("/v1/completions", json=COMPLETION, headers=headers).content == both[0].result().content
        assert len(gate.engine.requests) == 1
        late = http.post("/v1/completions", json={**COMPLETION, "max_tokens": 5}, headers=headers)
        assert late.status_code == 409
        gate.open = True
        bad = http.post("/v1/completions", json=COMPLETION, headers={"Idempotency-Key": "a b"})
        assert bad.status_code == 400
        refused = http.post("/v1/completions", json={**COMPLETION, "max_tokens": -1}, headers={"Idempotency-Key": "n"})
        assert refused.status_code == 400
        # What was refused was not accepted: the key is free.
        assert http.post("/v1/completions", json=COMPLETION, headers={"Idempotency-Key": "n"}).status_code == 200


@pytest.mark.slow
def test_a_caller_without_a_key_that_goes_away_gives_its_request_up(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with gateway(tmp_path) as server, client(server) as http:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=COMPLETION, headers={"X-Request-Id": "gone"}, timeout=0.3)
        until(lambda: len(gate.engine.aborted) == 1)
        until(lambda: http.get("/v1/requests/gone").status_code == 404)
        assert http.get("/load").json()["server_load"] == 0


@pytest.mark.slow
def test_what_a_signal_interrupts_stays_for_the_next_start(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with ThreadPoolExecutor(1) as threads, gateway(tmp_path, "drain_timeout_s=0.2") as server, client(server) as http:
        asked = threads.submit(http.post, "/v1/completions", json=COMPLETION, headers={"X-Request-Id": "mine"})
        background = http.post("/v1/responses", json={"model": "fake", "input": "Hi", "background": True}).json()
        until(lambda: len(gate.engine.requests) == 2)
        server.signal(signal.SIGTERM)
        assert asked.result().status_code == 503
        assert server.wait() == 128 + signal.SIGTERM
    gate.open = True
    with gateway(tmp_path) as server, client(server) as http:
        until(lambda: http.get("/v1/requests/mine").json()["status"] == "completed")
        until(lambda: http.get(f"/v1/responses/{background['id']}").json()["status"] == "completed")
    assert len(gate.finished) == 2


@pytest.mark.slow
def test_long_answers_go_on_from_the_tokens_that_were_noted(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with ThreadPoolExecutor(1) as threads, gateway(tmp_path) as server, client(server) as http:
        asked = threads.submit(http.post, "/v1/completions", json=COMPLETION, headers={"X-Request-Id": "long"})
        until(lambda: len(gate.engine.requests) == 1)
        first = gate.engine.requests[0]
        gate.engine.send(Delta(first.id, 0, "one", [1]))
        time.sleep(1.2)
        gate.engine.send(Delta(first.id, 0, " two", [2], position=1))
        time.sleep(0.5)
        kill(server)
        assert isinstance(asked.exception(), httpx.TransportError)

    with gateway(tmp_path) as server, client(server) as http:
        until(lambda: len(gate.engine.requests) == 2)
        second = gate.engine.requests[1]
        assert second.resume is not None
        assert [each.token_ids for each in second.resume.completions] == [[1, 2]]
        assert second.sampling == first.sampling
        end = Finished(second.id, [Completion(0, "stop")], Usage(3, 3), Timings(0.1, 0.2, 5.0, 0.5))
        gate.engine.send(Delta(second.id, 0, " three", [3], position=2), end)
        until(lambda: http.get("/v1/requests/long").json()["status"] == "completed")
        body = http.get("/v1/requests/long").json()["response"]["body"]
        assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == ("one two three", 3)


def test_the_journal_is_checked_at_the_door(gate: Gate, tmp_path: Path) -> None:
    with gateway(tmp_path) as server:
        with running("gateway", f"engines=[{address(tmp_path)}]", "port=0", f"journal={tmp_path}/journal") as second:
            assert second.process.wait(PATIENCE_S) != 0
        assert f"in use by process {server.process.pid}" in second.text
        assert not server.has_torch
        with client(server) as http:
            assert http.get("/v1/requests/none").status_code == 404


@pytest.mark.slow
def test_a_full_journal_refuses_with_its_setting(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    long = {"model": "fake", "prompt": "x" * 600_000, "max_tokens": 4}
    small = ("journal_max_mb=1", "max_body_bytes=1000000", "max_open_body_bytes=4000000", "max_file_bytes=500000")
    with ThreadPoolExecutor(1) as threads, gateway(tmp_path, *small) as server, client(server) as http:
        first = threads.submit(http.post, "/v1/completions", json=long)
        until(lambda: len(gate.engine.requests) == 1)
        refused = http.post("/v1/completions", json=long)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "journal_full")
        assert "journal_max_mb" in error["message"]
        assert refused.headers["retry-after"]
        gate.engine.send(*whole(gate.engine.requests[0])[1:])
        assert first.result().status_code == 200
        gate.open = True
        assert http.post("/v1/completions", json=long).status_code == 200


def test_streams_are_not_journaled(gate: Gate, tmp_path: Path) -> None:
    with gateway(tmp_path) as server, client(server) as http:
        streamed = http.post("/v1/completions", json={**COMPLETION, "stream": True}, headers={"X-Request-Id": "s"})
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert json.loads(streamed.text.split("\n")[0][6:])["choices"][0]["text"].startswith("seed None")
        assert http.get("/v1/requests/s").status_code == 404


@pytest.mark.slow
def test_a_request_over_which_processes_die_again_and_again_is_given_up(gate: Gate, tmp_path: Path) -> None:
    body = json.dumps(COMPLETION).encode()
    with contextlib.closing(Journal(f"{tmp_path}/journal", "gateway", max_bytes=2**20, keep_s=60)) as journal:
        numbers = journal.accept([Request(name, "/v1/completions", name=name, body=body) for name in "ab"]).result()
        for _ in range(MOST_ATTEMPTS):
            journal.attempt(numbers[0]).result()
    with gateway(tmp_path) as server, client(server) as http:
        for name, status in (("a", 500), ("b", 200)):
            until(lambda name=name: http.get(f"/v1/requests/{name}").json()["status"] == "completed")  # type: ignore[misc]
            assert http.get(f"/v1/requests/{name}").json()["response"]["status_code"] == status
        metrics = http.get("/metrics").text
        assert 'phalanx:journal_requests{state="finished"} 2.0' in metrics
        assert "phalanx:journal_requests_recovered_total 1.0" in metrics
    assert len(gate.finished) == 1


@pytest.mark.slow
def test_a_request_that_cannot_be_taken_up_again_ends_with_an_error(gate: Gate, tmp_path: Path) -> None:
    with contextlib.closing(Journal(f"{tmp_path}/journal", "gateway", max_bytes=2**20, keep_s=60)) as journal:
        journal.accept([Request("a", "/v1/of_another_version", name="a", body=b"{}")]).result()
    with gateway(tmp_path) as server, client(server) as http:
        until(lambda: http.get("/v1/requests/a").json()["status"] == "completed")
        assert http.get("/v1/requests/a").json()["response"]["status_code"] == 500


@pytest.mark.slow
def test_a_response_that_waits_for_its_turn_can_be_cancelled(gate: Gate, tmp_path: Path) -> None:
    gate.open = False
    with gateway(tmp_path) as server, client(server) as http:
        body = {"model": "fake", "input": "Hi", "background": True}
        first, second = (http.post("/v1/responses", json=body).json()["id"] for _ in range(2))
        until(lambda: len(gate.engine.requests) == 2)  # they are answered before the engine has them
        kill(server)
    with gateway(tmp_path, "max_open_requests=4") as server, client(server) as http:  # one of them has its turn
        until(lambda: len(gate.engine.requests) == 3)
        for each in (first, second):
            assert http.post(f"/v1/responses/{each}/cancel").json()["status"] == "cancelled"
        assert http.delete(f"/v1/responses/{first}").status_code == 200
    with gateway(tmp_path) as server, client(server) as http:
        assert http.get(f"/v1/responses/{first}").status_code == 404
        assert http.get(f"/v1/responses/{second}").json()["status"] == "cancelled"
    assert gate.finished == []
