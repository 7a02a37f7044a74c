"""What an answer must match, as requests over HTTP give it, and how refusals name the request's own field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from phalanx.engine.errors import InvalidRequest
from phalanx.engine.protocol.structured import StructuredOutput
from phalanx.tests.serving.gateway.conftest import Server

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}


def _body(path: str, **fields: Any) -> dict[str, Any]:
    start = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {**start, **fields}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": False},
                }
            },
            StructuredOutput(json_schema=json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=json.dumps(SCHEMA))),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, StructuredOutput(json_schema='{"type": "null"}')),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutput(grammar='start: "a"')),
    ],
)
def test_every_form_reaches_the_engine(
    server: Server, path: str, fields: dict[str, Any], expected: StructuredOutput | None
) -> None:
    assert server.http.post(path, json=_body(path, **fields)).status_code == 200
    assert server.pool.submits[-1].structured == expected


def test_structural_tags_reach_the_engine(server: Server) -> None:
    tag = {"structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a"]}
    body = _body(CHAT, response_format={"type": "structural_tag", **tag})
    assert server.http.post(CHAT, json=body).status_code == 200
    assert json.loads(server.pool.submits[-1].structured.structural_tag) == tag


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "said", "param"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            "structured.json_schema.properties.a.not is not supported",
            "response_format.json_schema.schema.properties.a.not",
        ),
        (
            {"structured_outputs": {"json": SCHEMA}},
            'structured.json_schema.properties["a b"] cannot be made a grammar',
            'structured_outputs.json.properties["a b"]',
        ),
        ({"structured_outputs": {"regex": "("}}, "structured.regex cannot be", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured.choice[0] is", "structured_outputs.choice[0]"),
        ({"response_format": {"type": "json_object"}}, "structured: no token is left", "response_format"),
    ],
)
def test_the_engines_refusal_names_the_field_of_the_request(
    server: Server, fields: dict[str, Any], said: str, param: str, stream: bool
) -> None:
    server.pool.fail_first = InvalidRequest(said)
    answer = server.http.post(CHAT, json=_body(CHAT, stream=stream, **fields))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_the_older_fields_are_refused_with_the_name_of_the_newer(server: Server) -> None:
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        answer = server.http.post(CHAT, json=_body(CHAT, **{name: "a"}))
        assert answer.status_code == 400
        assert f"structured_outputs.{name.removeprefix('guided_')}" in answer.json()["error"]["message"]


FUNCTION = {"name": "second", "parameters": SCHEMA}
CALLED: Any = [{"type": "function", "function": {"name": "first"}}, {"type": "function", "function": FUNCTION}]
PARAMETERS = "tools[1].function.parameters.properties.a"


@pytest.mark.parametrize(
    ("path", "fields", "index", "param"),
    [
        (CHAT, {"tools": CALLED, "tool_choice": "required"}, 1, PARAMETERS),
        (CHAT, {"tools": CALLED, "tool_choice": {"type": "function", "function": {"name": "second"}}}, 0, PARAMETERS),
        (
            "/v1/responses",
            {"input": "Hi", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
            0,
            "tools[0].parameters.properties.a",
        ),
        (
            "/v1/messages",
            {
                "max_tokens": 9,
                "tools": [{"name": "second", "input_schema": SCHEMA}],
                "tool_choice": {"type": "any"},
            },
            0,
            "tools[0].input_schema.properties.a",
        ),
    ],
)
def test_a_schema_of_a_tool_is_named_where_the_request_has_it(
    server: Server, path: str, fields: dict[str, Any], index: int, param: str
) -> None:
    server.pool.fail_first = InvalidRequest(
        f"structured.structural_tag.structures[{index}].schema.properties.a is not supported"
    )
    body = {"model": "demo", **fields} if "input" in fields else {"model": "demo", **_body(CHAT, **fields)}
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(f"{param} is not supported"), message


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (
            "/v1/responses",
            {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
            "text.format.schema.properties.a",
        ),
        (
            "/v1/messages",
            {"max_tokens": 9, "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            "output_config.format.schema.properties.a",
        ),
    ],
)
def test_a_schema_of_an_answer_is_named_where_the_other_faces_have_it(
    server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    server.pool.fail_first = InvalidRequest("structured.json_schema.properties.a is not supported")
    body = {"model": "demo", **fields} if "input" in fields else {"model": "demo", **_body(CHAT, **fields)}
    answer = server.http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(f"{param} is not supported")
