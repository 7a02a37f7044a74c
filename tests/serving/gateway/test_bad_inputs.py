"""Every bad input gets its status and its message, and a stream beside it goes on as if nothing had been."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import inspect
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.http.json_body import read_struct, shown
from phalanx.serving.gateway.schemas.completions import CompletionRequest
from phalanx.tests.serving.gateway.bad_inputs import (
    RAW,
    Case,
    answer_to,
    extreme_cases,
    operations,
    wrong_cases,
)
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.nested_inputs import nested_cases
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.servers import running

FIELDS = {"message", "type", "param", "code"}
NEIGHBOUR = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


class Neighbour:
    """A stream that is read while others send what they should not."""

    def __init__(self, url: str) -> None:
        self._ended = threading.Event()
        self.texts: list[str] = []
        """The whole answers that were read."""
        self.chunks = 0
        self._http = httpx.Client(base_url=url, timeout=60)
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        self._http.close()

    def _read(self) -> None:
        while not self._ended.is_set():
            pieces, done = [], False
            with self._http.stream("POST", "/v1/completions", json={**NEIGHBOUR, "stream": True}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        (choice,) = json.loads(line[6:])["choices"]
                        pieces.append(choice["text"])
                        self.chunks += 1
                    done = done or line == "data: [DONE]"
            assert done
            self.texts.append("".join(pieces))


def check_refused(http: httpx.Client, case: Case) -> None:
    answer = http.post(case.path, json=case.body)
    assert answer.status_code == 400, f"{case}: {answer.text[:300]}"
    error = answer.json()["error"]
    assert 0 < len(error["message"]) < 600, f"{case}: {error}"
    if case.path.startswith("/v1/messages"):
        assert (set(error), error["type"]) == ({"message", "type"}, "invalid_request_error")
        assert case.field in error["message"], f"{case}: {error}"
        return
    assert set(error) == FIELDS
    assert error["param"].startswith(case.field), f"{case}: {error}"


def check_no_fault(http: httpx.Client, case: Case) -> None:
    answer = http.post(case.path, json=case.body)
    # Some fields name what is stored, and nothing is.
    missing = (404,) if case.field == "previous_response_id" else ()
    assert answer.status_code in (200, 400, *missing), f"{case}: {answer.text[:300]}"


def check_raw(port: int, name: str) -> None:
    data, statuses = RAW[name]
    status, body = answer_to(port, data)
    assert status in statuses, (name, status, body[:300])
    if status >= 400:
        error = json.loads(body)["error"]
        assert set(error) == ({"message", "type"} if b" /v1/messages" in data[:40] else FIELDS), name
        assert error["message"]


@pytest.fixture(scope="module")
def bounded() -> Iterator[Server]:
    server = Server(GatewayConfig(head_timeout_s=0.5, body_timeout_s=0.5))
    server.pool.answer = "one two three " * 30
    server.pool.token_s = 0.002
    yield server
    server.close()


@pytest.fixture(scope="module")
def stream(bounded: Server) -> Iterator[Neighbour]:
    with Neighbour(bounded.url) as reading:
        yield reading
    assert reading.texts
    assert set(reading.texts) == {bounded.pool.answer[:200]}


@pytest.fixture
def neighbour(stream: Neighbour) -> Iterator[Neighbour]:
    """A stream beside a test, of which more has come once the test is over."""
    yield stream
    before = stream.chunks
    wait_until(lambda: stream.chunks > before + 1)


def test_no_field_of_a_request_is_without_a_wrong_value() -> None:
    tried = {(case.path, case.field) for case in wrong_cases()}
    free = {"chat_template_kwargs", "tools", "metadata"}  # objects of any names
    for operation in operations():
        for field in inspect.type_info(operation.request).fields:  # type: ignore[attr-defined]
            assert (operation.path, field.name) in tried or field.name in free, field.name


def test_every_field_of_a_wrong_type_or_out_of_range_is_named(bounded: Server, neighbour: Neighbour) -> None:
    before = len(bounded.pool.submits)
    for case in wrong_cases():
        check_refused(bounded.http, case)
    others = [submit for submit in bounded.pool.submits[before:] if submit.prompt != NEIGHBOUR["prompt"]]
    assert others == []


def test_every_field_of_what_says_its_type_is_checked_and_named(agent: Server) -> None:
    for case in nested_cases():
        check_refused(agent.http, case)
    assert agent.pool.submits == []


def test_no_value_at_the_end_of_its_range_is_a_fault(bounded: Server, neighbour: Neighbour) -> None:
    for case in extreme_cases():
        check_no_fault(bounded.http, case)


@pytest.mark.parametrize("name", RAW)
def test_what_http_does_not_allow_is_refused_as_everything_else(
    bounded: Server, neighbour: Neighbour, name: str
) -> None:
    check_raw(bounded.port, name)


def test_a_body_may_begin_with_a_byte_order_mark_and_say_that_it_is_not_compressed(
    bounded: Server, neighbour: Neighbour
) -> None:
    for headers in ({}, {"Content-Encoding": "identity"}, {"Content-Encoding": "Identity"}):
        body = b"\xef\xbb\xbf" + json.dumps({"prompt": "Hi", "max_tokens": 1}).encode()
        answer = bounded.http.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 200, answer.text


def test_a_wish_for_another_protocol_changes_neither_a_body_nor_the_requests_behind_it(
    bounded: Server, neighbour: Neighbour
) -> None:
    # Java's HttpClient asks for HTTP/2 so with every request.
    bodies = [json.dumps({"prompt": "Hi", "max_tokens": count}).encode() for count in (1, 2, 3)]
    sent = b"".join(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAAB\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        for body in bodies
    )
    for size in (len(sent), 100, 7):
        with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connected:
            for begin in range(0, len(sent), size):
                connected.sendall(sent[begin : begin + size])
            answers = b""
            while answers.count(b'"completion_tokens":3') == 0 and (piece := connected.recv(65536)):
                answers += piece
        counts = re.findall(rb'"completion_tokens":(\d+)', answers)
        assert (answers.count(b"HTTP/1.1 200 OK"), counts) == (3, [b"1", b"2", b"3"])


def test_trailers_replace_no_field_of_the_head(bounded: Server, neighbour: Neighbour) -> None:
    body = b'{"prompt": "Hi", "max_tokens": 1}'
    sent = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: head\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"21\r\n" + body + b"\r\n0\r\nX-Request-Id: trailer\r\n\r\n"
    )
    assert json.loads(answer_to(bounded.port, sent)[1])["id"] == "cmpl-head"


def test_a_client_of_one_byte_a_second_is_ended(bounded: Server, neighbour: Neighbour) -> None:
    for sent in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as slow:
            slow.sendall(sent)
            slow.settimeout(0.1)
            answer = b""
            for byte in b"POST /v1/completions HTTP/1.1" * 20:
                slow.sendall(bytes([byte]))
                try:
                    answer = slow.recv(65536)
                    break
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 408")


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(bounded: Server, neighbour: Neighbour) -> None:
    body = json.dumps({"prompt": "Hi", "max_tokens": 5, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connected:
        connected.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while piece := connected.recv(65536):
            answer += piece
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")
    assert all(event.startswith(b"data: ") for event in events.rstrip().split(b"\n\n"))


def test_requests_sent_at_once_are_answered_in_order(bounded: Server, neighbour: Neighbour) -> None:
    asked = b"GET /v1/models/%d HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connected:
        connected.sendall(b"".join(asked % number for number in range(50)))
        answer = b""
        while answer.count(b"HTTP/1.1 404") < 50 or not answer.endswith(b"}}"):
            piece = connected.recv(65536)
            assert piece, answer
            answer += piece
    places = [answer.index(b"the model '%d' does" % number) for number in range(50)]
    assert places == sorted(places)


def test_more_requests_at_once_than_a_connection_may_have_end_it(bounded: Server, neighbour: Neighbour) -> None:
    body = json.dumps({**NEIGHBOUR, "stream": True}).encode()
    first = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with socket.create_connection(("127.0.0.1", bounded.port), timeout=20) as connected:
        connected.sendall(first + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        answer = b""
        while piece := connected.recv(65536):
            answer += piece
    assert b"[DONE]" not in answer


def test_more_connections_than_there_may_be_are_503_but_probes(
    make_gateway: Callable[[GatewayConfig], Server],
) -> None:
    server = make_gateway(GatewayConfig(max_connections=4))
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    try:
        answer = httpx.get(f"{server.url}/v1/models", timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_connections")
        assert answer.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        idle += [socket.create_connection(("127.0.0.1", server.port)) for _ in range(64)]
        # Above these not even a head is read.
        status, body = answer_to(server.port, b"")
        assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
    finally:
        for connected in idle:
            connected.close()
    deadline = time.monotonic() + 20
    while httpx.get(f"{server.url}/v1/models", timeout=60).status_code != 200:
        assert time.monotonic() < deadline


def test_bodies_are_held_up_to_a_bound(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(max_body_bytes=10_000, max_open_body_bytes=15_000))
    with socket.create_connection(("127.0.0.1", server.port)) as first:
        first.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\n")
        deadline = time.monotonic() + 20
        while server.app.state.gateway.bodies.held < 9000:
            assert time.monotonic() < deadline
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * 8000}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "max_open_body_bytes" in refused.json()["error"]["message"]
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}, timeout=60).status_code == 200
    while server.app.state.gateway.bodies.held:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("item", ["1", "[]", '"a"', "{}", "1e3", "123456789012345678901", '"\\ud800"'])
def test_a_long_body_of_anything_is_answered_beside_other_requests(
    bounded: Server, neighbour: Neighbour, item: str
) -> None:
    body = f'{{"prompt": [{",".join([item] * (2**20 // (len(item) + 1)))}]}}'
    answer = httpx.post(f"{bounded.url}/v1/completions", content=body, timeout=60)
    assert answer.status_code in (200, 400)
    if answer.status_code == 400:
        assert len(answer.json()["error"]["message"]) < 400


def test_the_loop_goes_on_while_a_long_body_is_parsed() -> None:
    body = b'{"prompt": [' + b",".join([b"12345"] * 400_000) + b"]}"
    turns = 0

    async def main() -> CompletionRequest:
        nonlocal turns
        reading = asyncio.ensure_future(read_struct(body, CompletionRequest))
        while not reading.done():
            turns += 1
            await asyncio.sleep(0)
        return await reading

    request = asyncio.run(main())
    assert request.prompt == [12345] * 400_000
    assert turns > 3  # parsed on the loop: one turn until it begins, and one for the result
    assert gc.isenabled()


@pytest.mark.parametrize(
    "value",
    [
        1, None, "x" * 99, "x" * 1000, [], [1, [2, [3, {"a": {"b": [None]}}]]], {"a": 1, "b": [1.5]}, [0] * 1_000_000,
        {str(number): [] for number in range(1000)}, [["a" * 1000] * 3] * 1000, [[[]] * 100] * 100,
    ],
    ids=range(11),
)  # fmt: skip
def test_a_value_is_shown_up_to_a_bound(value: object) -> None:
    whole = repr(value)
    assert shown(value) == (whole if len(whole) <= 100 else whole[:100] + "...")


@pytest.mark.slow
def test_bad_inputs_beside_a_stream_of_a_real_engine(smollm2: Path) -> None:
    options: tuple[Any, ...] = ("max_model_len=256", "dtype=float32", "head_timeout_s=2", "body_timeout_s=2", "port=0")
    with running("serve", f"model={smollm2}", "ranks=1", *options) as server:
        url = server.url
        undisturbed = httpx.post(f"{url}/v1/completions", json=NEIGHBOUR, timeout=120).json()["choices"][0]["text"]
        with Neighbour(url) as neighbour, httpx.Client(base_url=url, timeout=120) as http:
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(lambda case: check_refused(http, case), wrong_cases()))
                list(threads.map(lambda case: check_no_fault(http, case), extreme_cases()))
            for name in RAW:
                check_raw(int(url.rpartition(":")[2]), name)
        assert neighbour.texts
        assert set(neighbour.texts) == {undisturbed}
        assert "Traceback" not in server.text
