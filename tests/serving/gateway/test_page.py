"""The status page: one file that needs nothing from elsewhere, takes no text for HTML, and keeps a key in its tab."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import uvicorn
from phalanx.engine.protocol.messages import Submit
from phalanx.serving.gateway.app import Endpoint
from phalanx.serving.gateway.auth import Auth, AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.gateway import Gateway
from phalanx.serving.gateway.http.server import make_server
from phalanx.serving.gateway.metrics import CONTENT_TYPE, EngineSample, GatewayMetrics
from phalanx.serving.gateway.page import PAGE, page
from phalanx.tests.serving.browser import MISSING, Browser
from phalanx.tests.serving.fake_engine import model_info, status, two_tokens
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import ScriptedPool, wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

TEXT = PAGE.decode()
SCRIPT = re.search(r"<script>(.*)</script>", TEXT, re.DOTALL)[1]  # type: ignore[index]
KEY = "sk-key-of-the-page"


def metrics() -> GatewayMetrics:
    """Metrics of an engine of two ranks that has answered a request."""
    said = status(running=3, waiting=2, rank_wait_seconds=[1.0, 2.0])
    made = GatewayMetrics(lambda: [EngineSample("0", "ready", 5, said, model_info())])
    made.model_name = "fake"
    submit = Submit(id="a", token_ids=[1])
    request = made.request("0", submit)
    for event in two_tokens(submit):
        request.on_event(event)
    return made


def test_it_is_served_and_its_policy_lets_in_its_own_script_and_style_alone(server: Server) -> None:
    answer = server.http.get("/")
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    for kind in ("script", "style"):
        (block,) = re.findall(rf"<{kind}>(.*?)</{kind}>", TEXT, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    # What the policy would refuse.
    assert not re.search(r"<[^>]*\s(style|on\w+)=", TEXT.replace(SCRIPT, ""))


def test_it_loads_nothing_and_makes_no_html_of_text() -> None:
    assert re.findall(r"""(?:src|href)=["'](.*?)["']""", TEXT) == ["data:,"]
    assert not re.search(r"https?:|@import|url\(", TEXT)
    html = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|\beval\b|new Function"
    assert not re.search(html, SCRIPT)
    assert not re.search(r"localStorage|document\.cookie|indexedDB", SCRIPT)


def test_its_script_finds_its_elements_and_the_metrics_that_it_reads() -> None:
    ids = set(re.findall(r'\sid="([\w-]+)"', TEXT))
    named = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    named |= {f"{kind}-{part}" for kind in re.findall(r'showRate\("(\w+)"', SCRIPT) for part in ("rate", "line")}
    named |= {f"{kind}{part}" for kind in re.findall(r'showTime\("(\w+)"', SCRIPT) for part in ("", "-more")}
    assert named == ids

    exposed = metrics().exposition().decode()
    for name in set(re.findall(r'"((?:vllm|phalanx):\w+)"', SCRIPT)):
        assert re.search(rf"^{name}(_bucket)?{{", exposed, re.MULTILINE), name


# ---- in a browser


class Backend:
    """A server with the page, and an engine that says what the test tells it to."""

    def __init__(self) -> None:
        self.pieces: list[dict[str, str]] = []
        self.endless = False
        self.asked: list[dict[str, object]] = []
        self.left = threading.Event()
        self._metrics = metrics()
        gateway = Gateway(ScriptedPool(), GatewayConfig())
        app = Starlette(
            routes=[
                Route("/", Endpoint(gateway, page)),
                Route("/metrics", self._expose),
                Route("/health/ready", lambda request: JSONResponse({"status": "ready"})),
                Route("/v1/models", lambda request: JSONResponse({"data": [{"id": "a/fake", "max_model_len": 128}]})),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ]
        )
        config = GatewayConfig(port=0)
        self._server: uvicorn.Server = make_server(Auth(app, AuthConfig(api_key=KEY)), config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    async def _expose(self, request: Request) -> Response:
        return Response(self._metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def _chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for delta in self.pieces:
                yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"
            while self.endless:
                await asyncio.sleep(0.05)
                yield ": keep-alive\n\n"
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend()
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"this machine has no {' and no '.join(MISSING)}")
def test_a_person_gives_a_key_reads_the_figures_and_chats(backend: Backend) -> None:
    browser = Browser()
    try:
        browser.go(f"{backend.url}/")
        _give_key(browser)
        browser.until("return document.getElementById('in-flight').innerText === '5'")
        assert browser.text("model") == "fake, context of 128"
        assert browser.text("queue") == "3 running, 2 waiting"
        assert browser.text("kv") == "25 %"
        assert [row.split() for row in browser.text("ranks").splitlines()][1][:3] == ["0,", "1", "ready"]
        browser.until("return document.getElementById('output-rate').innerText === '0'")

        _chat(browser, backend)
        _stop(browser, backend)
        assert [message for message in browser.messages() if "401" not in message] == []

        browser.click("forget")
        browser.until("return document.getElementById('key-form').hidden === false")
        assert browser.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [0, 0, ""]
    finally:
        browser.close()


def _give_key(browser: Browser) -> None:
    browser.until("return !document.getElementById('key-form').hidden")
    assert browser.run("return document.getElementById('send').disabled")
    give = "document.getElementById('key').value = arguments[0]; document.getElementById('key-form').requestSubmit()"
    browser.run(give, "sk-another-key")
    browser.until("return document.getElementById('key-error').innerText.includes('not one of the server')")
    browser.run(give, KEY)
    browser.until("return document.getElementById('key-form').hidden")
    assert browser.run("return Object.entries(localStorage).length + document.cookie.length") == 0


def _say(browser: Browser, text: str) -> None:
    browser.run("document.getElementById('message').value = arguments[0]", text)
    browser.run("document.getElementById('chat-form').requestSubmit()")


def _chat(browser: Browser, backend: Backend) -> None:
    """Thinking is folded, and what looks like HTML is text."""
    backend.pieces = [{"role": "assistant", "content": ""}, {"reasoning": "Hm"}, {"reasoning_content": "m."}]
    backend.pieces += [{"content": "<img src=x "}, {"content": "onerror=alert(1)>"}]
    _say(browser, "<b>Hello</b>")
    browser.until("return document.getElementById('stop').hidden && !document.getElementById('send').hidden")
    log = "document.getElementById('log')"
    assert browser.run(f"return [...{log}.querySelectorAll('img, .turn div b')].length") == 0
    shown = browser.text("log")
    assert "<b>Hello</b>" in shown
    assert "<img src=x onerror=alert(1)>" in shown
    assert browser.run(f"const d = {log}.querySelector('details'); return [d.open, d.textContent]") == [
        False,
        "ThoughtsHmm.",
    ]
    assert backend.asked[-1]["messages"] == [{"role": "user", "content": "<b>Hello</b>"}]


def _stop(browser: Browser, backend: Backend) -> None:
    backend.pieces, backend.endless = [{"content": "and so on"}], True
    _say(browser, "More")
    browser.until("return document.getElementById('log').innerText.includes('and so on')")
    browser.click("stop")
    browser.until("return document.getElementById('log').innerText.includes('Stopped.')")
    assert backend.left.wait(10)
    sent = backend.asked[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]  # type: ignore[attr-defined]
