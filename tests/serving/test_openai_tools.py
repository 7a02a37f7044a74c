"""Tools and thinking with the official client and the demo model, on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from phalanx.tests.serving.agent_model import make_agent_model
from phalanx.tests.serving.gateway.test_chat_tools import Streamed
from phalanx.tests.serving.servers import running

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SUMS = {
    "1+1": ("One and one make two.", "2"),
    "2+2": ("Two and two make four.", "4"),
    "3+3": ("Three and three make six.", "6"),
}


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)],
    ids=lambda ranks: f"ranks{ranks}",
)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2: Path
) -> Iterator[openai.OpenAI]:
    model = make_agent_model(tmp_path_factory.mktemp("models") / "agent", smollm2)
    settings = ("dtype=float32", "max_model_len=768", "max_num_seqs=4", "kv_memory=2e8", "port=0")
    with running("serve", f"model={model}", f"ranks={request.param}", *settings) as server:
        made = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
        yield made
        made.close()


def ask(client: openai.OpenAI, messages: Any, **fields: Any) -> Any:
    """A greedy answer."""
    return client.chat.completions.create(
        **{"model": "agent", "messages": messages, "temperature": 0, "max_tokens": 48, **fields}
    )


def weather(city: str) -> dict[str, Any]:
    return {"role": "user", "content": f"What is the weather in {city}?"}


def call_for(city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": city, "type": "function", "function": function}],
    }


WEATHER = [weather("Rome"), call_for("Rome"), weather("Berlin"), call_for("Berlin"), weather("Paris")]


def sums(question: str) -> list[Any]:
    """A question after answers that were thought about."""
    made: list[Any] = []
    for asked, (thinking, answer) in SUMS.items():
        made += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer, "reasoning": thinking},
        ]
    return [*made, {"role": "user", "content": question}]


def test_a_tool_is_called_whole_and_streamed_and_its_result_is_taken(client: openai.OpenAI) -> None:
    choice = ask(client, WEATHER, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert choice.message.content is None

    streamed = Streamed(ask(client, WEATHER, tools=TOOLS, stream=True))
    assert (streamed.content, streamed.finish_reason) == ("", "tool_calls")
    assert [(made["name"], made["arguments"]) for made in streamed.calls] == [("get_weather", call.function.arguments)]
    assert len(streamed.chunks) > 4  # as it grew

    result = {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}
    answer = ask(client, [*WEATHER, choice.message.model_dump(exclude_none=True), result], tools=TOOLS)
    assert answer.choices[0].finish_reason in ("stop", "tool_calls", "length")
    assert answer.usage.prompt_tokens > 0

    text = ask(client, WEATHER, tools=TOOLS, tool_choice="none").choices[0].message
    assert (text.tool_calls, text.content.count("<tool_call>")) == (None, 1)


@pytest.mark.parametrize("variables", [{"enable_thinking": True}, {"enable_thinking": False}, {}])
def test_thinking_is_apart_whether_the_prompt_opens_it_closes_it_or_leaves_it_open(
    client: openai.OpenAI, variables: dict[str, bool]
) -> None:
    more: Any = {"extra_body": {"chat_template_kwargs": variables}}
    answer = ask(client, sums("4+4"), **more)
    message = answer.choices[0].message
    assert message.content.strip() == "8"
    thinking = "" if variables.get("enable_thinking") is False else "Four and four make eight."
    assert (getattr(message, "reasoning", None) or "").strip() == thinking
    tokens = answer.usage.completion_tokens_details.reasoning_tokens
    assert (tokens > 5) == bool(thinking)
    assert tokens < answer.usage.completion_tokens

    streamed = Streamed(ask(client, sums("4+4"), stream=True, **more))
    assert streamed.content == message.content
    assert streamed.reasoning == streamed.reasoning_content == (getattr(message, "reasoning", None) or "")


def test_stop_strings_wait_for_the_answer_unless_asked(client: openai.OpenAI) -> None:
    thinks: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = ask(client, sums("4+4"), stop=["make"], extra_body=thinks).choices[0]
    assert (answer.message.content.strip(), answer.stop_reason) == ("8", None)
    sooner = ask(client, sums("4+4"), stop=["make"], extra_body={**thinks, "stop_in_reasoning": True}).choices[0]
    assert (sooner.message.content, sooner.message.reasoning) == (None, "Four and four ")
    assert (sooner.stop_reason, sooner.ended_in_reasoning) == ("make", True)
    at_length = ask(client, sums("4+4"), max_tokens=3, extra_body=thinks).choices[0]
    assert (at_length.finish_reason, at_length.ended_in_reasoning) == ("length", True)


def test_thinking_may_be_left_out(client: openai.OpenAI) -> None:
    answer = ask(client, sums("4+4"), reasoning_effort="low", extra_body={"include_reasoning": False})
    assert answer.choices[0].message.content.strip() == "8"
    assert not hasattr(answer.choices[0].message, "reasoning")
    assert answer.usage.completion_tokens_details.reasoning_tokens > 5
    plain = ask(client, sums("4+4"), reasoning_effort="none")
    assert (plain.choices[0].message.content, plain.usage.completion_tokens_details.reasoning_tokens) == ("8", 0)


COLOUR: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": ["red", "blue"]}, "coats": {"type": "integer", "maximum": 9}},
            "required": ["colour", "coats"],
            "additionalProperties": False,
        },
    },
}


def arguments_of(message: Any) -> list[dict[str, Any]]:
    return [json.loads(call.function.arguments) for call in message.tool_calls]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required_is_made_whatever_the_model_would_say(
    client: openai.OpenAI, choice: Any, stream: bool
) -> None:
    fields: dict[str, Any] = {"tools": [*TOOLS, COLOUR], "tool_choice": choice, "parallel_tool_calls": False}
    for seed in range(4):
        sampled = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "stream": stream, **fields}
        made = ask(client, [{"role": "user", "content": "Hello!"}], **sampled)
        if stream:
            whole = Streamed(made)
            calls, ended = [(call["name"], json.loads(call["arguments"])) for call in whole.calls], whole.finish_reason
        else:
            message, ended = made.choices[0].message, made.choices[0].finish_reason
            calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls]
        ((name, arguments),) = calls
        assert ended == "tool_calls"
        if name == "paint":
            assert arguments["colour"] in ("red", "blue")
            assert 9 >= arguments["coats"] == int(arguments["coats"])
        else:
            assert (name, choice) == ("get_weather", "required")
            assert isinstance(arguments["city"], str)


def test_an_answer_with_tools_and_a_form_is_one_of_both(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer", "maximum": 99}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    for seed in range(4):
        sampled = {"temperature": 1.0, "seed": seed, "max_tokens": 120}
        choice = ask(client, sums("4+4"), tools=TOOLS, response_format=form, **sampled).choices[0]
        if choice.finish_reason == "tool_calls":
            assert isinstance(arguments_of(choice.message)[0]["city"], str)
        elif choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content)["sum"], int)
