"""What the official clients' own helpers make of answers, and send back of them."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pydantic
import pytest
from phalanx.tests.serving.gateway.agent_pool import tool_call
from phalanx.tests.serving.gateway.conftest import Server

HI: Any = {"role": "user", "content": "Hi"}


class Verdict(pydantic.BaseModel):
    good: bool


class Look(pydantic.BaseModel):
    """It looks."""

    where: str


CALL = tool_call("Look", '{"where": "up"}')
FORM = '{"good": true}'
_LOOK: Any = openai.pydantic_function_tool(Look)
LOOK: Any = {"type": "function", **_LOOK["function"]}


def sent(server: Server) -> list[dict[str, Any]]:
    """The messages of the last request, as the template gets them."""
    return list(server.pool.submits[-1].messages)


def test_a_parsed_answer_of_chat_is_sent_back_as_it_came(agent: Server) -> None:
    chat = agent.openai.chat.completions
    agent.pool.answers = [FORM, CALL, CALL]
    said = chat.parse(model="demo", messages=[HI], response_format=Verdict).choices[0].message
    assert said.parsed == Verdict(good=True)
    chat.create(model="demo", messages=[HI, said, HI])  # type: ignore[list-item]
    assert sent(agent)[1]["content"] == FORM

    agent.pool.answers = [CALL, "", CALL]
    called = chat.parse(model="demo", messages=[HI], tools=[_LOOK]).choices[0].message
    assert called.tool_calls
    assert called.tool_calls[0].function.parsed_arguments == Look(where="up")
    result: Any = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sky"}
    chat.create(model="demo", messages=[HI, called, result])  # type: ignore[list-item]
    with chat.stream(model="demo", messages=[HI], tools=[_LOOK]) as stream:
        streamed = stream.get_final_completion().choices[0].message
    chat.create(model="demo", messages=[HI, streamed.model_dump(), result])  # type: ignore[misc]
    assert sent(agent)[1]["tool_calls"][0]["function"] == {"name": "Look", "arguments": {"where": "up"}}


@pytest.mark.parametrize("dumped", [False, True])
def test_a_parsed_response_is_sent_back_as_it_came(agent: Server, dumped: bool) -> None:
    responses = agent.openai.responses
    agent.pool.answers = ["<think>hm</think>" + FORM, "", CALL]
    made = responses.parse(model="demo", input="Hi", text_format=Verdict)
    assert made.output_parsed == Verdict(good=True)
    output: Any = [item.model_dump(warnings=False) if dumped else item for item in made.output]
    responses.create(model="demo", input=[HI, *output, HI])
    assert (sent(agent)[1]["reasoning"], sent(agent)[1]["content"]) == ("hm", FORM)

    with responses.stream(model="demo", input="Hi", tools=[LOOK]) as stream:
        (call,) = stream.get_final_response().output
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sky"}  # type: ignore[union-attr]
    back: Any = call.model_dump(warnings=False) if dumped else call
    responses.create(model="demo", input=[HI, back, result])
    assert sent(agent)[1]["tool_calls"][0]["function"]["arguments"] == {"where": "up"}


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_tool_runner_goes_on_without_a_thread(agent: Server, stream: bool) -> None:
    @anthropic.beta_tool
    def look(where: str) -> str:
        """It looks."""
        return f"sky {where}"

    agent.pool.answers = [tool_call("look", '{"where": "up"}'), "done"]
    runner: Any = agent.anthropic.beta.messages.tool_runner(
        model="demo", max_tokens=50, messages=[HI], tools=[look], stream=stream
    )
    assert runner.until_done().content[0].text == "done"
    assert sent(agent)[-1]["content"] == "sky up"


def test_a_thread_is_refused_by_the_code_that_clients_go_by(agent: Server) -> None:
    body = {"messages": [HI], "max_tokens": 5, "thread": {"type": "create"}}
    answer = agent.http.post("/v1/messages", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["details"] == {"error_code": "thread_unsupported_request"}
    assert (
        "details" not in agent.http.post("/v1/messages", json={**body, "thread": None, "speed": "fast"}).json()["error"]
    )


def test_what_has_no_effect_here_is_taken(agent: Server) -> None:
    breakpoint = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    part = {"type": "text", "text": "x", **breakpoint}
    chat = {"messages": [{"role": "user", "content": [part]}], "verbosity": "medium"}
    direct = {"caller": {"type": "direct"}}
    items = [
        {"role": "user", "content": [{**part, "type": "input_text"}]},
        {"type": "function_call", "call_id": "c", "name": "Look", "arguments": "{}", **direct},
        {"type": "function_call_output", "call_id": "c", "output": "sky", "name": "Look", **direct},
    ]
    tool = {**LOOK, "allowed_callers": ["direct"], "defer_loading": False}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"input": items, "tools": [tool], "reasoning": {"context": "auto", "mode": "standard"}}),
        ("/v1/messages", {"messages": [HI], "max_tokens": 5, "user_profile_id": "u"}),
    ):
        answer = agent.http.post(path, json=body)
        assert answer.status_code == 200, answer.text


def test_examples_of_a_tools_input_are_in_its_schema(agent: Server) -> None:
    schema: Any = {"type": "object", "properties": {"where": {"type": "string"}}}
    agent.anthropic.messages.create(
        model="demo", max_tokens=5, messages=[HI],
        tools=[{"name": "look", "input_schema": schema, "input_examples": [{"where": "up"}]}],
    )  # fmt: skip
    tool = agent.pool.submits[-1].tools[0]["function"]
    assert tool["parameters"] == {**schema, "examples": [{"where": "up"}]}
