"""/v1/chat/completions, with the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from phalanx.engine.errors import EngineFault
from phalanx.tests.serving.gateway.conftest import Server

HELLO = [{"role": "user", "content": "Hi"}]


def ask(server: Server, **fields: Any) -> Any:
    return server.openai.chat.completions.create(**{"model": "demo", "messages": HELLO, **fields})


def events(text: str) -> list[Any]:
    """The data of a stream's events, [DONE] as it is."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_an_answer_has_its_text_its_end_and_its_usage(server: Server) -> None:
    answer = ask(server)
    assert answer.object == "chat.completion"
    assert answer.model == "demo"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello world")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 11, 13)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_what_openais_schema_knows_is_there_in_its_type_or_left_out(server: Server) -> None:
    body = {"messages": HELLO}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["system_fingerprint"].startswith("phalanx-")
    assert "service_tier" not in answer
    assert answer["choices"][0]["message"]["annotations"] == []
    tier = server.http.post("/v1/chat/completions", json={**body, "service_tier": "auto"}).json()
    assert tier["service_tier"] == "default"
    # A message goes back as it came.
    again = server.http.post("/v1/chat/completions", json={"messages": [*HELLO, answer["choices"][0]["message"]]})
    assert again.status_code == 200


def test_a_stream_is_a_role_then_text_then_the_end(server: Server) -> None:
    text = server.http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True, "max_tokens": 5}).text
    *chunks, done = events(text)
    assert done == "[DONE]"
    assert chunks[0]["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert not any("usage" in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_any_text_comes_through_a_stream_as_it_is(server: Server) -> None:
    server.pool.answer = 'a "b"\n\\ data: [DONE] \x00 é 漢字 🎉 \ue000text\ue000'
    chunks = list(ask(server, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == server.pool.answer
    pieces = server.openai.completions.create(model="demo", prompt="x", max_tokens=99, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == server.pool.answer


def test_the_usage_comes_last_without_choices(server: Server) -> None:
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 13
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello world"


def test_continuous_usage_counts_what_has_come(server: Server) -> None:
    server.pool.token_s = 0.01
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(server, stream=True, extra_body={"stream_options": options}))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 11
    assert all(chunk.usage.prompt_tokens == 2 for chunk in chunks)


@pytest.mark.parametrize("streamed", [False, True])
def test_n_completions_have_their_index(server: Server, streamed: bool) -> None:
    answer = ask(server, n=3, stream=streamed)
    texts: dict[int, str] = {}
    for chunk in answer if streamed else [answer]:
        for choice in chunk.choices:
            part = choice.delta.content if streamed else choice.message.content
            texts[choice.index] = texts.get(choice.index, "") + (part or "")
    assert texts == {0: "Hello world", 1: "Hello world", 2: "Hello world"}


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_have_bytes_and_rivals(server: Server, streamed: bool) -> None:
    server.pool.answer = "Aé"
    answer = ask(server, logprobs=True, top_logprobs=2, stream=streamed)
    items = []
    for chunk in answer if streamed else [answer]:
        for choice in chunk.choices:
            items += (choice.logprobs and choice.logprobs.content) or []
    assert [item.token for item in items] == ["A", "\ufffd", "\ufffd"]
    assert b"".join(bytes(item.bytes) for item in items).decode() == "Aé"
    assert [(top.token, top.logprob) for top in items[0].top_logprobs] == [("A", -0.25), ("B", -2.0)]


def test_tokens_can_be_named_by_their_ids(server: Server) -> None:
    answer = ask(server, logprobs=True, extra_body={"return_tokens_as_token_ids": True}, max_tokens=1)
    assert answer.choices[0].logprobs.content[0].token == "token_id:72"


def test_every_field_of_sampling_reaches_the_engine(server: Server) -> None:
    more = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "bad_words": ["x"],
        "allowed_token_ids": [1, 2],
        "skip_special_tokens": False,
        "priority": -3,
        "cache_salt": "s",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    ask(
        server,
        max_completion_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        stop=["a", "b"],
        logit_bias={"5": 2},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        extra_body=more,
    )
    submit = server.pool.submits[-1]
    sampling = submit.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (9, 0.5, 0.9, 11)
    assert (sampling.stop, sampling.logit_bias) == (("a", "b"), {5: 2.0})
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (5, 0.1, 1.1, 2)
    assert sampling.ignore_eos
    assert sampling.include_stop_str_in_output
    assert not sampling.skip_special_tokens
    assert (sampling.stop_token_ids, sampling.bad_words, sampling.allowed_token_ids) == ((7,), ("x",), (1, 2))
    assert (submit.priority, submit.cache_salt) == (-3, "s")
    assert submit.chat_template_kwargs == {"enable_thinking": False}


def test_a_request_that_says_nothing_leaves_all_but_the_temperature_to_the_engine(server: Server) -> None:
    nothing = dict.fromkeys(["temperature", "top_p", "n", "stop", "seed", "max_tokens", "logprobs", "user", "tools"])
    assert server.http.post("/v1/chat/completions", json={"messages": HELLO, **nothing}).status_code == 200
    sampling = server.pool.submits[-1].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.n) == (1.0, None, 1)


def test_histories_reach_the_template(server: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    ask(
        server,
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "1?", "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
        ],
        tool_choice="none",
        tools=[{"type": "function", "function": {"name": "add"}}],
    )
    submit = server.pool.submits[-1]
    assert submit.messages == [
        {"role": "system", "content": "Be\nbrief"},
        {"role": "user", "content": "1?", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}],
            "reasoning": "hm",
            "reasoning_content": "hm",
        },
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]
    assert submit.tools == [{"type": "function", "function": {"name": "add"}}]


def test_an_answer_sent_back_as_it_came_is_accepted(server: Server) -> None:
    message = ask(server).choices[0].message
    ask(server, messages=[*HELLO, message.model_dump(), *HELLO])
    assert server.pool.submits[-1].messages[1] == {"role": "assistant", "content": "Hello world"}  # type: ignore[index]


def test_the_last_message_can_be_continued_and_echoed(server: Server) -> None:
    fields = {"continue_final_message": True, "add_generation_prompt": False, "echo": True}
    messages = [*HELLO, {"role": "assistant", "content": "Well, "}]
    answer = ask(server, messages=messages, extra_body=fields)
    assert answer.choices[0].message.content == "Well, Hello world"
    submit = server.pool.submits[-1]
    assert (submit.continue_final_message, submit.add_generation_prompt) == (True, False)

    chunks = list(ask(server, messages=messages, stream=True, extra_body=fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Well, Hello world"


def test_token_ids_log_probabilities_of_the_prompt_and_timings_on_request(server: Server) -> None:
    more = {"return_token_ids": True, "prompt_logprobs": 1, "return_timings": True}
    answer = ask(server, max_tokens=2, extra_body=more).model_dump()
    assert answer["choices"][0]["token_ids"] == list(b"He")
    assert answer["prompt_token_ids"] == list(b"Hi")
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1][str(ord("i"))]["decoded_token"] == "i"
    (timing,) = answer["timings"]
    assert timing["queue_s"] + timing["prefill_s"] + timing["decode_s"] == timing["total_s"] == 4.0


def test_the_stop_string_is_named(server: Server) -> None:
    server.pool.stop_reason = "END"
    assert ask(server).model_dump()["choices"][0]["stop_reason"] == "END"


def test_a_request_id_is_echoed(server: Server) -> None:
    answer = ask(server, extra_headers={"X-Request-Id": "mine"}, extra_body={"request_id": "other"})
    assert answer.id == "chatcmpl-mine"
    assert answer._request_id == "mine"
    assert ask(server, extra_body={"request_id": "other"}).id == "chatcmpl-other"


def test_a_failure_in_mid_stream_is_an_event_then_done(server: Server) -> None:
    server.pool.fail_after = (3, EngineFault("a row of NaN"))
    text = server.http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}).text
    *_, error, done = events(text)
    assert error["error"]["message"] == "a row of NaN"
    assert done == "[DONE]"
    with pytest.raises(openai.APIError, match="a row of NaN"):
        list(ask(server, stream=True))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_fault_before_the_first_token_is_a_status(server: Server, streamed: bool) -> None:
    server.pool.fail_first = EngineFault("a row of NaN")
    with pytest.raises(openai.InternalServerError, match="a row of NaN"):
        ask(server, stream=streamed)
