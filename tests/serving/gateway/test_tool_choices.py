"""Which tools an answer may or must call, and what their arguments are then, with a pool that says what it is told."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from phalanx.tests.serving.gateway.agent_pool import tool_call
from phalanx.tests.serving.gateway.conftest import Server

HELLO: Any = [{"role": "user", "content": "Hi"}]


def function(name: str, **fields: Any) -> Any:
    return {"type": "function", "function": {"name": name, **fields}}


def ask(server: Server, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})


def grammar_of(server: Server) -> Any:
    """The structural tag of the request that the engine got last."""
    return json.loads(server.pool.submits[-1].structured.structural_tag)


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_only_allowed_tools_are_known_and_called(agent: Server, mode: str) -> None:
    tools = [function(name, parameters={"type": "object"}) for name in ("read", "write", "look")]
    allowed = {"mode": mode, "tools": [function("write"), function("look")]}
    agent.pool.answers = [tool_call("look", "{}")]
    answer = ask(agent, tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert answer.choices[0].message.tool_calls[0].function.name == "look"
    submit = agent.pool.submits[-1]
    assert submit.tools == tools[1:]
    assert (submit.structured is not None) == (mode == "required")


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        ({}, {"type": "object"}),
        ({"properties": {"a": {}}, "required": ["a"]}, {"type": "object", "properties": {"a": {}}, "required": ["a"]}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        ({"$ref": "#/$defs/A", "$defs": {"A": {}}}, {"type": "object", "$ref": "#/$defs/A", "$defs": {"A": {}}}),
    ],
)
def test_arguments_are_an_object_also_where_their_schema_does_not_say_so(
    agent: Server, parameters: Any, schema: Any
) -> None:
    ask(agent, tools=[function("read", parameters=parameters)], tool_choice="required")
    (structure,) = grammar_of(agent)["structures"]
    assert structure["schema"] == schema


def test_an_answer_of_a_form_leaves_room_for_a_call_whatever_the_models_own_form_is(agent: Server) -> None:
    agent.pool.model = msgspec.structs.replace(agent.pool.model, chat_template="<tool_call><function=x><parameter=y>")
    agent.pool.answers = [tool_call("read", '{"a": 1}')]
    tools = [function("read", parameters={"type": "object"})]
    answer = ask(agent, tools=tools, response_format={"type": "json_object"})
    assert len(grammar_of(agent)["structures"]) == 2
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("read", '{"a": 1}')
