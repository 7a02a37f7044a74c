"""Several requests on one connection, sent before the answers to those before them."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

import pytest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import wait_until

VERSION = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"


def completion(prompt: str = "Hi", **fields: object) -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": 2, **fields}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def all_of(connected: socket.socket) -> bytes:
    """What a server sends until it closes the connection."""
    received = b""
    while piece := connected.recv(65536):
        received += piece
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("behind", [completion(), VERSION, completion("a" * 1000)[:-5], b"GET /ver"])
def test_a_client_that_leaves_ends_what_is_computed_though_others_wait(
    server: Server, behind: bytes, stream: bool
) -> None:
    for apart in (False, True):
        server.pool.__init__(answer="long " * 1000)  # type: ignore[misc]
        server.pool.token_s = 0.01
        with connect(server) as connected:
            if apart:
                connected.sendall(completion(max_tokens=4000, stream=stream))
                wait_until(lambda: len(server.pool.submits) == 1)
                connected.sendall(behind)
                time.sleep(0.1)
            else:
                connected.sendall(completion(max_tokens=4000, stream=stream) + behind)
                wait_until(lambda: len(server.pool.submits) == 1)
        assert server.pool.tickets[0].aborted.wait(60)
        wait_until(lambda: server.open_requests == 0)
        assert len(server.pool.submits) == 1
        server.pool.join()


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: none\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /version HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 500_000, 431),
    ],
)
def test_requests_before_a_bad_one_are_answered(server: Server, bad: bytes, status: int) -> None:
    server.pool.token_s = 0.02
    for before in ([completion()], [VERSION, completion(), completion(stream=True), VERSION]):
        with connect(server) as connected:
            connected.sendall(b"".join(before) + bad + VERSION)
            received = all_of(connected)
        assert statuses(received) == [*[200] * len(before), status]
        error = json.loads(received[received.rindex(b"\r\n\r\n") :])["error"]
        assert error["type"] == "invalid_request_error"


def test_a_head_that_does_not_arrive_ends_nothing_that_is_computed(
    make_gateway: Callable[[GatewayConfig], Server],
) -> None:
    server = make_gateway(GatewayConfig(head_timeout_s=0.2))
    server.pool.token_s = 0.1
    with connect(server) as connected:
        connected.sendall(completion() + VERSION[:10])
        received = all_of(connected)
    assert statuses(received) == [200, 408]


def test_long_bodies_that_wait_are_not_all_read(server: Server) -> None:
    server.pool.token_s = 0.5
    with connect(server) as connected:
        connected.sendall(completion())
        wait_until(lambda: len(server.pool.submits) == 1)
        connected.settimeout(0.3)
        many = completion("a" * 1_000_000) * 40
        with pytest.raises(TimeoutError):
            connected.sendall(many)
        server.pool.token_s = 0.0


def test_what_an_answered_request_still_sends_gets_no_answer_of_its_own(server: Server) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server) as connected:
        connected.sendall(head)
        received = connected.recv(65536)
        connected.sendall(b"zz\r\n")
        received += all_of(connected)
    assert statuses(received) == [404]
