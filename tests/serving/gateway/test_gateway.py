"""What the gateway is: a process without torch, a document that says what it checks, settings that can be."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from phalanx.engine.errors import ConfigError
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.describe import page
from phalanx.serving.gateway.openapi import openapi_document
from phalanx.serving.gateway.routes.table import OPERATIONS
from phalanx.tests.serving.gateway.conftest import Server

ROOT = Path(__file__).resolve().parents[3]

_IMPORTS = """
import re, sys
import phalanx.serving.gateway.app, phalanx.serving.gateway.http.server
print(sorted({"torch", "transformers", "numpy", "tokenizers"} & sys.modules.keys()))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_the_gateway_imports_no_torch_and_is_small() -> None:
    ran = subprocess.run([sys.executable, "-c", _IMPORTS], capture_output=True, text=True, check=True, timeout=60)
    heavy, kilobytes = ran.stdout.split("\n")[:2]
    assert heavy == "[]"
    assert int(kilobytes) < 120 * 1024


def test_the_page_of_routes_and_fields_is_current() -> None:
    command = "python -m phalanx.serving.gateway.describe > docs/http_api.md"
    assert (ROOT / "docs" / "http_api.md").read_text() == page(), f"run {command}"


def test_the_openapi_document_has_every_route_and_field(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    assert document == openapi_document()
    for operation in OPERATIONS:
        assert operation.method.lower() in document["paths"][operation.path]
        if operation.request is not None:
            schema = document["components"]["schemas"][operation.request.__name__]
            assert set(schema["properties"]) == set(operation.request.__struct_fields__)
            assert schema["additionalProperties"] is False
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000),
        ("max_body_bytes", 0),
        ("keep_alive_s", -1.0),
        ("body_timeout_s", 0.0),
        ("default_temperature", -1.0),
        ("served_model_names", ("a", "a")),
    ],
)
def test_a_setting_out_of_its_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(GatewayConfig(), **{field: value})  # type: ignore[arg-type]


def test_the_default_temperature_is_a_setting(server: Server) -> None:
    gateway = server.app.state.gateway
    before, gateway.config = gateway.config, dataclasses.replace(gateway.config, default_temperature=1.0)
    try:
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        server.http.post("/v1/chat/completions", json=body)
        server.http.post("/v1/chat/completions", json={**body, "temperature": 0})
    finally:
        gateway.config = before
    assert [submit.sampling.temperature for submit in server.pool.submits] == [1.0, 0.0]
