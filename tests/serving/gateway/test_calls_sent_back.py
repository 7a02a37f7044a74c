"""Calls with arguments that a client cannot be expected to mend: they come out on each face, and are taken back."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.conftest import Server

HELLO: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: Any = {"type": "object", "properties": {"path": {"type": "string"}}}
CHAT_TOOLS: Any = [{"type": "function", "function": {"name": "read", "parameters": SCHEMA}}]
RESPONSES_TOOLS: Any = [{"type": "function", "name": "read", "parameters": SCHEMA, "strict": False}]
MESSAGES_TOOLS: Any = [{"name": "read", "input_schema": SCHEMA, "allowed_callers": ["direct"]}]

HUGE = '{"id": 123456789012345678901234567890}'
STRANGE = [HUGE, '{"x": 1e999}', '{"x": NaN}', r'{"x": "\ud800"}', "[1, 2]", "5", '{"a": ' + "[" * 99 + "]" * 99 + "}"]
"""What is no JSON object, or one with what has no place in the protocol."""


def sent(server: Server) -> Any:
    """The arguments of the call that the template got; they can be encoded."""
    messages = server.pool.submits[-1].messages
    msgspec.msgpack.encode(messages)
    (call,) = next(message["tool_calls"] for message in messages if "tool_calls" in message)
    return call["function"]["arguments"]


@pytest.mark.parametrize("arguments", STRANGE, ids=range(len(STRANGE)))
def test_chat_takes_back_the_arguments_that_it_gave(agent: Server, arguments: str) -> None:
    agent.pool.answers = [tool_call("read", arguments)]
    chat = agent.openai.chat.completions
    message = chat.create(model="demo", messages=HELLO, tools=CHAT_TOOLS).choices[0].message
    (call,) = message.tool_calls or ()
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "x"}
    chat.create(model="demo", messages=[*HELLO, message, result], tools=CHAT_TOOLS)
    assert sent(agent) == call.function.arguments  # type: ignore[union-attr]


@pytest.mark.parametrize("arguments", STRANGE, ids=range(len(STRANGE)))
def test_responses_take_back_the_arguments_that_they_gave(agent: Server, arguments: str) -> None:
    agent.pool.answers = [tool_call("read", arguments)]
    first = agent.openai.responses.create(model="demo", input="Hi", tools=RESPONSES_TOOLS)
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "x"}]
    agent.openai.responses.create(model="demo", input=[HELLO[0], call.to_dict(), *result])
    assert sent(agent) == call.arguments
    agent.openai.responses.create(model="demo", input=result, previous_response_id=first.id)
    assert sent(agent) == call.arguments


@pytest.mark.parametrize("arguments", STRANGE, ids=range(len(STRANGE)))
def test_messages_take_back_the_input_that_they_gave(agent: Server, arguments: str) -> None:
    agent.pool.answers = [tool_call("read", arguments)]
    fields: Any = {"model": "demo", "max_tokens": 10, "tools": MESSAGES_TOOLS}
    message = agent.anthropic.messages.create(messages=HELLO, **fields)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.input == (json.loads(HUGE) if arguments == HUGE else {"INVALID_JSON": arguments})
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "x"}
    said: Any = [{"role": "assistant", "content": [call.to_dict()]}, {"role": "user", "content": [result]}]
    agent.anthropic.messages.create(messages=[*HELLO, *said], **fields)
    assert sent(agent) == (arguments.replace(" ", "") if arguments == HUGE else arguments)


def test_an_answer_without_text_is_taken_back_by_clients_that_know_no_thinking(agent: Server) -> None:
    agent.pool.answers = ["<think>hm" + AgentPool.CUT]
    chat = agent.openai.chat.completions
    message = chat.create(model="demo", messages=HELLO).choices[0].message
    assert message.content is None
    said: Any = [*HELLO, {"role": "assistant", "content": message.content}, *HELLO]
    chat.create(model="demo", messages=said)
    assert agent.pool.submits[-1].messages == [*HELLO, {"role": "assistant", "content": ""}, *HELLO]


def test_arguments_of_null_are_none(agent: Server) -> None:
    function = {"name": "read", "arguments": "null"}
    called: Any = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    agent.openai.chat.completions.create(model="demo", messages=[*HELLO, called])
    assert sent(agent) == {}


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_cut_off_is_an_incomplete_item(agent: Server, stream: bool) -> None:
    agent.pool.answers = [
        tool_call("read", '{"path": "a"}') + '\n<tool_call>\n{"name": "read", "arguments": {"pa' + AgentPool.CUT
    ]
    made: Any = agent.openai.responses.create(model="demo", input="Hi", tools=RESPONSES_TOOLS, stream=stream)
    if stream:
        made = next(event.response for event in made if event.type == "response.incomplete")
    assert made.status == "incomplete"
    assert [(item.arguments, item.status) for item in made.output] == [
        ('{"path": "a"}', "completed"),
        ('{"pa', "incomplete"),
    ]


def test_no_instructions_are_no_message(agent: Server) -> None:
    agent.openai.responses.create(model="demo", input="Hi", instructions="")
    for system in ("", []):
        agent.anthropic.messages.create(model="demo", max_tokens=10, messages=HELLO, system=system)
    assert [submit.messages for submit in agent.pool.submits] == [HELLO] * 3
