"""Streams that are silent, slow, late or left: nothing stays behind, and nobody waits in vain."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from phalanx.engine.protocol.messages import Accepted, Completion, Delta, Finished, Submit, Timings, Usage
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.generation.admission import Admission
from phalanx.serving.gateway.generation.bridge import EventBridge
from phalanx.serving.gateway.generation.generation import Generation, Limits
from phalanx.serving.gateway.http.errors import ApiError
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import ScriptedTicket, wait_until
from phalanx.tests.serving.gateway.test_chat import events

CHAT, HELLO = "/v1/chat/completions", [{"role": "user", "content": "Hi"}]
Make = Callable[[GatewayConfig], Server]


def all_aborted(server: Server, count: int = 1) -> bool:
    tickets = server.pool.tickets
    return len(tickets) == count and all(ticket.aborted.is_set() for ticket in tickets) and not server.open_requests


def test_a_silent_stream_gets_comments(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig(keep_alive_s=0.05))
    server.pool.go_on.clear()
    server.pool.answer = "ab"
    text = ""
    with server.http.stream("POST", CHAT, json={"messages": HELLO, "stream": True}) as answer:
        for piece in answer.iter_text():
            text += piece
            if text.count(": keep-alive\n\n") >= 3:
                server.pool.go_on.set()
    assert text.startswith(3 * ": keep-alive\n\n")
    *chunks, done = events(text)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "ab"
    assert done == "[DONE]"


@pytest.mark.parametrize("wait", ["start_s", "token_s"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_leaves_ends_its_request(make_gateway: Make, wait: str, streamed: bool) -> None:
    server = make_gateway(GatewayConfig())
    setattr(server.pool, wait, 30.0)
    server.send_and_leave(CHAT, {"messages": HELLO, "stream": streamed})
    wait_until(lambda: all_aborted(server))


def test_every_prompt_of_a_client_that_leaves_is_ended(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig())
    server.pool.token_s = 30.0
    server.send_and_leave("/v1/completions", {"prompt": ["a", "b", "c"]})
    wait_until(lambda: all_aborted(server, 3))


@pytest.mark.parametrize("given", [{"timeout": 0.3}, {}])
def test_a_request_over_its_deadline_is_ended(make_gateway: Make, given: dict[str, Any]) -> None:
    server = make_gateway(GatewayConfig(request_timeout_s=20.0 if given else 0.3))
    server.pool.start_s = 30.0
    answer = server.http.post(CHAT, json={"messages": HELLO, **given})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    wait_until(lambda: all_aborted(server))


def test_a_stream_over_its_deadline_ends_with_an_error(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig())
    server.pool.token_s = 30.0
    text = server.http.post(CHAT, json={"messages": HELLO, "stream": True, "timeout": 2.0}).text
    *_, error, done = events(text)
    assert (error["error"]["code"], done) == ("request_timeout", "[DONE]")
    wait_until(lambda: all_aborted(server))


def test_a_full_gateway_refuses_at_once_and_others_go_on(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig(max_open_requests=1))
    server.pool.go_on.clear()
    answers: list[httpx.Response] = []
    first = threading.Thread(target=lambda: answers.append(server.http.post(CHAT, json={"messages": HELLO})))
    first.start()
    wait_until(lambda: server.open_requests == 1)
    refused = httpx.post(server.url + CHAT, json={"messages": HELLO}, timeout=20)
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    server.pool.go_on.set()
    first.join()
    assert answers[0].json()["choices"][0]["message"]["content"] == "Hello world"


def test_the_time_to_come_again_is_of_the_measured_rate() -> None:
    now = 0.0
    admission = Admission(GatewayConfig(max_open_requests=1), clock=lambda: now)
    for _ in range(200):
        admission.enter(1, 1)
        now += 5.0
        admission.leave(1, 1)
    assert admission.retry_after(1) in (4, 5, 6)
    assert admission.retry_after(1000) == 60


@pytest.fixture
def connection(make_gateway: Make) -> Iterator[tuple[Server, socket.socket]]:
    server = make_gateway(GatewayConfig(body_timeout_s=0.5, max_stream_bytes=20_000))
    with socket.create_connection(("127.0.0.1", server.port)) as connected:
        connected.settimeout(20)
        yield server, connected


def read_all(connected: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connected.recv(65536):
            data += piece
    return data


def test_a_body_that_comes_byte_by_byte_is_408(connection: tuple[Server, socket.socket]) -> None:
    server, connected = connection
    connected.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                connected.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    answer = read_all(connected)
    stop.set()
    thread.join()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer
    assert server.http.get("/health").status_code == 200


def test_a_head_of_a_megabyte_is_431(connection: tuple[Server, socket.socket]) -> None:
    server, connected = connection
    with contextlib.suppress(OSError):
        connected.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 1_000_000 + b"\r\n\r\n")
    answer = read_all(connected)
    assert answer.startswith(b"HTTP/1.1 431")
    assert server.http.get("/health").status_code == 200


def test_a_head_that_does_not_end_is_408(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig(head_timeout_s=0.3))
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.settimeout(20)
        slow.sendall(b"GET /health HTTP/1.1\r\nHost:")
        assert read_all(slow).startswith(b"HTTP/1.1 408")


def test_what_is_no_http_is_a_400_as_any_other(connection: tuple[Server, socket.socket]) -> None:
    _, connected = connection
    connected.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
    answer = read_all(connected)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"invalid_http"' in answer


def test_every_answer_tells_its_date(connection: tuple[Server, socket.socket]) -> None:
    server, connected = connection
    connected.sendall(b"no http")
    raw = read_all(connected).partition(b"\r\n\r\n")[0].decode()
    answers = [server.http.get(path).headers for path in ("/health", "/v1/models", "/nowhere")]
    answers.append(server.http.post("/v1/completions", json={"prompt": "Hi", "stream": True}).headers)
    answers.append(httpx.Headers([line.split(": ", 1) for line in raw.split("\r\n")[1:]]))  # type: ignore[misc]
    for headers in answers:
        (date,) = headers.get_list("date")
        assert abs(email.utils.parsedate_to_datetime(date).timestamp() - time.time()) < 5


def test_a_connection_serves_many_requests(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connected:
        for _ in range(200):  # more bytes of heads than one head may have
            connected.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Fill: " + b"a" * 500 + b"\r\n\r\n")
            answer = b""
            while b"ready" not in answer:
                answer += connected.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")


class _Pool:
    """Gives the test its requests' receivers."""

    def __init__(self) -> None:
        self.sinks: list[Any] = []
        self.tickets: list[ScriptedTicket] = []

    def submit(self, submit: Submit, on_event: Any, *, affinity: bytes = b"") -> ScriptedTicket:
        self.sinks.append(on_event)
        self.tickets.append(ScriptedTicket())
        return self.tickets[-1]


def _delta(place: int, text: str = "x", index: int = 0) -> Delta:
    return Delta("a", index, text, [place], None, place)


async def _generation(pool: _Pool, pending_bytes: int) -> Generation:
    bridge, admission = EventBridge(asyncio.get_running_loop()), Admission(GatewayConfig())
    limits = Limits(pending_bytes, "read faster", 10.0)
    generation = Generation(pool, bridge, admission, limits, "a")  # type: ignore[arg-type]
    generation.admit(1, 1)
    await generation.start([Submit(id="a", prompt="x")])
    return generation


def test_deltas_that_nobody_has_taken_become_one() -> None:
    async def run() -> None:
        pool = _Pool()
        generation = await _generation(pool, 100_000)
        pool.sinks[0](Accepted(id="a", prompt_tokens=1, seed=1, max_tokens=9))
        for place in range(500):
            pool.sinks[0](_delta(place, index=place % 2))
        done = Finished("a", [Completion(0, "stop")], Usage(1, 500), Timings(0, 0, 0, 0))
        pool.sinks[0](done)
        await asyncio.sleep(0)
        accepted, first, second, finished = [event for _, event in await generation.take()]
        assert isinstance(accepted, Accepted)
        assert first == Delta("a", 0, "x" * 250, list(range(0, 500, 2)), None, 0)
        assert second == Delta("a", 1, "x" * 250, list(range(1, 500, 2)), None, 1)
        assert finished == done
        assert generation.finished

    asyncio.run(run())


def test_an_event_that_cannot_be_taken_in_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a fault of the gateway's own")

    async def run() -> None:
        pool = _Pool()
        generation = await _generation(pool, 10_000)
        monkeypatch.setattr(Generation, "_push", broken)
        pool.sinks[0](_delta(0))
        with pytest.raises(ZeroDivisionError):
            await generation.take()
        assert pool.tickets[0].aborted.is_set()

    asyncio.run(run())


def test_a_slow_reader_is_ended_before_its_answer_fills_the_memory() -> None:
    async def run() -> None:
        pool = _Pool()
        generation = await _generation(pool, 10_000)
        for place in range(10):
            pool.sinks[0](_delta(place, "y" * 4000))
        await asyncio.sleep(0)
        assert pool.tickets[0].aborted.is_set()
        with pytest.raises(ApiError, match="read faster"):
            await generation.take()

    asyncio.run(run())


def test_the_loop_is_woken_once_for_a_batch() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        woken = []

        class Counting:
            def call_soon_threadsafe(self, callback: Any) -> None:
                woken.append(callback)
                loop.call_soon_threadsafe(callback)

        bridge, got = EventBridge(Counting()), []  # type: ignore[arg-type, var-annotated]
        thread = threading.Thread(target=lambda: [bridge.deliver(got.append, _delta(place)) for place in range(100)])
        thread.start()
        thread.join()
        await asyncio.sleep(0.01)
        assert len(woken) == 1
        assert [event.position for event in got] == list(range(100))
        bridge.deliver(got.append, _delta(100))
        await asyncio.sleep(0.01)
        assert (len(woken), len(got)) == (2, 101)

    asyncio.run(run())


def test_many_clients_that_leave_at_any_time_leave_nothing_behind(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig())
    server.pool.token_s = 0.02

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        body = {"messages": HELLO, "stream": number % 2 == 0}
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(client.post(CHAT, json=body), 0.01 + number % 17 / 60)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            await asyncio.gather(*(leave(client, number) for number in range(60)))

    asyncio.run(run())
    wait_until(lambda: not server.open_requests)
    server.pool.join()
    assert server.http.post(CHAT, json={"messages": HELLO}).status_code == 200


@pytest.mark.slow
def test_a_thousand_connections_are_each_answered_refused_or_left(make_gateway: Make) -> None:
    server = make_gateway(GatewayConfig(max_open_requests=600))
    server.pool.token_s = 0.05
    statuses: list[int] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        body = {"messages": HELLO, "stream": number % 2 == 0}
        with contextlib.suppress(asyncio.TimeoutError):
            answer = await asyncio.wait_for(client.post(CHAT, json=body), 0.5 if number % 10 == 0 else 300)
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                assert "[DONE]" in answer.text or "Hello world" in answer.text
            else:
                assert int(answer.headers["retry-after"]) >= 1

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            await asyncio.gather(*(ask(client, number) for number in range(1000)))

    asyncio.run(run())
    assert set(statuses) <= {200, 429}
    assert len(statuses) >= 900
    wait_until(lambda: not server.open_requests)
