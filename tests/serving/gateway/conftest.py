"""A real server on a loopback port in front of a scripted pool, and the official client."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn
from phalanx.serving.gateway.app import create_app
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.http.server import make_server
from phalanx.tests.serving.gateway.agent_pool import AgentPool
from phalanx.tests.serving.gateway.scripted_pool import ScriptedPool, wait_until
from starlette.middleware import Middleware


class Server:
    """A gateway under test, its pool and its clients."""

    def __init__(
        self, config: GatewayConfig | None = None, pool: Any = None, middleware: Sequence[Middleware] = ()
    ) -> None:
        self.pool = pool or ScriptedPool()
        self.app = create_app(self.pool, config, middleware=middleware)
        self._server: uvicorn.Server = make_server(self.app, dataclasses.replace(config or GatewayConfig(), port=0))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)
        self.port = int(self._server.servers[0].sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.anthropic = anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def open_requests(self) -> int:
        return int(self.app.state.gateway.admission.requests)

    def send_and_leave(self, path: str, body: dict[str, Any]) -> None:
        """Ask for what takes long, and go away as soon as it is under way."""
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", self.port)) as leaving:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            leaving.sendall(head.encode() + content)
            wait_until(lambda: self.open_requests > 0)

    def close(self) -> None:
        self.http.close()
        self.openai.close()
        self.anthropic.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture(scope="package", autouse=True)
def short_linger() -> Iterator[None]:
    """A refused connection is closed sooner, since tests wait for it: on this host nobody takes long to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.serving.gateway.http.exchange.LINGER_S", 0.5)
        patch.setattr("phalanx.serving.gateway.http.server.LINGER_S", 0.5)
        yield


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(shared_server: Server) -> Server:
    """One server for a module's tests, each of which gets it with a pool as it was made."""
    shared_server.pool.join()
    shared_server.pool.__init__()  # type: ignore[misc]
    return shared_server


@pytest.fixture(scope="module")
def agent_server() -> Iterator[Server]:
    server = Server(pool=AgentPool())
    yield server
    server.close()


@pytest.fixture
def agent(agent_server: Server) -> Server:
    """A server whose pool says what a test puts into `pool.answers`."""
    agent_server.pool.join()
    agent_server.pool.__init__()  # type: ignore[misc]
    return agent_server


@pytest.fixture
def make_gateway() -> Iterator[Callable[[GatewayConfig], Server]]:
    """A server of the test's own, with its own settings."""
    servers: list[Server] = []

    def make(config: GatewayConfig) -> Server:
        servers.append(Server(config))
        return servers[-1]

    yield make
    for server in servers:
        server.close()
