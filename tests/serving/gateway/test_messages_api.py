"""/v1/messages and /v1/messages/count_tokens, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from phalanx.engine.errors import CapacityExceeded, EngineFault, InvalidRequest, prompt_too_long
from phalanx.serving.gateway.auth import Auth, AuthConfig
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.engine_pool import PoolState
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.conftest import Server
from starlette.middleware import Middleware

HELLO: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {"name": "get_weather", "description": "It tells.", "input_schema": {"type": "object", "properties": {}}}


def create(server: Server, **fields: Any) -> Any:
    return server.anthropic.messages.create(**{"model": "demo", "max_tokens": 100, "messages": HELLO, **fields})


def refusal(server: Server, body: dict[str, Any], status: int = 400) -> Any:
    before = len(server.pool.submits)
    answer = server.http.post("/v1/messages", json=body)
    assert answer.status_code == status, answer.text
    assert len(server.pool.submits) == before
    error = answer.json()
    assert (set(error), error["type"]) == ({"type", "error", "request_id"}, "error")
    assert error["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
    return error["error"]


def test_an_answer_has_its_blocks_its_end_and_its_usage(agent: Server) -> None:
    agent.pool.cached_tokens = 3
    agent.pool.answers = ["<think>hm</think>Hello world"]
    answer = create(agent, system="Be brief.", thinking={"type": "enabled", "budget_tokens": 50})
    thinking, text = answer.content
    assert (thinking.type, thinking.thinking, bool(thinking.signature)) == ("thinking", "hm", True)
    assert (text.type, text.text) == ("text", "Hello world")
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == ("message", "assistant", "demo", "end_turn")
    assert answer.id.startswith("msg_")
    usage = answer.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (8, 3, 5)
    submit = agent.pool.submits[-1]
    assert submit.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert submit.chat_template_kwargs == {"enable_thinking": True}
    assert submit.split_reasoning


def test_a_stream_is_put_together_by_the_client(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>I look: é 漢字." + tool_call("get_weather", '{"city": "Rome"}')]
    fields: Any = {"model": "demo", "max_tokens": 100, "messages": HELLO, "tools": [WEATHER]}
    with agent.anthropic.messages.stream(**fields) as stream:
        message = stream.get_final_message()
    thinking, text, call = message.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "hm"
    assert text.type == "text"
    assert text.text == "I look: é 漢字."
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", {"city": "Rome"})
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens_details.thinking_tokens == 1  # type: ignore[union-attr]


def test_every_field_of_sampling_reaches_the_engine(agent: Server) -> None:
    # The client knows these no longer; older ones send them.
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    create(agent, stop_sequences=["a", "b"], metadata={"user_id": "ann"}, extra_body=more)
    sampling = agent.pool.submits[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0.5, 0.9, 5, ("a", "b"))
    assert sampling.max_tokens == 100


@pytest.mark.parametrize(
    ("answer", "stop", "reason", "sequence"),
    [("one" + AgentPool.CUT, None, "max_tokens", None), ("one", "END", "stop_sequence", "END")],
)
def test_an_answer_says_why_it_ended(agent: Server, answer: str, stop: Any, reason: str, sequence: Any) -> None:
    agent.pool.answers, agent.pool.stop_reason = [answer], stop
    made = create(agent, stop_sequences=["END"])
    assert (made.stop_reason, made.stop_sequence) == (reason, sequence)


def test_every_kind_of_block_reaches_the_template(agent: Server) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    create(
        agent,
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief.", **cached}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "1?", **cached}]},
            {"role": "user", "content": "really"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "of another server"},
                    {"type": "redacted_thinking", "data": "AAAA"},
                    {"type": "text", "text": "I call."},
                    {"type": "tool_use", "id": "c1", "name": "get_weather", "input": {"city": "Rome"}},
                    {"type": "tool_use", "id": "c2", "name": "get_weather", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c1", "content": "sun"},
                    {"type": "tool_result", "tool_use_id": "c2", "is_error": True, "content": [
                        {"type": "text", "text": "no such city"}
                    ]},
                    {"type": "text", "text": "Go on", **cached},
                ],
            },
        ],
        tools=[{**WEATHER, **cached}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )  # fmt: skip
    calls = [
        {"type": "function", "function": {"name": "get_weather", "arguments": arguments}, "id": call_id}
        for call_id, arguments in (("c1", {"city": "Rome"}), ("c2", {}))
    ]
    submit = agent.pool.submits[-1]
    assert submit.messages == [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": "1?\nreally"},
        {"role": "assistant", "content": "I call.", "tool_calls": calls, "reasoning": "hm", "reasoning_content": "hm"},
        {"role": "tool", "content": "sun", "tool_call_id": "c1"},
        {"role": "tool", "content": "Error:\nno such city", "tool_call_id": "c2"},
        {"role": "user", "content": "Go on"},
    ]
    function = {"name": "get_weather", "description": "It tells.", "parameters": WEATHER["input_schema"]}
    assert submit.tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("thinking", "variables"),
    [
        (None, {"enable_thinking": False}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "adaptive"}, None),
        ({"type": "enabled", "budget_tokens": 20}, {"enable_thinking": True}),
    ],
)
def test_thinking_is_turned_on_and_off(agent: Server, thinking: Any, variables: Any) -> None:
    create(agent, **({} if thinking is None else {"thinking": thinking}))
    assert (agent.pool.submits[-1].chat_template_kwargs or None) == variables


def test_omitted_thinking_comes_back_in_its_signature(agent: Server) -> None:
    agent.pool.answers = ["<think>hm</think>One"]
    answer = create(agent, thinking={"type": "adaptive", "display": "omitted"})
    assert answer.content[0].thinking == ""
    create(agent, messages=[*HELLO, {"role": "assistant", "content": answer.content}, *HELLO])
    assert agent.pool.submits[-1].messages[1]["reasoning"] == "hm"  # type: ignore[index]


def test_a_last_message_of_the_assistant_is_continued(agent: Server) -> None:
    create(agent, messages=[*HELLO, {"role": "assistant", "content": "Well,"}])
    submit = agent.pool.submits[-1]
    assert (submit.continue_final_message, submit.add_generation_prompt) == (True, False)
    assert submit.messages[-1] == {"role": "assistant", "content": "Well,"}  # type: ignore[index]


def test_tokens_are_counted_as_the_model_gets_them(agent: Server) -> None:
    fields: Any = {"model": "demo", "messages": HELLO, "system": "Be brief.", "tools": [WEATHER]}
    counted = agent.anthropic.messages.count_tokens(**fields)
    assert counted.input_tokens == create(agent, **fields).usage.input_tokens == 11


def test_a_deferred_tool_is_known_once_a_result_refers_to_it(agent: Server) -> None:
    """As Claude Code searches its tools: those that were found are named in the result of its search."""
    search = {"name": "ToolSearch", "input_schema": {"type": "object"}}
    later = {"name": "Later", "input_schema": {"type": "object"}, "defer_loading": True}
    other = {"name": "Other", "input_schema": {"type": "object"}}
    request: dict[str, Any] = {"max_tokens": 10, "tools": [search, later, other], "messages": HELLO}

    def known() -> list[str]:
        answer = agent.http.post("/v1/messages", json=request)
        assert answer.status_code == 200, answer.text
        return [tool["function"]["name"] for tool in agent.pool.submits[-1].tools or []]

    assert known() == ["ToolSearch", "Other"]
    call = {"type": "tool_use", "id": "c", "name": "ToolSearch", "input": {}}
    found = {"type": "tool_reference", "tool_name": "Later"}
    result = {"type": "tool_result", "tool_use_id": "c", "content": [found]}
    request["messages"] = [*HELLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert known() == ["ToolSearch", "Later", "Other"]
    assert (agent.pool.submits[-1].messages or [])[-1]["content"] == "The tool Later can be called now."

    request["tools"] = [search]
    assert "messages[2].content[0].content[0].tool_name" in refusal(agent, request)["message"]


def test_a_schema_of_the_answer_reaches_the_engine(agent: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    create(agent, output_config={"format": {"type": "json_schema", "schema": schema}})
    structured = agent.pool.submits[-1].structured
    assert structured is not None
    assert json.loads(structured.json_schema or "") == schema


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "image"}]}
            ]}]},
            "messages[0].content[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": [
                {"type": "tool_use", "id": "c", "name": "f", "input": {}}
            ]}]},
            "messages[0]",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": []}] * 2}, "messages[1] has no text to go on with"),
        ({"messages": [*HELLO, {"role": "assistant", "content": []}]}, "messages[1] has no text to go on with"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type='any'"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"n": 2}, "n is not supported"),
        ({"nothing": 1}, "nothing"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(agent: Server, fields: dict[str, Any], named: str) -> None:
    error = refusal(agent, {"messages": HELLO, "max_tokens": 10, **fields})
    assert error["type"] == "invalid_request_error"
    assert named in error["message"], error


def test_errors_have_anthropics_types(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(max_body_bytes=1000))
    right = {"messages": HELLO, "max_tokens": 10}
    assert refusal(server, {**right, "model": "nobody"}, 404)["type"] == "not_found_error"
    assert refusal(server, {**right, "system": "x" * 2000}, 413)["type"] == "request_too_large"
    server.pool.refuse = CapacityExceeded("full")
    assert refusal(server, right, 429)["type"] == "rate_limit_error"
    server.pool.refuse = None
    server.pool.phase = PoolState("draining")
    with pytest.raises(anthropic.APIStatusError) as overloaded:
        create(server)
    assert overloaded.value.status_code == 529
    assert refusal(server, right, 529)["type"] == "overloaded_error"
    server.pool.phase = PoolState("ready")
    for method, path, status in (("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404)):
        answer = server.http.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (status, "error")


def test_a_key_is_taken_from_either_header(tmp_path: Path) -> None:
    server = Server(middleware=[Middleware(Auth, config=AuthConfig(api_key="sk-first-key"))])
    body = {"messages": HELLO, "max_tokens": 10}
    try:
        for headers in ({"x-api-key": "sk-first-key"}, {"authorization": "Bearer sk-first-key"}):
            assert httpx.post(f"{server.url}/v1/messages", json=body, headers=headers, timeout=60).status_code == 200
        with pytest.raises(anthropic.AuthenticationError) as caught:
            create(server)
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    finally:
        server.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_is_a_400(server: Server, stream: bool) -> None:
    server.pool.fail_first = InvalidRequest("top_k=-3 is out of range")
    with pytest.raises(anthropic.BadRequestError, match="top_k=-3 is out of range"):
        create(server, stream=stream)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (prompt_too_long(5000, 4096), "prompt is too long: 5000 tokens > 4095 maximum"),
        (InvalidRequest("the request begins with more than 9 bytes of text"), "prompt is too long: the request begins"),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_as_agents_expect_it(
    server: Server, refusal: InvalidRequest, message: str
) -> None:
    """Agents shorten a conversation, and try again, by the beginning of this message."""
    server.pool.fail_first = refusal
    with pytest.raises(anthropic.BadRequestError) as caught:
        create(server)
    assert caught.value.body["error"]["message"].startswith(message)  # type: ignore[index]


def test_a_failure_in_mid_stream_is_an_event(server: Server) -> None:
    server.pool.fail_after = (3, EngineFault("a row of NaN"))
    body = {"messages": HELLO, "max_tokens": 10, "stream": True}
    text = server.http.post("/v1/messages", json=body, headers={"x-request-id": "mine"}).text
    assert text.rstrip().rpartition("\n\n")[2] == (
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"a row of NaN"},"request_id":"mine"}'
    )
    with pytest.raises(anthropic.APIStatusError, match="a row of NaN"):
        list(create(server, stream=True))


def test_silence_is_filled_with_pings(make_gateway: Callable[[GatewayConfig], Server]) -> None:
    server = make_gateway(GatewayConfig(keep_alive_s=0.05))
    server.pool.start_s = 0.3
    text = server.http.post("/v1/messages", json={"messages": HELLO, "max_tokens": 10, "stream": True}).text
    assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
    assert text.index("message_start") > text.index("ping")
