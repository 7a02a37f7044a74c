"""The id of a request, in every answer and on every way to one; and paths with a slash too many."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from phalanx.serving.gateway.auth import Auth, AuthConfig
from phalanx.serving.gateway.logs import AccessLog, JsonFormatter
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.journal.journaled import journaled
from starlette.middleware import Middleware

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 2}
ROUTES = [
    *(("GET", path) for path in ("/v1/models", "/v1/models/none", "/version", "/load", "/health", "/nowhere", "/")),
    *(("GET", path) for path in ("/v1/responses/none", "/v1/files", "/v1/requests/none", "/openapi.json")),
    *(("GET", "/v1/messages"), ("DELETE", COMPLETIONS), ("POST", "/v1/responses/none/cancel")),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_answer_has_the_callers_request_id(server: Server, method: str, path: str) -> None:
    answer = server.http.request(method, path, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    if path == "/v1/messages":
        assert answer.json()["request_id"] == answer.headers["request-id"] == "mine"
    other = server.http.request(method, path, headers={"x-request-id": "two words"})
    assert (other.status_code, len(other.headers["x-request-id"])) == (answer.status_code, 32)


@pytest.mark.parametrize("logged", [False, True])
def test_who_has_no_key_is_told_the_request_id_too(logged: bool) -> None:
    auth = Middleware(Auth, config=AuthConfig(api_key="sk-first-key"))
    server = Server(middleware=[*([Middleware(AccessLog)] if logged else []), auth])
    try:
        for given in ({}, {"x-request-id": "mine"}):
            answer = httpx.post(f"{server.url}/v1/messages", json={}, headers=given, timeout=60)
            assert answer.status_code == 401
            assert answer.json()["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
            assert answer.headers["x-request-id"] == "mine" or not given
            assert answer.headers["www-authenticate"] == "Bearer"
    finally:
        server.close()


def test_a_request_id_that_cannot_be_is_refused_wherever_it_stands(server: Server, tmp_path: Path) -> None:
    wrong = {**BODY, "request_id": "two\r\nlines: 1"}
    with journaled(tmp_path) as kept:
        for each in (server, kept):
            for headers in ({}, {"x-request-id": "mine"}):
                answer = each.http.post(COMPLETIONS, json=wrong, headers=headers)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")
            answer = each.http.post(COMPLETIONS, json={**BODY, "request_id": "other"}, headers={"x-request-id": "mine"})
            assert answer.json()["id"] == "cmpl-mine"


def test_the_log_names_a_request_whose_client_has_left(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(middleware=[Middleware(AccessLog)])
    server.pool.token_s = 0.05
    server.pool.answer = "long " * 1000
    body = {"prompt": "Hi", "max_tokens": 4000}
    try:
        with caplog.at_level(logging.INFO, "phalanx.gateway.access"):
            server.send_and_leave(COMPLETIONS, {**body, "request_id": "whole"})
            asked = {**body, "request_id": "streamed", "stream": True}
            with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=asked, timeout=60) as answer:
                next(answer.iter_lines())
            wait_until(lambda: len(caplog.records) == 2)
        lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        assert sorted((line["request_id"], line["status"]) for line in lines) == [("streamed", 200), ("whole", 499)]
    finally:
        server.pool.token_s = 0.0
        server.close()


def test_a_body_with_a_byte_order_mark_is_journaled(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps({**BODY, "request_id": "mine"}).encode()
    headers = {"content-type": "application/json", "idempotency-key": "one"}
    with journaled(tmp_path) as server:
        first, second = (server.http.post(COMPLETIONS, content=content, headers=headers) for _ in range(2))
        assert first.json()["id"] == second.json()["id"] == "cmpl-mine"
        assert second.headers["idempotency-replayed"] == "true"
        assert server.http.get("/v1/requests/mine").json()["status"] == "completed"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, BODY),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
        ("/tokenize", {"prompt": "Hi"}),
    ],
)
def test_a_slash_at_the_end_of_a_path_is_one_too_many(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.http.post(f"{path}/", json=body)
    assert (answer.status_code, answer.history) == (200, [])
    refused = server.http.post(f"{path}/", json={})
    assert refused.json() | {"request_id": 0} == server.http.post(path, json={}).json() | {"request_id": 0}
    for other in (f"{path}//", f"/{path}"):
        assert server.http.send(server.http.build_request("POST", server.url + other, json=body)).status_code == 404
    assert server.http.get("/v1/models/").status_code == 404  # a model without a name
