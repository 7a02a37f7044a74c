"""truncate_prompt_tokens: the end of a prompt is kept, as many tokens as asked for or as fit."""

from __future__ import annotations

from typing import Any

import pytest
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
