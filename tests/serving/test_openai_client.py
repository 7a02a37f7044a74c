"""The official client drives every feature against the demo model, served by launch.serve on 1, 2 and 3 ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from phalanx.tests.serving.gateway.scripted_pool import wait_until
from phalanx.tests.serving.servers import running

PARIS: Any = [{"role": "user", "content": "What is the capital of France?"}]
OPEN: Any = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "One, two,"}]
SEEDED: dict[str, list[str]] = {}
"""What the first server of this module gave for a seed; every other one, of more ranks, gives the same."""
ONCE, FRANCE = "Once upon a time", "The capital of France is"


class Client:
    """The official client and a plain one of one server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=url, timeout=60)

    def chat(self, messages: Any = PARIS, **fields: Any) -> Any:
        """A greedy conversation; what is no field of OpenAI's goes through extra_body."""
        return self._ask(self.openai.chat.completions.create, {"messages": messages}, fields)

    def text(self, prompt: Any = ONCE, **fields: Any) -> Any:
        """A greedy completion."""
        return self._ask(self.openai.completions.create, {"prompt": prompt}, fields)

    def _ask(self, create: Any, given: dict[str, Any], fields: dict[str, Any]) -> Any:
        return create(**{"model": "smollm2-135m", "temperature": 0, "max_tokens": 12, **given, **fields})

    def ids(self, text: str) -> list[int]:
        """The token ids of a text."""
        return list(self.http.post("/tokenize", json={"prompt": text}).json()["tokens"])

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        found = [float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{")]
        assert found, name
        return sum(found)


@pytest.fixture(
    scope="module",
    params=[1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)],
    ids=lambda ranks: f"ranks{ranks}",
)
def client(request: pytest.FixtureRequest, smollm2: Path) -> Iterator[Client]:
    settings = ("dtype=float32", "max_model_len=512", "max_num_seqs=16", "kv_memory=4e8", "port=0")
    with running("serve", f"model={smollm2}", f"ranks={request.param}", "poll_interval_s=0.1", *settings) as server:
        made = Client(server.url)
        yield made
        made.openai.close()
        made.http.close()


def text_of(stream: Any) -> tuple[str, list[Any]]:
    """The text of a stream, and its chunks."""
    chunks = list(stream)
    parts = [choice for chunk in chunks for choice in chunk.choices]
    return "".join((part.delta.content or "") if hasattr(part, "delta") else part.text for part in parts), chunks


def test_a_chat_is_the_same_whole_and_streamed_and_its_usage_adds_up(client: Client) -> None:
    whole = client.chat()
    assert "Paris" in whole.choices[0].message.content
    assert whole.model in {model.id for model in client.openai.models.list()}
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens

    options = {"include_usage": True, "continuous_usage_stats": True}
    text, chunks = text_of(client.chat(stream=True, stream_options=options))
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, whole.usage.completion_tokens)
    _, plain = text_of(client.chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in plain] == [True] * (len(plain) - 1) + [False]


def test_prompts_are_texts_token_ids_and_lists_of_either(client: Client) -> None:
    alone = [client.text(prompt).choices[0].text for prompt in (ONCE, FRANCE)]
    ids = [client.ids(prompt) for prompt in (ONCE, FRANCE)]
    assert client.text(ids[0]).choices[0].text == alone[0]
    for prompts in ([ONCE, FRANCE], ids):
        answer = client.text(prompts)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == alone
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    text, _ = text_of(client.text(ONCE, stream=True))
    assert text == alone[0]


def test_n_answers_and_seeds(client: Client) -> None:
    def sampled(**fields: Any) -> list[str]:
        answer = client.chat(temperature=1.0, max_tokens=8, **fields)
        return [choice.message.content for choice in answer.choices]

    three = sampled(n=3, seed=7)
    assert len(set(three)) > 1
    assert sampled(n=3, seed=7) == three
    assert SEEDED.setdefault("three", three) == three  # by whatever number of ranks
    # A seed's first answer does not depend on how many there are.
    assert sampled(seed=7) == three[:1]
    assert sampled(seed=8) != three[:1]
    chunks = list(client.chat(temperature=1.0, max_tokens=8, n=3, seed=7, stream=True))
    for index in range(3):
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(parts) == three[index]


def test_logprobs_have_bytes_and_the_likeliest(client: Client) -> None:
    wanted: Any = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}  # before its end, which has no text
    (choice,) = client.chat(**wanted).choices
    items = choice.logprobs.content
    assert b"".join(bytes(item.bytes) for item in items).decode() == choice.message.content
    for item in items:
        assert [item.token, item.logprob] == [item.top_logprobs[0].token, item.top_logprobs[0].logprob]
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].logprob >= item.top_logprobs[1].logprob >= item.top_logprobs[2].logprob
    chunks = list(client.chat(stream=True, **wanted))
    streamed = [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    assert [item.token for item in streamed] == [item.token for item in items]
    assert [item.logprob for item in streamed] == pytest.approx([item.logprob for item in items], abs=1e-3)

    made = client.text(logprobs=2).choices[0]
    assert "".join(made.logprobs.tokens) == made.text
    assert made.logprobs.text_offset == list(itertools.accumulate(map(len, made.logprobs.tokens[:-1]), initial=0))
    assert all(len(top) == 2 for top in made.logprobs.top_logprobs)
    as_ids = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    named = client.text(logprobs=1, extra_body=as_ids).choices[0]
    assert named.logprobs.tokens == [f"token_id:{token}" for token in named.token_ids]


def test_an_echo_and_prompt_logprobs_score_a_prompt(client: Client) -> None:
    ids = client.ids(FRANCE)
    echo = client.text(ids, max_tokens=0, echo=True, logprobs=1)
    (choice,) = echo.choices
    assert choice.text == FRANCE
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.token_logprobs) == len(ids)
    assert echo.usage.completion_tokens == 0

    scored = client.text(FRANCE, max_tokens=1, extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    assert scored[0] is None
    found = [place[str(token)]["logprob"] for place, token in zip(scored[1:], ids[1:], strict=True)]
    assert found == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-3)
    chat = client.chat(max_tokens=1, extra_body={"prompt_logprobs": 0, "return_token_ids": True})
    assert len(chat.prompt_logprobs) == len(chat.prompt_token_ids) == chat.usage.prompt_tokens


def test_choices_are_shaped(client: Client) -> None:
    plain = client.text(FRANCE, extra_body={"return_token_ids": True}).choices[0]
    first, rest = plain.token_ids[0], plain.token_ids[1:]

    def ids(**fields: Any) -> list[int]:
        extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
        return list(client.text(FRANCE, extra_body=extra, **fields).choices[0].token_ids)

    assert first not in ids(logit_bias={str(first): -100})
    assert set(ids(extra_body={"allowed_token_ids": [first, rest[0]]})) <= {first, rest[0]}
    banned = client.text(FRANCE, extra_body={"bad_words": [" Paris"]}).choices[0].text
    assert " Paris" in plain.text
    assert " Paris" not in banned
    long: Any = {"max_tokens": 32, "extra_body": {"ignore_eos": True}}
    repeated = ids(**long)
    penalised = ids(presence_penalty=2.0, frequency_penalty=2.0, **long)
    assert len(set(penalised)) > len(set(repeated))
    again = ids(max_tokens=32, extra_body={"ignore_eos": True, "repetition_penalty": 2.0})
    assert len(set(again)) > len(set(repeated))
    narrow: Any
    for narrow in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-9}, {"extra_body": {"min_p": 1.0}}):
        assert ids(temperature=1.0, max_tokens=4, **narrow) == plain.token_ids[:4]


def test_answers_stop(client: Client) -> None:
    (choice,) = client.text(FRANCE, stop=[" Paris"]).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", " Paris")
    kept = client.text(FRANCE, stop=[" Paris"], extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == " Paris"
    text, chunks = text_of(client.text(FRANCE, stop=[" Paris"], stream=True))
    assert (text, chunks[-1].choices[0].finish_reason) == ("", "stop")

    token = client.ids(" Paris")[0]
    by_token = client.text(FRANCE, extra_body={"stop_token_ids": [token]}).choices[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", token)
    later = client.text(FRANCE, extra_body={"stop_token_ids": [token], "min_tokens": 4, "return_token_ids": True})
    assert len(later.choices[0].token_ids) >= 4

    ended = client.chat(max_tokens=32)
    assert ended.choices[0].finish_reason == "stop"
    going = client.chat(max_tokens=32, extra_body={"ignore_eos": True})
    assert (going.choices[0].finish_reason, going.usage.completion_tokens) == ("length", 32)


def test_a_last_message_is_continued(client: Client) -> None:
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    answer = client.chat(OPEN, extra_body=fields).choices[0].message
    assert answer.content.lstrip().startswith("three")
    echoed = client.chat(OPEN, extra_body={**fields, "echo": True}).choices[0].message
    assert echoed.content == "One, two," + answer.content


def test_tokens_and_texts_go_both_ways(client: Client) -> None:
    for text in ("Hello é", "a  b\n", "漢字 😀"):
        tokens = client.http.post("/tokenize", json={"prompt": text}).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert client.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text
    body = {"messages": PARIS, "chat_template_kwargs": {"enable_thinking": False}}
    tokens = client.http.post("/tokenize", json=body).json()["tokens"]
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    assert client.chat(max_tokens=1, extra_body=variables).usage.prompt_tokens == len(tokens)
    without = client.http.post("/tokenize", json={**body, "add_generation_prompt": False}).json()["tokens"]
    assert tokens[: len(without)] == without
    assert len(without) < len(tokens)

    whole = client.text(FRANCE, extra_body={"return_token_ids": True}).choices[0]
    body = {"token_ids": client.ids(FRANCE), "sampling_params": {"temperature": 0, "max_tokens": 12, "logprobs": 1}}
    made = client.http.post("/inference/v1/generate", json=body).json()["choices"][0]
    assert made["token_ids"] == whole.token_ids == whole.token_ids[: len(made["logprobs"]["content"])]


def test_requests_have_names(client: Client) -> None:
    named = client.chat(max_tokens=1, extra_body={"request_id": "mine"})
    assert named.id == "chatcmpl-mine"
    raw = client.openai.chat.completions.with_raw_response.create(
        model="smollm2-135m", messages=PARIS, max_tokens=1, extra_headers={"X-Request-Id": "yours"}
    )
    assert raw.headers["x-request-id"] == "yours"
    assert raw.parse().id == "chatcmpl-yours"
    assert raw.request_id == "yours"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(client: Client, stream: bool) -> None:
    fields = {"max_tokens": 450, "n": 2, "extra_body": {"ignore_eos": True}}
    if stream:
        events = client.text(stream=True, **fields)
        next(iter(events))
        events.close()
    else:
        with contextlib.suppress(openai.APITimeoutError):
            client.openai.with_options(timeout=0.3).completions.create(model="smollm2-135m", prompt=ONCE, **fields)

    def nothing_runs() -> bool:
        held = ("num_requests_running", "num_requests_waiting")
        return client.http.get("/load").json()["server_load"] == 0 and not any(map(client.metric, held))

    wait_until(nothing_runs)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 513}, openai.BadRequestError, "max_tokens"),
        ({"n": 17}, openai.BadRequestError, "n"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"extra_body": {"best_of": 2}}, openai.BadRequestError, "best_of"),
        ({"messages": [{"role": "user", "content": "a " * 2000}]}, openai.BadRequestError, "messages"),
        ({"extra_body": {"guided_regex": "a"}}, openai.BadRequestError, "guided_regex"),
    ],
)
def test_a_refusal_names_its_field(client: Client, fields: Any, error: type[openai.APIStatusError], param: str) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            client.chat(stream=stream, **fields)
        assert caught.value.param == param


def test_a_tool_is_known_to_the_template_alone(client: Client) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    answer = client.chat(tools=[tool], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    # Its template shows no form of calls that a server could read.
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        client.chat(tools=[tool])
