"""Web pages and a server without a key: names that lead to this machine, and requests of other sites."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from phalanx.engine.errors import ConfigError
from phalanx.serving.gateway.auth import AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.http.browsers import is_loopback
from phalanx.serving.pool.config import PoolConfig
from phalanx.serving.pool.pool import Engines
from phalanx.serving.server import ServerConfig, Settings, make_app

LOCAL = [
    *("127.0.0.1:8000", "localhost:8000", "LOCALHOST", "localhost.", "[::1]:8000", "[::1]", "192.168.1.7", ""),
    *("x", "gateway:8000", "app.localhost", "printer.local", "host.docker.internal:8000"),
]
FOREIGN = ["rebind.example.org", "example.org:8000", "127.0.0.1.nip.io:8000", "localhost.example.org", "example.org."]
PAGE = {"origin": "https://example.org", "sec-fetch-site": "cross-site"}


def ask(method: str, path: str, headers: dict[str, str], host: str = "127.0.0.1", **auth: Any) -> httpx.Response:
    """The answer of a server that listens at `host`."""

    async def main() -> httpx.Response:
        settings = Settings(ServerConfig(), GatewayConfig(host=host), AuthConfig(**auth), PoolConfig())
        transport = httpx.ASGITransport(make_app(Engines(settings.pool), settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(main())


@pytest.mark.parametrize("name", LOCAL)
def test_a_server_without_a_key_is_reached_by_addresses_and_local_names(name: str) -> None:
    assert ask("GET", "/version", {"host": name}).status_code == 200


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_leads_to_this_machine_is_refused_without_a_key(name: str) -> None:
    refused = ask("GET", "/version", {"host": name, "x-request-id": "mine"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (421, "host_not_allowed")
    assert "allowed_hosts" in refused.json()["error"]["message"]
    assert refused.headers["x-request-id"] == "mine"
    assert ask("POST", "/v1/messages", {"host": name}).json()["type"] == "error"
    assert ask("GET", "/version", {"host": name}, allowed_hosts=("*",)).status_code == 200
    # Whoever has the key is no page, and other machines know the server by any name.
    assert ask("GET", "/version", {"host": name, "x-api-key": "k" * 8}, api_key="k" * 8).status_code == 200
    assert ask("GET", "/version", {"host": name}, host="0.0.0.0").status_code == 200


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("api.example.org:443", 200), ("API.example.org", 200), ("a.b.example.com", 200), ("10.0.0.1", 200)),
        *(("example.org", 421), ("example.com", 421), ("evilexample.com", 421), ("api.example.org.evil.net", 421)),
    ],
)
def test_names_that_are_allowed_are_the_only_ones(name: str, status: int) -> None:
    for more in ({}, {"host": "0.0.0.0"}, {"api_key": "k" * 8}):
        asked = {"host": name, "x-api-key": "k" * 8}
        answered = ask("GET", "/version", asked, **more, allowed_hosts=("api.example.org", "*.example.com"))
        assert answered.status_code == status


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/files", "/v1/responses/resp_1/cancel"])
def test_a_page_of_another_site_sends_nothing_to_a_server_without_a_key(path: str) -> None:
    refused = ask("POST", path, PAGE)
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert "allow_origins=[https://example.org]" in refused.json()["error"]["message"]
    for headers in ({"origin": PAGE["origin"]}, {**PAGE, "sec-fetch-site": "same-origin"}):
        assert ask("POST", path, headers).status_code != 403
    assert ask("POST", path, PAGE, host="0.0.0.0").status_code != 403
    assert ask("POST", path, PAGE, api_key="k" * 8).status_code == 401
    assert ask("POST", path, {**PAGE, "x-api-key": "k" * 8}, api_key="k" * 8).status_code not in (401, 403)
    assert ask("GET", "/version", PAGE).status_code == 200


def test_a_page_whose_origin_is_allowed_is_answered_and_reads_the_requests_id() -> None:
    for origins in (("https://example.org",), ("*",)):
        answered = ask("POST", "/v1/chat/completions", PAGE, allow_origins=origins)
        assert answered.status_code == 400  # there is no body
        assert answered.headers["access-control-allow-origin"] in ("https://example.org", "*")
        assert "X-Request-Id" in answered.headers["access-control-expose-headers"]
    assert ask("POST", "/v1/chat/completions", PAGE, allow_origins=("https://example.com",)).status_code == 403


def test_which_addresses_are_of_this_machine_alone() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost", "a.localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "", "mylocalhost"))


@pytest.mark.parametrize("name", ["", "https://example.org", "example.org:8000", "a.*.org", "a b", "*."])
def test_a_name_that_no_host_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts"):
        AuthConfig(allowed_hosts=(name,))


@pytest.mark.parametrize(
    "origin",
    [
        *("", "example.org", "https://example.org/", "https://example.org/app", "https://Example.org", "https://"),
        *("https://example.org:443", "http://example.org:80", "https://*.example.org", "*.example.org", "https://a b"),
    ],
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="allow_origins"):
        AuthConfig(allow_origins=(origin,))


def test_origins_as_browsers_send_them_are_taken() -> None:
    extensions = ("chrome-extension://abcdefghijklmnop", "tauri://localhost", "app://.", "null", "*")
    AuthConfig(allow_origins=("https://example.org", "http://localhost:3000", "http://[::1]:3000", *extensions))
