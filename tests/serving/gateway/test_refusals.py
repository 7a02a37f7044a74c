"""Every bad input gets its status, its message and the field's name; no other request notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from phalanx.engine.errors import CapacityExceeded, EngineFault, EngineStopped, InvalidRequest
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.engine_pool import PoolState
from phalanx.serving.gateway.http.neutral import NEUTRAL
from phalanx.serving.gateway.schemas.refused import REFUSED_CHAT, REFUSED_COMPLETION
from phalanx.tests.serving.gateway.conftest import Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "f"}}]
HELLO = [{"role": "user", "content": "Hi"}]
ALLOWED = "tool_choice.allowed_tools"


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def allowed(*names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}


def refusal(server: Server, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error that a body is answered with; nothing reaches the engine."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    before = len(server.pool.submits)
    answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(server.pool.submits) == before
    assert server.open_requests == 0
    return error  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": "x" * 1025}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"bad_words": "x"}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 2}, "min_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"priority": 1.5}, "priority"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"request_id": "a b"}, "request_id"),
        ({"timeout": 0.05}, "timeout"),
        ({"temprature": 1}, "temprature"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_a_field_out_of_its_range_is_named(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    rest = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    error = refusal(server, path, {**rest, **fields})
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "poet", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "image_url": "x"}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": "Hi", "reasoning": "a", "reasoning_content": "b"}]},
            "messages[0].reasoning",
        ),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HELLO, "min_tokens": 9, "max_completion_tokens": 2}, "min_tokens"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": HELLO, "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        (
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
            "tools[0].function.parameters",
        ),
        ({"messages": HELLO, "tools": [{**TOOLS[0], "cached": True}]}, "tools[0].cached"),
        (
            {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f", "returns": {}}}]},
            "tools[0].function.returns",
        ),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": {**TOOLS[0], "mode": "auto"}},
            "tool_choice.mode",
        ),
        (
            {"messages": HELLO, "response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
        ),
        (
            {"messages": HELLO, "response_format": {"type": "json_object", "triggers": ["a"]}},
            "response_format.triggers",
        ),
        ({"messages": HELLO, "tools": TOOLS}, "tools"),  # the template of this model knows no calls
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": allowed("g")}, f"{ALLOWED}.tools[0].function.name"),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": allowed()}, f"{ALLOWED}.tools"),
        ({"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, ALLOWED),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (
            {"messages": HELLO, "tools": [function("f", {"type": "array"})], "tool_choice": "required"},
            "tools[0].function.parameters.type",
        ),
        (
            {
                "messages": HELLO,
                "tools": [function("f", {"properties": {"a": {"const": 2**64}}})],
                "tool_choice": "none",
            },
            "tools[0].function.parameters.properties.a.const",
        ),
        ({"messages": HELLO, "chat_template_kwargs": {"a": [2**64]}}, "chat_template_kwargs.a[0]"),
        (
            {"messages": HELLO, "tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "response_format": {"type": "poem"}}, "response_format.type"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"messages": HELLO, "response_format": {"type": "structural_tag"}}, "response_format.structures"),
        ({"messages": HELLO, "structured_outputs": {}}, "structured_outputs"),
        ({"messages": HELLO, "structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"messages": HELLO, "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        (
            {"messages": HELLO, "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities[0]"),
        ({}, "messages"),
    ],
)
def test_what_a_conversation_may_not_be_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, CHAT, fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "echo"),
    ],
)
def test_what_a_prompt_may_not_be_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    assert refusal(server, COMPLETION, fields)["param"] == param


@pytest.mark.parametrize(
    ("path", "field", "why"),
    [
        *((CHAT, field, why) for field, why in REFUSED_CHAT.items()),
        *((COMPLETION, field, why) for field, why in REFUSED_COMPLETION.items()),
    ],
)
def test_fields_of_other_servers_are_refused_with_what_to_use_instead(
    server: Server, path: str, field: str, why: str
) -> None:
    rest = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    outer, _, name = field.rpartition(".")

    def asked(value: Any) -> dict[str, Any]:
        return {**rest, outer: {"choice": ["a"], name: value}} if outer else {**rest, field: value}

    error = refusal(server, path, asked([2]))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert why in error["message"]
    for value in (None, *NEUTRAL.get(field, ())):
        assert server.http.post(path, json=asked(value)).status_code == 200, value


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**31]}, "tokens[0]"),
        ("/inference/v1/generate", {"token_ids": []}, "token_ids"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"n": 0}}, "sampling_params.n"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"n": 999}}, "sampling_params.n"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"best_of": 2}}, "sampling_params.best_of"),
    ],
)
def test_other_routes_name_the_field_too(server: Server, path: str, body: Any, param: str) -> None:
    assert refusal(server, path, body)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'{"prompt": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ["a", "\\udc00b"]}',
        b'{"\\ud800": 1}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 301 + b"}",
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"prompt": "a", "metadata": ' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"prompt": "a"} x',
    ],
    ids=range(20),
)
def test_what_is_no_json_object_is_refused(server: Server, body: bytes) -> None:
    error = refusal(server, COMPLETION, body)
    assert error["code"] == "invalid_json"
    assert len(error["message"]) < 300


def test_a_model_or_route_that_is_not_there_is_404_and_another_method_405(server: Server) -> None:
    error = refusal(server, CHAT, {"model": "gpt-9", "messages": HELLO}, 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert server.http.get("/v1/models/gpt-9").status_code == 404
    assert refusal(server, "/v1/nothing", {}, 404)["code"] == "not_found"
    answer = server.http.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert server.http.post("/health").status_code == 405


def test_a_body_that_is_not_json_by_its_type_is_415(server: Server) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    refused = server.http.post(CHAT, content=b"a=b", headers=form)
    assert (refused.status_code, refused.headers["accept"]) == (415, "application/json")
    # A client that sees this field sends the body again as it is (RFC 9110, 15.5.16).
    refused = server.http.post(CHAT, content=b"{}", headers={"content-encoding": "gzip"})
    assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "identity")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (CapacityExceeded("the queue is full"), 429, "rate_limit_exceeded"),
        (EngineStopped("rank 1 failed"), 503, "engine_stopped"),
        (EngineFault("a row of NaN"), 500, "engine_fault"),
        (InvalidRequest("min_tokens=5000 is too large"), 400, None),
    ],
)
@pytest.mark.parametrize("when", ["refuse", "fail_first"])
@pytest.mark.parametrize("streamed", [False, True])
def test_refusals_of_the_engine_have_their_status(
    server: Server, error: Any, status: int, code: str | None, when: str, streamed: bool
) -> None:
    setattr(server.pool, when, error)
    answer = server.http.post(CHAT, json={"messages": HELLO, "stream": streamed})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"] == str(error)
    assert server.open_requests == 0
    if status == 429:
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    if status == 400:
        assert answer.json()["error"]["param"] == "min_tokens"


def test_a_fault_of_the_gateway_is_a_500_without_a_trace(server: Server) -> None:
    server.pool.refuse = ZeroDivisionError("secret")  # type: ignore[assignment]
    answer = server.http.post(CHAT, json={"messages": HELLO})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("phase", ["loading", "draining", "stopped"])
def test_nothing_is_taken_while_the_engine_is_not_ready(server: Server, phase: Any) -> None:
    server.pool.phase = PoolState(phase)
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETION, {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        assert refusal(server, path, body, 503)["code"] == phase
    health = server.http.get("/health/ready")
    assert (health.status_code, health.json()["status"]) == (503, phase)
    assert server.http.get("/health/live").status_code == 200


def test_health_is_progress(server: Server) -> None:
    assert server.http.get("/health").status_code == 200
    server.pool.progress = False
    for path in ("/health", "/health/ready"):
        answer = server.http.get(path)
        assert (answer.status_code, answer.json()["status"]) == (503, "stuck")


def test_a_body_too_long_is_413_and_not_read(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(max_body_bytes=1000))
    assert refusal(server, COMPLETION, {"prompt": "a" * 2000}, 413)["code"] == "body_too_large"

    def endless() -> Any:
        while True:
            yield b" " * 65536

    # No length is declared; the server stops reading.
    answer = server.http.post(COMPLETION, content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_more_than_would_ever_be_let_in_is_400(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(max_open_requests=2, max_open_tokens=100))
    assert refusal(server, COMPLETION, {"prompt": ["a", "b", "c"]})["param"] == "prompt"
    assert "max_open_tokens" in refusal(server, COMPLETION, {"prompt": "a" * 1000})["message"]
