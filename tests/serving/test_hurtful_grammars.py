"""Grammars made to hurt, by every field that takes one: a 400 that says so, and the server answers on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from phalanx.tests.engine.constraints.hurtful import EXPRESSIONS, GRAMMARS, SCHEMAS
from phalanx.tests.serving.servers import running

Body = dict[str, Any]
HELLO = [{"role": "user", "content": "Hi"}]
CHAT: Body = {"messages": HELLO, "max_tokens": 4}


def _responses(**fields: Any) -> tuple[str, Body]:
    return "/v1/responses", {"input": "Hi", "max_output_tokens": 16, **fields}


def _messages(**fields: Any) -> tuple[str, Body]:
    return "/v1/messages", {**CHAT, **fields}


def _chat(**fields: Any) -> tuple[str, Body]:
    return "/v1/chat/completions", {**CHAT, **fields}


def _tool(schema: Any, **fields: Any) -> Body:
    return {"type": "function", "function": {"name": "f", "parameters": schema, **fields}}


BY_SCHEMA: dict[str, Callable[[Any], tuple[str, Body]]] = {
    "response_format": lambda schema: _chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ),
    "structured_outputs": lambda schema: _chat(structured_outputs={"json": schema}),
    "structured_outputs as text": lambda schema: _chat(structured_outputs={"json": json.dumps(schema)}),
    "completions": lambda schema: (
        "/v1/completions",
        {"prompt": "Hi", "max_tokens": 4, "structured_outputs": {"json": schema}},
    ),
    "a structural tag": lambda schema: _chat(
        response_format={
            "type": "structural_tag",
            "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}],
            "triggers": ["<f"],
        }
    ),
    "a strict tool": lambda schema: _chat(tools=[_tool(schema, strict=True)]),
    "a required tool": lambda schema: _chat(tools=[_tool(schema)], tool_choice="required"),
    "text.format": lambda schema: _responses(text={"format": {"type": "json_schema", "name": "x", "schema": schema}}),
    "a tool of Responses": lambda schema: _responses(
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True}]
    ),
    "output_config": lambda schema: _messages(output_config={"format": {"type": "json_schema", "schema": schema}}),
    "a tool of Messages": lambda schema: _messages(
        tools=[{"name": "f", "input_schema": schema}], tool_choice={"type": "any"}
    ),
}
REFUSED = [
    name
    for name, (fields, why) in SCHEMAS.items()
    if why is not None and len(fields["json_schema"]) < 400_000 and name not in ("deep", "a huge number")
]
"""Refused schemas that JSON's readers let in."""


@pytest.fixture(scope="module")
def http(tiny: Path) -> Iterator[httpx.Client]:
    settings = ("dtype=float32", "max_model_len=256", "max_num_seqs=4", "kv_memory=2e7", "port=0")
    with running("serve", f"model={tiny}", *settings) as server, httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


def _refused(http: httpx.Client, path: str, body: Body) -> str:
    answer = http.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 400, (path, answer.status_code, answer.text[:300])
    message = answer.json()["error"]["message"]
    assert isinstance(message, str)
    assert len(message) < 1000
    return message


@pytest.mark.slow
@pytest.mark.parametrize("field", BY_SCHEMA)
def test_schemas_made_to_hurt_are_refused_by_every_field(http: httpx.Client, field: str) -> None:
    for name in REFUSED:
        path, body = BY_SCHEMA[field](json.loads(SCHEMAS[name][0]["json_schema"]))
        if "met by no text" in (SCHEMAS[name][1] or ""):  # beside other texts there are some
            continue
        _refused(http, path, body)
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.slow
def test_other_grammars_made_to_hurt_are_refused(http: httpx.Client) -> None:
    for fields, why in (*EXPRESSIONS.values(), *GRAMMARS.values()):
        if why is not None:
            _refused(http, *_chat(structured_outputs=fields))
    deep = '{"items":' * 5000 + "true" + "}" * 5000
    for text in (deep, "[" * 100_000, '{"a":' * 100_000):
        _refused(http, *_chat(structured_outputs={"json": text}))
        answer = http.post(
            "/v1/chat/completions", content=f'{{"messages": [], "structured_outputs": {{"json": {text}}}}}'
        )
        assert answer.status_code == 400
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.slow
def test_grammars_that_are_let_in_end_in_an_answer_or_in_a_reason(http: httpx.Client) -> None:
    for fields, why in (*EXPRESSIONS.values(), *GRAMMARS.values(), *SCHEMAS.values()):
        if why is not None:
            continue
        [(kind, value)] = fields.items()
        key = "json" if kind == "json_schema" else kind
        path, body = _chat(structured_outputs={key: value}, temperature=1.0, seed=1)
        answer = http.post(path, json={**body, "max_tokens": 24})
        assert answer.status_code in (200, 400), answer.text[:300]
        assert answer.status_code == 200 or "tokens of the answer" in answer.json()["error"]["message"]
