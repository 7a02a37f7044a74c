"""OpenTelemetry: one span for each request, with vLLM's attributes, within the caller's trace."""

from __future__ import annotations

import http.server
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from phalanx.engine.errors import CapacityExceeded, ConfigError, EngineFault
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.tracing import Tracing
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import ScriptedPool, wait_until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0.5}


@pytest.fixture(scope="module")
def traced_server() -> Iterator[tuple[Server, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = Server(pool=ScriptedPool("Hello"))
    server.app.state.gateway.tracing = Tracing(provider)
    yield server, exporter
    server.close()


@pytest.fixture
def traced(traced_server: tuple[Server, InMemorySpanExporter]) -> tuple[Server, Callable[[], list[Any]]]:
    """A server, and what returns the spans of the test's own requests."""
    server, exporter = traced_server
    server.pool.join()
    server.pool.__init__("Hello")
    exporter.clear()
    return server, lambda: list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_the_callers_trace(traced: tuple[Server, Callable[[], list[Any]]], stream: bool) -> None:
    server, spans = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    assert server.http.post("/v1/chat/completions", json={**CHAT, "stream": stream}, headers=headers).is_success
    (span,) = spans()
    assert (span.name, span.kind) == ("llm_request", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT

    found = dict(span.attributes)
    times = {name: found.pop(f"gen_ai.latency.{name}") for name in ("time_in_queue", "time_to_first_token", "e2e")}
    parts = [found.pop(f"gen_ai.latency.time_in_model_{part}") for part in ("prefill", "decode", "inference")]
    assert times["time_in_queue"] + parts[0] == pytest.approx(times["time_to_first_token"])
    assert times["time_in_queue"] + parts[2] == pytest.approx(times["e2e"])
    assert parts[0] + parts[1] == pytest.approx(parts[2])
    prompt_tokens = found.pop("gen_ai.usage.prompt_tokens")
    assert prompt_tokens > 0
    assert found == {
        "gen_ai.request.id": "mine",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.model": "demo",
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.response.finish_reasons": ("length",),
    }


def test_each_prompt_of_a_request_has_its_span_and_a_trace_of_its_own_begins(
    traced: tuple[Server, Callable[[], list[Any]]],
) -> None:
    server, spans = traced
    body = {"prompt": ["a", "b"], "max_tokens": 2}
    assert server.http.post("/v1/completions", json=body, headers={"traceparent": "no such thing"}).is_success
    assert [span.parent for span in spans()] == [None, None]


def test_what_fails_or_is_refused_is_a_span_with_its_error_and_no_text(
    traced: tuple[Server, Callable[[], list[Any]]],
) -> None:
    server, spans = traced
    server.pool.fail_after = (1, EngineFault("a secret of the prompt"))
    assert server.http.post("/v1/chat/completions", json=CHAT).status_code == 500
    server.pool.refuse = CapacityExceeded("full of secrets")
    assert server.http.post("/v1/chat/completions", json=CHAT).status_code == 429
    assert [span.attributes["error.type"] for span in spans()] == ["EngineFault", "CapacityExceeded"]
    assert {span.status.status_code for span in spans()} == {StatusCode.ERROR}
    assert "secret" not in "".join(span.to_json() for span in spans())


def test_spans_reach_a_collector_at_the_latest_with_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("OTEL_SERVICE_NAME", "a name of ours")
    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{collector.server_address[1]}"
    server = Server(GatewayConfig(otlp_endpoint=endpoint))
    try:
        assert server.http.post("/v1/chat/completions", json=CHAT).is_success
        wait_until(lambda: server.open_requests == 0)
        server.app.state.gateway.close()
        assert got[0][0] == "/v1/traces"
        assert all(name in got[0][1] for name in (b"llm_request", b"gen_ai.usage.prompt_tokens", b"a name of ours"))
    finally:
        server.close()
        collector.shutdown()
        thread.join(60)


def test_without_the_packages_or_with_no_address_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("collector:4318", "ftp://collector", "http://", "http://a b", "http://collector/?key=1"):
        with pytest.raises(ConfigError, match="otlp_endpoint"):
            GatewayConfig(otlp_endpoint=endpoint)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install phalanx\[otel\]"):
        Tracing.to("http://127.0.0.1:4318")
