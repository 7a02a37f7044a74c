"""The end of what is too long is kept: tokens with truncate_prompt_tokens, items of a response with truncation."""

from __future__ import annotations

from typing import Any

import pytest
from phalanx.engine.errors import InvalidRequest
from phalanx.tests.serving.gateway.conftest import Server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 7}, 7),
        ({"truncate_prompt_tokens": 4096}, 4096),
        ({"truncate_prompt_tokens": -1, "max_tokens": 96}, 4000),
        ({"truncate_prompt_tokens": -1}, 4095),
        ({}, None),
    ],
)
def test_the_engine_is_told_how_many_tokens_of_a_conversation_to_keep(
    server: Server, fields: dict[str, Any], kept: int | None
) -> None:
    answer = server.http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert answer.status_code == 200, answer.text
    assert server.pool.submits[-1].truncate_prompt_tokens == kept


def test_of_a_completions_prompt_the_end_is_kept_and_echoed(server: Server) -> None:
    def ask(prompt: Any, **fields: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": 2, "truncate_prompt_tokens": 3, **fields}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    ask([[1, 2, 3, 4, 5], [6, 7]])
    assert [submit.token_ids for submit in server.pool.submits] == [[3, 4, 5], [6, 7]]
    ask("Once upon")
    assert server.pool.submits[-1].truncate_prompt_tokens == 3
    ask("Once upon", truncate_prompt_tokens=-1)
    assert server.pool.submits[-1].truncate_prompt_tokens == 4094
    assert ask("Once upon", echo=True) == "ponHe"
    assert bytes(server.pool.submits[-1].token_ids or []) == b"pon"


def test_tokenize_counts_what_is_kept(server: Server) -> None:
    for body, kept in (({"prompt": "Once upon"}, b"upon"), ({"messages": MESSAGES}, None)):
        answer = server.http.post("/tokenize", json={**body, "truncate_prompt_tokens": 4}).json()
        assert answer["count"] == len(answer["tokens"]) == 4
        assert kept is None or bytes(answer["tokens"]) == kept
    assert server.http.post("/tokenize", json={"prompt": "Once", "truncate_prompt_tokens": -1}).json()["count"] == 4


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"truncate_prompt_tokens": 0}),
        ("/v1/chat/completions", {"truncate_prompt_tokens": -2}),
        ("/v1/chat/completions", {"truncate_prompt_tokens": 4097}),
        ("/v1/chat/completions", {"truncate_prompt_tokens": -1, "max_tokens": 4096}),
        ("/tokenize", {"truncate_prompt_tokens": 4097}),
    ],
)
def test_a_number_that_no_prompt_can_have_is_refused(server: Server, path: str, fields: dict[str, Any]) -> None:
    answer = server.http.post(path, json={"messages": MESSAGES, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncate_prompt_tokens")
    assert server.pool.submits == []


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def respond(server: Server, **fields: Any) -> Any:
    answer = server.http.post("/v1/responses", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def contents(server: Server) -> list[str]:
    """What the messages that the engine got begin with."""
    return [str(message["content"]).rstrip("x") for message in server.pool.submits[-1].messages or []]


@pytest.mark.parametrize(
    ("sizes", "most", "kept"),
    [
        ([1000, 1000, 1000, 1000], None, 4),  # of a context of 4096 tokens, bytes here
        ([1000, 1000, 1000, 1090], 1, 4),
        ([1000, 1000, 1000, 1100], 1, 3),
        ([1000, 1000, 1000, 1100], None, 2),  # a quarter is for the answer
        ([1000, 1000, 1000, 1000], 100, 3),
        ([1000, 1000, 1000, 1000], 3000, 1),
        ([9000, 10, 10, 10], None, 3),
        ([9000, 9000, 9000, 10], None, 1),
        ([10, 10, 10, 4000], 1000, 1),  # the engine says whether it fits without that room
    ],
)
def test_a_conversation_that_is_too_long_loses_its_first_items(
    server: Server, sizes: list[int], most: int | None, kept: int
) -> None:
    items = [user(f"{number}".ljust(size, "x")) for number, size in enumerate(sizes)]
    answer = respond(server, input=items, truncation="auto", max_output_tokens=most)
    assert contents(server) == ["0", "1", "2", "3"][-kept:]
    assert answer["truncation"] == "auto"
    assert respond(server, input="Hi")["truncation"] == "disabled"


def test_instructions_stay_and_responses_before_leave_first(server: Server) -> None:
    first = respond(server, input=[user("0" + "x" * 2000), user("1" + "x" * 1000)])
    fields = {"previous_response_id": first["id"], "input": "2" + "x" * 1000, "instructions": "Be brief."}
    fields |= {"truncation": "auto", "max_output_tokens": 500}
    answer = respond(server, **fields)
    assert contents(server) == ["Be brief.", "1", "Hello world", "2"]

    # They are left out for the model; the response after it has them again, as far as they fit.
    listed = server.http.get(f"/v1/responses/{answer['id']}/input_items?order=asc").json()["data"]
    assert len(listed) == 4
    counted = server.http.post("/v1/responses/input_tokens", json=fields).json()
    assert counted["input_tokens"] == len("Be brief.") + 1001 + len("Hello world") + 1001


def test_what_a_tool_returned_leaves_with_its_call_and_a_path_names_the_item_that_was_sent(server: Server) -> None:
    calls = [
        {"type": kind, "call_id": f"c{number}", **fields}
        for number in range(3)
        for kind, fields in (
            ("function_call", {"name": "f", "arguments": "{}"}),
            ("function_call_output", {"output": f"{number}" + "x" * 1500}),
        )
    ]
    respond(server, input=[user("Go on"), *calls], truncation="auto", max_output_tokens=100)
    messages: Any = server.pool.submits[-1].messages
    assert [(message["role"], message.get("tool_call_id")) for message in messages] == [
        ("assistant", None), ("tool", "c1"), ("assistant", None), ("tool", "c2"),
    ]  # fmt: skip

    # The last output alone is too long: its call stays with it.
    calls[-1] = {**calls[-1], "output": "y" * 9000}
    respond(server, input=[user("Go on"), *calls], truncation="auto")
    assert [message["role"] for message in server.pool.submits[-1].messages or []] == ["assistant", "tool"]

    bad = [user("x" * 9000), {"role": "user", "content": [{"type": "input_image"}]}]
    refused = server.http.post("/v1/responses", json={"input": bad, "truncation": "auto"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[1].content[0].type")


def test_a_conversation_that_nobody_can_count_is_refused_as_the_engine_refuses_it(server: Server) -> None:
    server.pool.fail_first = InvalidRequest("the prompt has 9000 tokens")
    body = {"input": [user("x" * 9000)], "truncation": "auto"}
    refused = server.http.post("/v1/responses", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert len(server.pool.submits) == 1


def test_of_a_very_long_conversation_not_much_more_is_counted_than_fits(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    ask = server.pool.ask

    async def counting(question: Any) -> Any:
        answer = await ask(question)
        counted.append(len(answer.token_ids))
        return answer

    monkeypatch.setattr(server.pool, "ask", counting)
    sizes = [900] * 400 + [100] * 30
    items = [user(f"{number}".ljust(size, "x")) for number, size in enumerate(sizes)]
    respond(server, input=items, truncation="auto", max_output_tokens=96)
    assert contents(server) == [str(number) for number in range(399, 430)]  # 900 + 30 * 100 tokens of 4000
    assert max(counted) < 40_000
    assert len(counted) <= 12

    # All is counted where all but the first item fit: white space may be few tokens.
    counted.clear()
    respond(server, input=[user("0" + "x" * 300_000), user("1")], truncation="auto")
    assert (contents(server), counted) == (["1"], [300_002])
