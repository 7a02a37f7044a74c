"""Responses and Messages with the official clients and the demo model, on 1, 2 and 3 ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from phalanx.tests.serving.agent_model import make_agent_model
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.servers import running

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SUMS = [
    ("1+1", "One and one make two.", "2"),
    ("2+2", "Two and two make four.", "4"),
    ("3+3", "Three and three make six.", "6"),
]


class Clients:
    """The official clients of one server, greedy."""

    def __init__(self, url: str) -> None:
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60)
        self.fields: Any = {"model": "agent"}

    def respond(self, items: Any, **fields: Any) -> Any:
        limits = {"temperature": 0, "max_output_tokens": 48}
        return self.openai.responses.create(**self.fields, input=items, **{**limits, **fields})

    def message(self, messages: Any, **fields: Any) -> Any:
        greedy = {"max_tokens": 48, "extra_body": {"temperature": 0}}
        return self.anthropic.messages.create(**self.fields, messages=messages, **{**greedy, **fields})


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)],
    ids=lambda ranks: f"ranks{ranks}",
)
def clients(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, smollm2: Path
) -> Iterator[Clients]:
    model = make_agent_model(tmp_path_factory.mktemp("models") / "agent", smollm2)
    settings = ("dtype=float32", "max_model_len=768", "max_num_seqs=4", "kv_memory=2e8", "port=0")
    with running("serve", f"model={model}", f"ranks={request.param}", *settings) as server:
        made = Clients(server.url)
        yield made
        made.openai.close()
        made.anthropic.close()


def asked(city: str) -> dict[str, Any]:
    return {"role": "user", "content": f"What is the weather in {city}?"}


def test_responses_think_call_go_on_and_are_kept(clients: Clients) -> None:
    items: list[Any] = []
    for question, thinking, answer in SUMS:
        thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thinking}]}
        items += [{"role": "user", "content": question}, thought, {"role": "assistant", "content": answer}]
    items.append({"role": "user", "content": "4+4"})
    variables = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    whole = clients.respond(items, **variables)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    assert whole.output[0].content[0].text.strip() == "Four and four make eight."
    assert whole.output_text.strip() == "8"
    assert 5 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens

    *_, last = events = list(clients.respond(items, stream=True, store=False, **variables))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len([event for event in events if event.type == "response.reasoning_text.delta"]) > 4
    assert last.response.output_text == whole.output_text

    more = clients.respond("5+5", previous_response_id=whole.id, **variables)
    assert more.output_text.strip() == "10"
    assert clients.openai.responses.retrieve(more.id).output_text == more.output_text

    tool: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
    history: list[Any] = []
    for city in ("Rome", "Berlin"):
        call = {
            "type": "function_call",
            "call_id": city,
            "name": "get_weather",
            "arguments": json.dumps({"city": city}),
        }
        history += [asked(city), call]
    (called,) = clients.respond([*history, asked("Paris")], tools=[tool]).output
    assert (called.type, called.name, json.loads(called.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Paris"},
    )


def test_a_response_in_the_background_ends_or_is_cancelled(clients: Clients) -> None:
    short = clients.respond("Hi", background=True, max_output_tokens=4)
    long = clients.respond("Count to one hundred, slowly.", background=True, max_output_tokens=600)
    assert clients.openai.responses.cancel(long.id).status in ("cancelled", "completed")
    wait_until(lambda: clients.openai.responses.retrieve(short.id).status in ("completed", "incomplete"))


def test_messages_think_call_and_are_counted(clients: Clients) -> None:
    messages: list[Any] = []
    for question, thinking, answer in SUMS:
        blocks = [{"type": "thinking", "thinking": thinking, "signature": "x"}, {"type": "text", "text": answer}]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": blocks}]
    messages.append({"role": "user", "content": "4+4"})
    thinks: Any = {"thinking": {"type": "enabled", "budget_tokens": 40}}
    whole = clients.message(messages, **thinks)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert (whole.content[0].thinking.strip(), whole.content[1].text.strip()) == ("Four and four make eight.", "8")
    assert whole.stop_reason == "end_turn"
    counted = clients.anthropic.messages.count_tokens(**clients.fields, messages=messages, **thinks)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens

    fields = {**clients.fields, "messages": messages, "max_tokens": 48, "extra_body": {"temperature": 0}, **thinks}
    with clients.anthropic.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    assert streamed.to_param()["content"][0] == whole.content[0]
    assert streamed.content[1].text == whole.content[1].text  # type: ignore[union-attr]
    silent = clients.message(messages)
    assert [block.type for block in silent.content] == ["text"]

    tool: Any = {"name": "get_weather", "input_schema": SCHEMA}
    history: list[Any] = []
    for city in ("Rome", "Berlin"):
        call = {"type": "tool_use", "id": city, "name": "get_weather", "input": {"city": city}}
        history += [asked(city), {"role": "assistant", "content": [call]}]
    called = clients.message([*history, asked("Paris")], tools=[tool], thinking={"type": "adaptive"})
    assert (called.stop_reason, called.content[0].input) == ("tool_use", {"city": "Paris"})
