"""/v1/completions, /inference/v1/generate and the routes about tokens."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.test_chat import events


def ask(server: Server, prompt: Any = "Hi", **fields: Any) -> Any:
    return server.openai.completions.create(**{"model": "demo", "prompt": prompt, **fields})


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("ab", [("ab", None)]),
        (["ab", "c"], [("ab", None), ("c", None)]),
        ([1, 2, 3], [(None, [1, 2, 3])]),
        ([[1, 2], [3]], [(None, [1, 2]), (None, [3])]),
        ("", [("", None)]),
    ],
)
def test_prompts_are_texts_or_token_ids_or_lists_of_them(server: Server, prompt: Any, sent: Any) -> None:
    answer = ask(server, prompt, n=2)
    assert [(submit.prompt, submit.token_ids) for submit in server.pool.submits] == sent
    assert [choice.index for choice in answer.choices] == list(range(2 * len(sent)))
    assert {choice.text for choice in answer.choices} == {"Hello world"}
    assert answer.usage.completion_tokens == 22 * len(sent)


def test_the_default_of_new_tokens_is_openais(server: Server) -> None:
    server.pool.answer = "x" * 40
    (choice,) = ask(server).choices
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


def test_best_of_is_accepted_where_it_chooses_nothing(server: Server) -> None:
    for fields in ({"best_of": 1}, {"best_of": None}, {"best_of": 1, "n": None}, {"best_of": 3, "n": 3}):
        assert len(ask(server, **fields).choices) == (fields.get("n") or 1)
    for fields in ({"best_of": 2}, {"best_of": 3, "n": 2}, {"best_of": 1, "n": 2}, {"best_of": 0}):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(server, **fields)
        assert caught.value.param == "best_of"


def test_a_stream_of_several_prompts_keeps_them_apart(server: Server) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, done = events(server.http.post("/v1/completions", json=body).text)
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
            if choice["finish_reason"]:
                ends[choice["index"]] = choice["finish_reason"]
    assert texts == dict.fromkeys(range(4), "Hello world")
    assert ends == dict.fromkeys(range(4), "stop")
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["total_tokens"]) == ([], 46)
    assert done == "[DONE]"


def test_log_probabilities_have_offsets_into_the_text(server: Server) -> None:
    server.pool.answer = "aé!"
    (choice,) = ask(server, logprobs=2).choices
    assert choice.text == "aé!"
    assert choice.logprobs.tokens == ["a", "\ufffd", "\ufffd", "!"]
    assert choice.logprobs.text_offset == [0, 1, 1, 2]
    assert choice.logprobs.token_logprobs == [-0.25] * 4
    assert choice.logprobs.top_logprobs[0] == {"a": -0.25, "b": -2.0}


def test_offsets_go_on_through_a_stream(server: Server) -> None:
    server.pool.token_s = 0.01
    offsets = [
        offset
        for chunk in ask(server, logprobs=1, stream=True)
        for offset in getattr(chunk.choices[0].logprobs, "text_offset", [])
    ]
    assert offsets == list(range(11))


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_evaluation_harnesses_get_the_prompts_log_probabilities(server: Server, max_tokens: int) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    first, second = ask(server, [list(b"abc"), list(b"de")], **fields).choices
    assert first.text == "abc" + "H" * max_tokens
    assert first.logprobs.tokens == ["a", "b", "c", *"H" * max_tokens]
    assert first.logprobs.token_logprobs == [None, -0.25, -0.25, *[-0.25] * max_tokens]
    assert first.logprobs.top_logprobs[:2] == [None, {"b": -0.25}]
    assert first.logprobs.text_offset == list(range(3 + max_tokens))
    assert second.text == "de" + "H" * max_tokens
    assert server.pool.submits[0].sampling.prompt_logprobs == 1
    assert (first.finish_reason, server.pool.submits[0].sampling.max_tokens) == ("length", 1)


def test_a_text_is_echoed_as_it_was_given(server: Server) -> None:
    assert ask(server, "é?", echo=True).choices[0].text == "é?Hello world"
    chunks = list(ask(server, "é?", echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "é?Hello world"


def test_token_ids_of_prompt_and_answer_on_request(server: Server) -> None:
    (choice,) = ask(server, max_tokens=2, extra_body={"return_token_ids": True, "prompt_logprobs": 0}).choices
    made = choice.model_dump()
    assert (made["token_ids"], made["prompt_token_ids"]) == (list(b"He"), list(b"Hi"))
    assert [place and list(place) for place in made["prompt_logprobs"]] == [None, [str(ord("i"))]]


def test_special_tokens_are_added_unless_refused(server: Server) -> None:
    ask(server)
    ask(server, extra_body={"add_special_tokens": False})
    assert [submit.add_special_tokens for submit in server.pool.submits] == [True, False]


def test_token_ids_in_and_out(server: Server) -> None:
    body = {"token_ids": list(b"Hi"), "sampling_params": {"max_tokens": 3, "logprobs": 0, "n": 2}}
    answer = server.http.post("/inference/v1/generate", json=body).json()
    assert [choice["token_ids"] for choice in answer["choices"]] == [list(b"Hel")] * 2
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:72"
    assert server.pool.submits[-1].token_ids == list(b"Hi")

    *chunks, done = events(server.http.post("/inference/v1/generate", json={**body, "stream": True}).text)
    ids = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == 0
        for token in choice["token_ids"]
    ]
    assert (ids, done) == (list(b"Hel"), "[DONE]")


def test_texts_to_tokens_and_back(server: Server) -> None:
    answer = server.http.post("/tokenize", json={"prompt": "Hi", "return_token_strs": True}).json()
    assert answer == {"count": 2, "max_model_len": 4096, "tokens": [72, 105], "token_strs": ["H", "i"]}
    messages = [{"role": "user", "content": "yo"}]
    assert server.http.post("/tokenize", json={"messages": messages}).json()["tokens"] == list(b"yo")
    assert server.http.post("/detokenize", json={"tokens": [72, 105]}).json() == {"prompt": "Hi"}
    info = server.http.get("/tokenizer_info").json()
    assert (info["tokenizer_class"], info["model_max_length"]) == ("Bytes", 4096)


def test_models_are_listed_by_every_name(server: Server) -> None:
    assert [model.id for model in server.openai.models.list()] == ["demo", "org/alias"]
    assert server.openai.models.retrieve("org/alias").id == "org/alias"
    listed = server.anthropic.models.list()
    assert [(model.id, model.display_name, model.type) for model in listed] == [
        ("demo", "demo", "model"),
        ("org/alias", "org/alias", "model"),
    ]
    assert (listed.first_id, listed.last_id, listed.has_more) == ("demo", "org/alias", False)
    card = server.anthropic.models.retrieve("org/alias")
    assert (card.created_at.year >= 2024, card.lifecycle, card.max_input_tokens) == (True, "active", 4096)
    assert ask(server, model="org/alias").model == "org/alias"
    assert server.http.get("/version").json()["version"]
    assert server.http.get("/load").json()["server_load"] == 0
