"""/v1/responses, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from phalanx.engine.errors import CapacityExceeded, EngineFault, InvalidRequest
from phalanx.serving.gateway.auth import Auth, AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from starlette.middleware import Middleware

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
USER = {"role": "user", "content": "Hi"}


def create(server: Server, **fields: Any) -> Any:
    return server.openai.responses.create(**{"model": "demo", "input": "Hi", **fields})


def refusal(server: Server, body: dict[str, Any], status: int = 400) -> Any:
    before = len(server.pool.submits)
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == status, answer.text
    assert len(server.pool.submits) == before
    return answer.json()["error"]


def test_an_answer_has_its_text_its_status_and_its_usage(agent: Server) -> None:
    answer = create(agent, instructions="Be brief.", metadata={"a": "b"}, user="ann", max_output_tokens=9)
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "demo")
    assert answer.output_text == "Hello world"
    assert answer.id.startswith("resp_")
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (11, 4, 15)
    assert (answer.metadata, answer.instructions, answer.user) == ({"a": "b"}, "Be brief.", "ann")
    submit = agent.pool.submits[-1]
    assert submit.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert submit.sampling.max_tokens == 9


def test_a_stream_is_put_together_by_the_client(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>Hello é 漢字 🎉"]
    with agent.openai.responses.stream(model="demo", input="Hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == "Hello é 漢字 🎉"
    assert final.output[0].content[0].text == "hm"  # type: ignore[union-attr, index]
    assert final.usage.output_tokens_details.reasoning_tokens == 1  # type: ignore[union-attr]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert [event.sequence_number for event in create(agent, stream=True)] == list(range(9))


def test_an_answer_at_its_limit_is_incomplete(agent: Server) -> None:
    agent.pool.answers = ["Hello" + AgentPool.CUT]
    answer = create(agent)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_log_probabilities_come_where_they_are_asked_for(server: Server) -> None:
    server.pool.answer = "Aé"
    for fields in ({"top_logprobs": 2}, {"include": ["message.output_text.logprobs"]}):
        (item,) = create(server, **fields).output[0].content[0].logprobs[:1]
        assert (item.token, item.logprob, len(item.top_logprobs)) == ("A", -0.25, fields.get("top_logprobs", 0))
    deltas = [event for event in create(server, top_logprobs=1, stream=True) if event.type.endswith("text.delta")]
    assert [item.token for event in deltas for item in event.logprobs] == ["A", "\ufffd", "\ufffd"]
    assert create(server).output[0].content[0].logprobs == []


def test_every_kind_of_item_reaches_the_template(agent: Server) -> None:
    create(
        agent,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "I call.", "annotations": []}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sun"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
            {"role": "assistant", "phase": "final_answer", "content": "Sun."},
            {"role": "user", "content": "Thanks"},
        ],
    )
    calls = [("c1", {"city": "Rome"}), ("c2", {})]
    made = [
        {"type": "function", "function": {"name": "get_weather", "arguments": arguments}, "id": call_id}
        for call_id, arguments in calls
    ]
    assert agent.pool.submits[-1].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "I call.", "tool_calls": made, "reasoning": "hm", "reasoning_content": "hm"},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "rain", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Sun."},
        {"role": "user", "content": "Thanks"},
    ]


def test_a_call_is_an_item_and_its_tool_is_shown(agent: Server) -> None:
    agent.pool.answers = [tool_call("get_weather", '{"city": "Rome"}')]
    answer = create(agent, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False)
    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "get_weather", {"city": "Rome"})
    assert answer.tools[0].name == "get_weather"
    assert answer.parallel_tool_calls is False
    function = agent.pool.submits[-1].tools[0]["function"]  # type: ignore[index]
    assert function == {"name": "get_weather", "parameters": WEATHER["parameters"]}


def test_functions_of_a_namespace_are_known_by_a_joined_name_and_called_by_their_own(agent: Server) -> None:
    spawn = {"type": "function", "name": "spawn", "description": "Starts one.", "parameters": {"type": "object"}}
    wait = {"type": "function", "name": "wait", "strict": False}
    space: Any = {"type": "namespace", "name": "agents", "description": "Sub-agents.", "tools": [spawn, wait]}
    said = tool_call("agents__spawn", '{"task": "x"}') + tool_call("get_weather", "{}")
    agent.pool.answers = [said, said, "done"]
    answer = agent.http.post("/v1/responses", json={"input": "Hi", "tools": [WEATHER, space]}).json()
    calls = [item for item in answer["output"] if item["type"] == "function_call"]
    assert [(call["name"], call.get("namespace")) for call in calls] == [("spawn", "agents"), ("get_weather", None)]
    assert "namespace" not in calls[1]
    assert answer["tools"][1]["tools"][0] == {**spawn, "strict": None}
    functions = [tool["function"] for tool in agent.pool.submits[-1].tools or []]
    assert [function["name"] for function in functions] == ["get_weather", "agents__spawn", "agents__wait"]
    assert functions[1]["description"] == "Sub-agents.\n\nStarts one."
    assert "description" not in functions[2]

    events = [event for event in create(agent, tools=[space], stream=True) if event.type.endswith("item.done")]
    assert events[0].item.model_dump()["namespace"] == "agents"

    # What is sent back is what the model said.
    output = {"type": "function_call_output", "call_id": calls[0]["call_id"], "output": "1"}
    create(agent, input=[USER, calls[0], output], tools=[space], store=False)
    history = agent.pool.submits[-1].messages or []
    assert history[1]["tool_calls"][0]["function"]["name"] == "agents__spawn"


def test_a_function_of_a_namespace_can_be_chosen(agent: Server) -> None:
    inner = [{"type": "function", "name": name} for name in ("spawn", "wait")]
    tools = [WEATHER, {"type": "namespace", "name": "agents", "description": "Sub-agents.", "tools": inner}]
    named = {"type": "function", "namespace": "agents", "name": "wait"}
    agent.pool.answers = [tool_call("agents__wait", "{}")] * 2
    answer = create(agent, tools=tools, tool_choice=named)
    assert answer.output[-1].name == "wait"
    create(agent, tools=tools, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [named]})
    functions = [tool["function"] for tool in agent.pool.submits[-1].tools or []]
    assert functions == [{"name": "agents__wait", "description": "Sub-agents."}]


def test_allowed_tools_are_the_only_ones_that_the_template_knows(agent: Server) -> None:
    other = {**WEATHER, "name": "other"}
    choice: Any = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    assert create(agent, tools=[WEATHER, other], tool_choice=choice).tool_choice.mode == "auto"
    (tool,) = agent.pool.submits[-1].tools or ()
    assert tool["function"]["name"] == "other"  # type: ignore[index]
    choice["tools"][0]["name"] = "nothing"
    error = refusal(agent, {"input": "Hi", "tools": [WEATHER], "tool_choice": choice})
    assert error["param"] == "tool_choice.tools[0].name"


@pytest.mark.parametrize(
    ("effort", "variables"),
    [
        ("none", {"enable_thinking": False, "reasoning_effort": "none"}),
        ("low", {"reasoning_effort": "low"}),
        (None, None),
    ],
)
def test_effort_is_told_to_the_template(agent: Server, effort: Any, variables: Any) -> None:
    answer = create(agent, reasoning={"effort": effort, "summary": "auto"})
    assert answer.reasoning.effort == effort
    submit = agent.pool.submits[-1]
    assert submit.chat_template_kwargs == variables
    assert submit.split_reasoning


def test_a_response_goes_on_with_the_one_before(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>One", "Two", "Three"]
    first = create(agent, instructions="Be brief.", input="1?")
    second = create(agent, previous_response_id=first.id, input="2?")
    create(agent, previous_response_id=second.id, input="3?", instructions="Be long.")
    assert [(message["role"], message["content"]) for message in agent.pool.submits[-1].messages or ()] == [
        *[("system", "Be long."), ("user", "1?"), ("assistant", "One")],
        *[("user", "2?"), ("assistant", "Two"), ("user", "3?")],
    ]
    assert second.previous_response_id == first.id

    got = agent.openai.responses.retrieve(second.id)
    assert (got.output_text, got.status) == ("Two", "completed")
    listed = agent.openai.responses.input_items.list(second.id, order="asc", limit=2)
    assert [item.type for item in listed.data] == ["message", "reasoning"]
    assert listed.has_more
    every = [item.type for item in agent.openai.responses.input_items.list(second.id, order="asc", limit=1)]
    assert every == ["message", "reasoning", "message", "message"]


def test_an_item_of_a_stored_response_can_be_named(agent: Server) -> None:
    first = create(agent)
    create(agent, input=[USER, {"type": "item_reference", "id": first.output[0].id}, USER])
    assert [message["content"] for message in agent.pool.submits[-1].messages or ()] == ["Hi", "Hello world", "Hi"]
    error = refusal(agent, {"input": [{"type": "item_reference", "id": "msg_1"}]})
    assert (error["param"], error["code"]) == ("input[0].id", "item_not_found")


def test_what_is_not_stored_or_was_deleted_is_not_found(agent: Server) -> None:
    kept, lost = create(agent, stream=False), create(agent, store=False)
    assert (kept.store, lost.store) == (True, False)
    agent.openai.responses.delete(kept.id)
    for response_id in (kept.id, lost.id, "resp_1"):
        with pytest.raises(openai.NotFoundError):
            agent.openai.responses.retrieve(response_id)
        # OpenAI's code, by which agents send the whole conversation instead.
        with pytest.raises(openai.BadRequestError, match=r"Previous response .* not found") as caught:
            create(agent, previous_response_id=response_id)
        assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")


def test_a_streamed_response_is_kept_before_its_end_is_sent(agent: Server) -> None:
    for event in create(agent, stream=True):
        if event.type == "response.completed":
            assert agent.openai.responses.retrieve(event.response.id).output_text == "Hello world"


def test_thinking_comes_back_as_it_was_sealed(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>One"]
    answer = create(agent, store=False, include=["reasoning.encrypted_content"])
    thinking, message = answer.output
    # As an agent does: without the content, which it does not keep.
    again = {"type": "reasoning", "summary": [], "encrypted_content": thinking.encrypted_content}
    create(agent, input=[USER, again, message.model_dump(), USER], store=False)
    assert agent.pool.submits[-1].messages[1]["reasoning"] == "hm"  # type: ignore[index]
    error = refusal(agent, {"input": [USER, {**again, "encrypted_content": "gAAAA"}]})
    assert error["param"] == "input[1].encrypted_content"


def test_a_kept_response_is_shown_with_what_include_asks_for(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>One", "<think>ah</think>Two"]
    kept, include = agent.openai.responses, ["reasoning.encrypted_content", "message.output_text.logprobs"]
    sealed = create(agent, include=include[:1])
    plain = create(agent, reasoning={"summary": "auto"}, previous_response_id=sealed.id)
    assert kept.retrieve(sealed.id, include=include) == kept.retrieve(sealed.id) == sealed  # type: ignore[arg-type]
    assert getattr(kept.retrieve(plain.id, include_obfuscation=False).output[0], "encrypted_content", None) is None
    thinking = kept.retrieve(plain.id, include=include).output[0]  # type: ignore[arg-type]
    again = {"type": "reasoning", "summary": [], "encrypted_content": thinking.encrypted_content}  # type: ignore[union-attr]
    third = create(agent, input=[USER, again, USER])
    assert agent.pool.submits[-1].messages[1]["reasoning"] == "ah"  # type: ignore[index]

    listed = kept.input_items.list(plain.id, include=include, order="asc").data  # type: ignore[arg-type]
    assert [item.type for item in listed] == ["message", "reasoning", "message", "message"]
    assert listed[1].encrypted_content == sealed.output[0].encrypted_content  # type: ignore[union-attr]
    (_, given, _) = kept.input_items.list(third.id, include=include, order="asc").data  # type: ignore[arg-type]
    assert given.encrypted_content == again["encrypted_content"]  # type: ignore[union-attr]
    for fields in ({"include": ["file_search_call.results"]}, {"include_obfuscation": True}):
        with pytest.raises(openai.BadRequestError) as caught:
            kept.retrieve(plain.id, **fields)  # type: ignore[call-overload]
        assert str(caught.value.param).startswith(next(iter(fields)))


def test_a_response_in_the_background_is_asked_for_later(agent: Server) -> None:
    agent.pool.token_s = 0.02
    made = create(agent, background=True)
    assert made.status in ("queued", "in_progress")
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        create(agent, previous_response_id=made.id)
    wait_until(lambda: agent.openai.responses.retrieve(made.id).status == "completed")
    assert agent.openai.responses.retrieve(made.id).output_text == "Hello world"
    assert agent.open_requests == 0


def test_a_response_in_the_background_is_queued_until_the_engine_has_begun(server: Server) -> None:
    server.pool.start_s = 0.2
    server.pool.token_s = 0.05
    made = create(server, background=True)
    seen = [made.status]
    while seen[-1] not in ("completed", "failed"):
        seen.append(server.openai.responses.retrieve(made.id).status)
    assert list(dict.fromkeys(seen)) == ["queued", "in_progress", "completed"]


def test_a_response_in_the_background_is_cancelled(agent: Server) -> None:
    agent.pool.token_s = 5.0
    made = create(agent, background=True)
    wait_until(lambda: bool(agent.pool.tickets))
    cancelled = agent.openai.responses.cancel(made.id)
    assert cancelled.status == "cancelled"
    assert agent.pool.tickets[-1].aborted.wait(60)
    assert agent.openai.responses.cancel(made.id).status == "cancelled"  # again
    assert agent.open_requests == 0

    deleted = create(agent, background=True)
    agent.openai.responses.delete(deleted.id)
    assert agent.pool.tickets[-1].aborted.wait(60)
    with pytest.raises(openai.NotFoundError):
        agent.openai.responses.retrieve(deleted.id)
    agent.pool.token_s = 0.0
    other = create(agent)
    with pytest.raises(openai.BadRequestError, match="background"):
        agent.openai.responses.cancel(other.id)


def test_a_response_in_the_background_may_fail(agent: Server) -> None:
    server = agent
    server.pool.refuse = CapacityExceeded("full")
    with pytest.raises(openai.RateLimitError):
        create(server, background=True)
    server.pool.refuse = None


def test_the_failure_of_a_response_is_its_last_event(server: Server) -> None:
    server.pool.fail_after = (3, EngineFault("a row of NaN"))
    *_, error, failed = list(create(server, stream=True))
    assert (error.type, error.message, error.code) == ("error", "a row of NaN", "engine_fault")
    assert (failed.type, failed.response.error.message) == ("response.failed", "a row of NaN")
    assert server.openai.responses.retrieve(failed.response.id).status == "failed"
    made = create(server, background=True)
    wait_until(lambda: server.openai.responses.retrieve(made.id).status == "failed")
    with pytest.raises(openai.InternalServerError, match="a row of NaN"):
        create(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_names_the_field(server: Server, stream: bool) -> None:
    server.pool.fail_first = InvalidRequest("the prompt has 5000 tokens, more than max_model_len=4096")
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, stream=stream)
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "colour": "red"}]}, "input[0].colour"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 1}]}, "input[0].arguments"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "deferred": True}]}, "tools[0].deferred"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"text": {"format": {"type": "poem"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"truncation": "some"}, "truncation"),
        ({"include": ["web_search_call.results"]}, "include[0]"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "background"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"temperature": -1}, "temperature"),
        ({"nothing": 1}, "nothing"),
    ],
)
def test_what_is_not_supported_is_named(agent: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(agent, {"input": "Hi", **fields})
    assert (error["param"] or "").startswith(param), error
    assert error["message"]


@pytest.mark.parametrize(
    ("path", "param"),
    [("?stream=true", "stream"), ("?x=1", "x"), ("/input_items?limit=0", "limit"), ("/input_items?after=x", "after")],
)
def test_a_query_is_checked(agent: Server, path: str, param: str) -> None:
    made = create(agent)
    answer = agent.http.get(f"/v1/responses/{made.id}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert agent.http.get(f"/v1/responses/{made.id}?stream=false").json()["id"] == made.id


def count(server: Server, **fields: Any) -> int:
    counted = server.openai.responses.input_tokens.count(**{"model": "demo", **fields})
    assert counted.object == "response.input_tokens"
    return int(counted.input_tokens)


def test_an_inputs_tokens_are_counted_as_the_model_gets_them(agent: Server) -> None:
    fields: Any = {"input": [USER, {"role": "assistant", "content": "Hm"}, USER], "instructions": "Be brief."}
    made = create(agent, **fields)
    submits = len(agent.pool.submits)
    assert count(agent, **fields, tools=[WEATHER], reasoning={"effort": "low"}) == made.usage.input_tokens == 15
    next_one = count(agent, previous_response_id=made.id, input="More")
    assert next_one == 6 + len(made.output_text) + len("More")
    assert count(agent, previous_response_id=made.id) == next_one - len("More")
    assert count(agent, instructions="Be brief.", input="") == len("Be brief.")

    # The very body of a response is taken.
    body = {"input": "Hi", "max_output_tokens": 5, "stream": True, "store": True}
    assert agent.http.post("/v1/responses/input_tokens", json=body).json()["input_tokens"] == 2
    assert len(agent.pool.submits) == submits


def test_what_cannot_be_counted_is_named(agent: Server) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": "Hi", "personality": "friendly"}, "personality"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "Hi", "conversation": "conv_1"}, "conversation"),
    ):
        answer = agent.http.post("/v1/responses/input_tokens", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert agent.http.get("/v1/responses/input_tokens").status_code == 404


def test_a_response_may_go_on_without_an_input(agent: Server) -> None:
    first = create(agent)
    create(agent, previous_response_id=first.id, input=None)
    assert [message["content"] for message in agent.pool.submits[-1].messages] == ["Hi", "Hello world"]
    assert refusal(agent, {"model": "demo"})["param"] == "input"


def test_a_conversation_is_compacted_into_a_summary_that_takes_its_place(agent: Server) -> None:
    agent.pool.answers = ["Hello", "<think>hm</think>They said Hi. é", "Bye"]
    first = create(agent)
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c1", "output": "sun"}
    compacted = agent.openai.responses.compact(
        model="demo",
        instructions="Be brief.",
        previous_response_id=first.id,
        input=[call, output, USER],  # type: ignore[list-item]
    )
    assert compacted.object == "response.compaction"
    assert [item.type for item in compacted.output] == ["message", "message", "compaction"]
    assert (compacted.usage.output_tokens, compacted.usage.output_tokens_details.reasoning_tokens) == (6, 1)

    asked = agent.pool.submits[-1]
    roles = ["system", "user", "assistant", "tool", "user", "user"]
    assert [message["role"] for message in asked.messages] == roles
    assert asked.messages[0]["content"] == "Be brief."
    assert "summary" in asked.messages[-1]["content"]
    assert asked.chat_template_kwargs["enable_thinking"] is False
    assert asked.sampling.max_tokens == agent.pool.model.max_model_len // 4

    # The output is the next input, as it came.
    window = compacted.to_dict(warnings=False)["output"]
    made = create(agent, input=[*window, {"role": "user", "content": "Go on"}])  # type: ignore[misc]
    texts = [message["content"] for message in agent.pool.submits[-1].messages]
    assert texts[:2] == ["Hi", "Hi"]
    assert texts[2].endswith(":\nThey said Hi. é")
    assert texts[3] == "Go on"
    create(agent, previous_response_id=made.id)
    assert texts[2] in [message["content"] for message in agent.pool.submits[-1].messages]


def test_a_summary_that_breaks_off_says_so_and_none_is_an_error(agent: Server) -> None:
    agent.pool.answers = ["They said" + AgentPool.CUT, "<think>hm</think>" + AgentPool.CUT]
    output = agent.http.post("/v1/responses/compact", json={"input": "Hi"}).json()["output"]
    create(agent, input=[output[-1]])
    assert "They said\n[The summary breaks off here.]" in agent.pool.submits[-1].messages[0]["content"]

    agent.pool.answers = ["<think>hm</think>" + AgentPool.CUT]
    none = agent.http.post("/v1/responses/compact", json={"input": "Hi"})
    assert (none.status_code, none.json()["error"]["type"]) == (422, "invalid_request_error")


def test_a_compaction_that_cannot_be_is_named(agent: Server) -> None:
    for body, param in (
        ({}, "input"),
        ({"input": "Hi", "stream": True}, "stream"),
        ({"input": [{"type": "compaction", "encrypted_content": "gAAA"}]}, "input[0].encrypted_content"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id"),
    ):
        answer = agent.http.post("/v1/responses/compact", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert agent.http.get("/v1/responses/compact").json()["error"]["code"] == "response_not_found"


def test_a_server_that_keeps_nothing_says_so(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(stored_responses=0))
    assert create(server).store is False
    for field in ("store", "background"):
        assert refusal(server, {"input": "Hi", field: True})["param"] == field


def test_each_key_has_its_own_responses(tmp_path: Path) -> None:
    keys = ("sk-first-key", "sk-second-key")
    file = tmp_path / "keys"
    file.write_text("\n".join(keys))
    file.chmod(0o600)
    server = Server(middleware=[Middleware(Auth, config=AuthConfig(api_keys_file=str(file)))])
    first, second = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in keys)
    try:
        made = first.responses.create(model="demo", input="Hi")
        for ask in (second.responses.retrieve, second.responses.cancel, second.responses.delete):
            with pytest.raises(openai.NotFoundError):
                ask(made.id)
        with pytest.raises(openai.BadRequestError, match="not found"):
            second.responses.create(model="demo", input="Hi", previous_response_id=made.id)
        with pytest.raises(openai.BadRequestError, match="not known"):
            second.responses.create(model="demo", input=[{"type": "item_reference", "id": made.output[0].id or ""}])
        assert first.responses.retrieve(made.id).id == made.id
        assert httpx.get(f"{server.url}/v1/responses/{made.id}", timeout=60).status_code == 401
    finally:
        first.close()
        second.close()
        server.close()
