"""launch.gateway in front of fake engines: from the ready line to the last answer after a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from phalanx.engine.errors import ConfigError
from phalanx.engine.protocol.messages import Delta, Event, Submit
from phalanx.launch.cli.compose import compose, prepare_arguments
from phalanx.launch.cli.schema import field_docs
from phalanx.launch.cli.server import server_settings
from phalanx.launch.gateway import GatewayKeys, gateway
from phalanx.launch.ranks.rank_info import RankInfo
from phalanx.serving.server import Server
from phalanx.tests.launch.programs import run
from phalanx.tests.serving.fake_engine import FakeEngine, address, finished, status
from phalanx.tests.serving.servers import running, wait_until_it_listens

REQUEST = {"model": "fake", "prompt": [1, 2, 3], "max_tokens": 2}
KEY, ADMIN = "sk-some-key", "sk-admin-key"


def endless(submit: Submit) -> list[Event]:
    return [Delta(submit.id, 0, "one", [1])]


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[FakeEngine]]:
    with contextlib.ExitStack() as stack:
        made = [FakeEngine(address(tmp_path, number)) for number in range(2)]
        for engine in made:
            stack.callback(engine.close)
        yield made


def addresses(engines: list[FakeEngine]) -> str:
    return f"engines=[{','.join(engine.address for engine in engines)}]"


def read_until(url: str, status_code: int) -> httpx.Response:
    for _ in range(400):
        response = httpx.get(url, timeout=60)
        if response.status_code == status_code:
            return response
        threading.Event().wait(0.05)
    raise AssertionError(f"{url} answered {response.status_code}: {response.text}")


def test_two_groups_behind_one_gateway_one_of_them_drained(engines: list[FakeEngine]) -> None:
    options = ("port=0", f"admin_key={ADMIN}", f"api_key={KEY}", "poll_interval_s=0.05")
    with running("gateway", addresses(engines), *options) as server:
        url = server.url
        with httpx.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            for _ in range(6):
                answered = client.post("/v1/completions", json=REQUEST)
                assert answered.json()["choices"][0]["text"] == "one two", answered.text
            assert sum(len(engine.requests) for engine in engines) == 6

            admin = {"authorization": f"Bearer {ADMIN}"}
            drained = client.post("/admin/drain", json={"engine": "0"}, headers=admin)
            assert drained.json()["state"] == "draining"
            before = len(engines[0].requests)
            for number in range(4):
                assert client.post("/v1/completions", json={**REQUEST, "prompt": [number]}).status_code == 200
            assert len(engines[0].requests) == before

            metrics = client.get("/metrics")
            assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert 'vllm:request_success_total{engine="1",finished_reason="stop"' in metrics.text
            assert httpx.get(f"{url}/metrics", timeout=60).status_code == 401
            assert httpx.get(f"{url}/health/ready", timeout=60).status_code == 200
        assert not server.has_torch
    assert KEY not in server.text
    assert ADMIN not in server.text
    assert [line for line in server.lines if not line.startswith("{")] == [server.wait_for("is ready at")]


def test_until_an_engine_answers_only_liveness_is_there(tmp_path: Path) -> None:
    with running("gateway", f"engines=[{address(tmp_path)}]", "port=0", "poll_interval_s=0.05") as server:
        url = wait_until_it_listens(server)
        assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
        for path in ("/health", "/health/ready"):
            assert httpx.get(url + path, timeout=60).status_code == 503
        refused = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert not any("is ready at" in line for line in server.lines)

        with contextlib.closing(FakeEngine(address(tmp_path))) as engine:
            assert server.url == url
            assert httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60).status_code == 200
            engine.status = status(stalled_s=100.0)  # its process lives, and its step loop is stuck
            assert "no step for 100 s" in read_until(f"{url}/health/ready", 503).text
            assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
            engine.status = status()
            read_until(f"{url}/health/ready", 200)


def test_a_signal_lets_what_runs_finish_and_takes_nothing_new(engines: list[FakeEngine]) -> None:
    engines[0].answer = endless
    with running("gateway", addresses(engines[:1]), "port=0") as server:
        url = server.url
        with httpx.stream("POST", f"{url}/v1/completions", json={**REQUEST, "stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            assert "one" in next(lines)
            server.signal(signal.SIGTERM)
            server.wait_for('"draining"')
            refused = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert httpx.get(f"{url}/health/ready", timeout=60).status_code == 503
            engines[0].send(finished(engines[0].requests[0].id))
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "stop"
        assert server.wait() == 128 + signal.SIGTERM


def test_what_does_not_finish_in_time_fails_and_is_told_so(engines: list[FakeEngine]) -> None:
    engines[0].answer = endless
    with running("gateway", addresses(engines[:1]), "port=0", "drain_timeout_s=0.3") as server:
        body = {**REQUEST, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "error" in json.loads(rest[-2][6:])
        assert server.wait() == 128 + signal.SIGINT
        assert engines[0].aborted == [engines[0].requests[0].id]


def test_a_browser_of_another_origin_is_answered_only_if_it_is_allowed(engines: list[FakeEngine]) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    for option, status_code in ((), 401), (("allow_origins=[https://example.org]",), 200):
        with running("gateway", addresses(engines[:1]), "port=0", f"api_key={KEY}", *option) as server:
            answered = httpx.options(f"{server.url}/v1/completions", headers=asked)
            assert answered.status_code == status_code
            allowed = answered.headers.get("access-control-allow-origin")
            assert allowed == ("https://example.org" if option else None)


def test_a_certificate_makes_it_https(engines: list[FakeEngine], tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    files = (f"ssl_certfile={certificate}", f"ssl_keyfile={key}")
    with running("gateway", addresses(engines[:1]), "port=0", *files) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{server.url}/health", verify=context, timeout=60).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "engines is not set"),
        (("engines=[tcp://127.0.0.1:5555]",), "secret_file"),
        (("engines=[ipc:///a,ipc:///a]",), "twice"),
        (("engines=[ipc:///a]", "port=70000"), "port=70000"),
        (("engines=[ipc:///a]", "host=256.1.1.1"), "host='256.1.1.1'"),
        (("engines=[ipc:///a]", "ssl_keyfile=/nowhere"), "ssl_certfile"),
        (("engines=[ipc:///a]", "ssl_certfile=/nowhere"), "ssl_certfile='/nowhere'"),
        (("engines=[ipc:///a]", "api_key=short"), "at least 8"),
        (("engines=[ipc:///a]", "log_level=loud"), "log_level='loud'"),
        (("engines=[ipc:///a]", "drain_timeout_s=-1"), "drain_timeout_s"),
        (("engines=[ipc:///a]", "no_such_key=1"), "no_such_key"),
        (("engines=[ipc:///a]", "otlp_endpoint=collector"), "otlp_endpoint='collector'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "run", lambda *_: pytest.fail("it serves"))
    with pytest.raises(ConfigError) as error:
        gateway(compose(prepare_arguments(arguments, GatewayKeys, RankInfo()), GatewayKeys, RankInfo()))
    assert message in str(error.value)


def test_a_setting_that_cannot_be_ends_it_with_code_2() -> None:
    ended = run("gateway", "engines=[ipc:///a]", "port=70000")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "port=70000" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("kind", server_settings())
def test_every_setting_of_the_server_is_explained(kind: type) -> None:
    docs = field_docs(kind)
    assert [field.name for field in dataclasses.fields(kind) if not docs.get(field.name)] == []


def test_help_lists_the_settings_of_the_server() -> None:
    shown = run("gateway", "--help").stdout
    assert "engines=[...]" in shown
    for name in ("engines", "port", "api_key", "drain_timeout_s", "stall_timeout_s", "max_open_requests"):
        assert f"\n  {name} [" in shown


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("gateway", "engines=[ipc:///a]", f"port={port}")
    assert ended.returncode == 2
    assert f"port={port}" in ended.stderr


def test_a_printed_configuration_shows_no_key() -> None:
    printed = run("gateway", "api_key=sk-${not}-a:reference", f"admin_key={ADMIN}", "--cfg", "job")
    assert printed.returncode == 0, printed.stderr
    assert "sk-" not in printed.stdout
    assert printed.stdout.count("[redacted]") == 2
    shown = run("gateway", "--cfg", "job").stdout
    assert "api_key: null" in shown
