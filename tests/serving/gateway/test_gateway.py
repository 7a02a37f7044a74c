"""What the gateway is: a process without torch, a document that says what it checks, settings that can be."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from phalanx.engine.errors import ConfigError
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.describe import page
from phalanx.serving.gateway.http.neutral import NEUTRAL
from phalanx.serving.gateway.openapi import openapi_document
from phalanx.serving.gateway.routes.table import OPERATIONS
from phalanx.tests.serving.gateway.conftest import Server

CHAT = "/v1/chat/completions"
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
            taken = {name for name in operation.refused if name in NEUTRAL and "." not in name}
            assert set(schema["properties"]) == set(operation.request.__struct_fields__) | taken
            assert schema["additionalProperties"] == {"type": "null"}
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["required"] == ["messages"]


def test_a_null_is_as_good_as_no_value_under_any_name(server: Server) -> None:
    asked = {"tokens": [], "model": None, "": None, "functions": None}
    assert server.http.post("/detokenize", json=asked).status_code == 200
    assert server.http.post("/detokenize", json=asked | {"functions": 1}).json()["error"]["param"] == "functions"


@pytest.mark.parametrize(
    ("path", "fields", "wrong"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a", "thinking_blocks": None}]}, "messages[0].x"),
        (CHAT, {"response_format": {"type": "text", "structures": None, "x": None}}, "response_format.x"),
        (CHAT, {"stream": True, "stream_options": {"include_usage": True, "x": None}}, "stream_options.x"),
        (CHAT, {"structured_outputs": {"json": {"enum": [None]}, "_backend": None}}, "structured_outputs.x"),
        ("/v1/responses", {"reasoning": {"effort": None, "x": None}}, "reasoning.x"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a", "x": None}]}, "messages[0].x"),
        ("/v1/messages", {"context_management": {"edits": None}}, "context_management.x"),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": None, "seed": None}}, "sampling_params.x"),
    ],
)
def test_a_null_within_an_object_is_as_good_as_no_value(
    server: Server, path: str, fields: dict[str, Any], wrong: str
) -> None:
    rest: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}]}
    if path == "/v1/messages":
        rest["max_tokens"] = 1
    elif path != CHAT:
        rest = {"input": "a"} if path == "/v1/responses" else {"token_ids": [1]}
    answer = server.http.post(path, json={**rest, **fields})
    assert answer.status_code == 200, answer.text

    (name, value), *_ = (item for item in fields.items() if item[0] != "stream")
    (value[0] if isinstance(value, list) else value)["x"] = 1
    error = server.http.post(path, json={**rest, **fields}).json()["error"]
    assert wrong in (error.get("param") or error["message"]), name


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/responses", "n", 1),
        ("/v1/responses", "context_management", []),
        ("/v1/responses", "stream_options", {"include_obfuscation": False}),
        ("/v1/messages", "mcp_servers", []),
        ("/v1/messages", "speed", "standard"),
        (CHAT, "stream_options", {}),
        (CHAT, "stream_options", {"include_usage": False}),
        ("/inference/v1/generate", "features", []),
        ("/inference/v1/generate", "sampling_params", {"detokenize": False, "output_kind": 0, "flat_logprobs": False}),
    ],
)
def test_a_value_that_changes_nothing_is_taken(server: Server, path: str, field: str, value: object) -> None:
    rest: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": "a"}]},
        "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        "/v1/responses": {"input": "a"},
    }.get(path, {"token_ids": [1]})
    answer = server.http.post(path, json={**rest, field: value})
    assert answer.status_code == 200, answer.text


def test_a_parameter_that_is_refused_within_an_object_says_why(server: Server) -> None:
    asked = {"token_ids": [1], "sampling_params": {"structured_outputs": {"choice": ["a"]}}}
    error = server.http.post("/inference/v1/generate", json=asked).json()["error"]
    assert error["param"] == "sampling_params.structured_outputs"
    assert "use /v1/completions" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", 70_000),
        ("max_body_bytes", 0),
        ("keep_alive_s", -1.0),
        ("body_timeout_s", 0.0),
        ("default_temperature", -1.0),
        ("tool_syntax", "json"),
        ("reasoning", "maybe"),
        ("served_model_names", ("a", "a")),
    ],
)
def test_a_setting_out_of_its_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(GatewayConfig(), **{field: value})  # type: ignore[arg-type]


ROUTES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
}


def test_the_default_temperature_is_a_setting(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(default_temperature=0.5))
    server.pool.model = msgspec.structs.replace(server.pool.model, sampling_defaults={"temperature": 0.7})
    for path, body in ROUTES.items():
        server.http.post(path, json=body)
        server.http.post(path, json={**body, "temperature": 0})
    assert [submit.sampling.temperature for submit in server.pool.submits] == [0.5, 0.0, 0.5, 0.0]


def test_what_a_request_leaves_unset_is_the_models_or_else_openais(server: Server) -> None:
    for path, body in ROUTES.items():
        server.http.post(path, json=body)
    defaults = {"temperature": 0.7, "top_k": 20.0, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.05}
    server.pool.model = msgspec.structs.replace(server.pool.model, sampling_defaults=defaults)
    for path, body in ROUTES.items():
        server.http.post(path, json={**body, "top_p": 0.5})

    taken = [submit.sampling for submit in server.pool.submits]
    assert [(each.temperature, each.top_k, each.top_p) for each in taken] == [(1.0, None, None)] * 2 + [
        (0.7, 20, 0.5)
    ] * 2
    assert [(each.min_p, each.repetition_penalty) for each in taken[2:]] == [(0.1, 1.05)] * 2


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_more_new_tokens_than_the_context_are_refused_by_name(server: Server, field: str) -> None:
    for path, body in ROUTES.items():
        if path == "/v1/completions" and field == "max_completion_tokens":
            continue
        assert server.http.post(path, json={**body, field: 4096}).status_code == 200
        refused = server.http.post(path, json={**body, field: 4097})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field
        assert "[1, 4096] (max_model_len)" in refused.json()["error"]["message"]
    body = {"token_ids": [1], "sampling_params": {"max_tokens": 4097}}
    assert server.http.post("/inference/v1/generate", json=body).json()["error"]["param"] == (
        "sampling_params.max_tokens"
    )


def test_a_model_may_be_required(make_gateway: Callable[[GatewayConfig], Server], server: Server) -> None:
    strict = make_gateway(GatewayConfig(require_model=True))
    for path, body in ROUTES.items():
        assert server.http.post(path, json=body).status_code == 200
        refused = strict.http.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "model"
        assert strict.http.post(path, json={**body, "model": ""}).json() == refused.json()
        assert strict.http.post(path, json={**body, "model": "demo"}).status_code == 200
        assert server.http.post(path, json={**body, "model": ""}).status_code == 200
    assert strict.http.get("/tokenizer_info").json() == server.http.get("/tokenizer_info").json()
    assert strict.http.get("/v1/models/demo").status_code == 200
    assert strict.http.get("/v1/models/").status_code == server.http.get("/v1/models/").status_code == 404
