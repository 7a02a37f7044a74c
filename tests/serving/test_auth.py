"""Who is let in: API keys, the admin's key, a salt for each tenant; and what the log says of it."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from phalanx.engine.errors import ConfigError
from phalanx.serving.gateway.auth import TENANT_SALT, App, Auth, AuthConfig
from phalanx.serving.gateway.logs import AccessLog, JsonFormatter, configure_logging, log_fields
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

KEY, OTHER, ADMIN = "sk-first-key", "sk-second-key", "sk-admin-key"


async def _show(request: Request) -> Response:
    await request.body()
    return PlainTextResponse(request.scope.get("state", {}).get(TENANT_SALT, "none"))


def make_app(**config: Any) -> App:
    paths = ("/", "/health", "/health/live", "/healthy", "/metrics", "/v1/models", "/admin/engines", "/administration")
    return Auth(Starlette(routes=[Route(path, _show, methods=["GET", "POST"]) for path in paths]), AuthConfig(**config))


def get(app: App, path: str, **headers: str) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(main())


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_without_keys_everything_but_admin_routes_is_open() -> None:
    app = make_app()
    assert get(app, "/v1/models").status_code == 200
    assert get(app, "/administration").status_code == 200
    refused = get(app, "/admin/engines", authorization=bearer(ADMIN))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "admin_disabled"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/healthy", "/nowhere"])
def test_with_keys_every_route_but_health_and_the_status_page_needs_one(path: str) -> None:
    app = make_app(api_key=KEY)
    for headers in ({}, {"authorization": bearer(OTHER)}, {"authorization": KEY}, {"x-api-key": ""}):
        refused = get(app, path, **headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        error = refused.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("authentication_error", None, "invalid_api_key")
        assert KEY not in refused.text
    for headers in ({"authorization": bearer(KEY)}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}):
        assert get(app, path, **headers).status_code in (200, 404)
    for open_path in ("/health/live", "/health", "/"):
        assert get(app, open_path).status_code == 200


def test_admin_routes_need_the_admin_key_which_opens_nothing_else() -> None:
    app = make_app(api_key=KEY, admin_key=ADMIN)
    assert get(app, "/admin/engines", authorization=bearer(ADMIN)).status_code == 200
    assert get(app, "/admin/engines", authorization=bearer(KEY)).status_code == 401
    assert get(app, "/v1/models", authorization=bearer(ADMIN)).status_code == 401


def test_tenants_have_salts_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the second customer\n{OTHER}\n\n")
    file.chmod(0o600)
    app = make_app(api_key=KEY, api_keys_file=str(file), isolate_tenants=True)
    salts = [get(app, "/v1/models", authorization=bearer(key)).text for key in (KEY, OTHER, KEY)]
    assert salts[0] == salts[2] != salts[1]
    assert all(len(salt) == 32 and KEY not in salt for salt in salts)
    assert get(make_app(api_key=KEY), "/v1/models", authorization=bearer(KEY)).text == "none"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"api_key": "short"}, "^api_key: .* at least 8"),
        ({"admin_key": "short"}, "^admin_key: .* at least 8"),
        ({"api_key": "with a space in it"}, "without spaces"),
        ({"api_key": "schlüssel-lang"}, "ASCII"),
        ({"api_key": KEY, "admin_key": KEY}, "admin_key"),
        ({"isolate_tenants": True}, "api_key or api_keys_file"),
        ({"api_keys_file": "/nowhere"}, "api_keys_file"),
    ],
)
def test_keys_that_cannot_be_are_refused_without_being_shown(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_app(**config)
    assert not any(str(config[name]) in str(error.value) for name in ("api_key", "admin_key") if name in config)


def test_a_file_of_keys_that_others_may_read_or_that_is_empty_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        make_app(api_keys_file=str(file))
    file.chmod(0o600)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        make_app(api_keys_file=str(file))
    file.write_text(f"# the first\n{KEY}\nshort\n")
    with pytest.raises(ConfigError, match="keys', line 3: a key has 5 characters"):
        make_app(api_keys_file=str(file))


def test_no_representation_shows_a_key() -> None:
    assert KEY not in repr(AuthConfig(api_key=KEY, admin_key=ADMIN))
    assert ADMIN not in repr(AuthConfig(api_key=KEY, admin_key=ADMIN))


def test_the_log_has_one_line_for_each_request_with_its_id_and_nothing_it_held(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = AccessLog(make_app(api_key=KEY))
    with caplog.at_level(logging.INFO):
        answered = get(app, "/v1/models?secret=query", authorization=bearer(KEY), **{"x-request-id": "mine-1"})
        refused = get(app, "/v1/models", authorization=bearer("sk-wrong-key-here"), **{"x-request-id": "two\twords"})
        assert get(app, "/health").status_code == 200
    assert answered.headers["x-request-id"] == "mine-1"
    assert len(refused.headers["x-request-id"]) == 32

    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    lines = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in lines] == [200, 401]
    assert lines[0]["request_id"] == "mine-1"
    assert lines[0]["path"] == "/v1/models"
    assert not [word for word in (KEY, "sk-wrong", "secret", "query") if word in json.dumps(lines)]


def test_an_app_that_fails_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("broken")

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="broken"):
        get(AccessLog(broken), "/v1/models")
    (record,) = [record for record in caplog.records if record.name == "phalanx.gateway.access"]
    assert record.message == "request"
    assert json.loads(JsonFormatter().format(record))["status"] == 500


def test_a_record_is_one_line_of_json_whatever_it_holds() -> None:
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "ERROR", "msg": "two\nlines %s", "args": ("x",), **log_fields(path=Path("/x"), n=1)}
    )
    try:
        raise ValueError("why")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert (line["level"], line["message"], line["n"]) == ("error", "two\nlines x", 1)
    assert "ValueError: why" in line["exception"]


def test_an_unknown_log_level_is_named() -> None:
    with pytest.raises(ConfigError, match="log_level='loud'"):
        configure_logging("loud")
