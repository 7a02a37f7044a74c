"""The gateway in front of a real engine: the demo model in processes of its own, over ZeroMQ."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from phalanx.engine.client.client import to_error
from phalanx.engine.client.group_process import GroupProcess
from phalanx.engine.config import EngineConfig
from phalanx.engine.protocol.messages import (
    Abort,
    Event,
    Failed,
    Finished,
    ModelInfo,
    ModelInfoRequest,
    Status,
    StatusRequest,
    Submit,
    Tokenized,
)
from phalanx.engine.protocol.transport import ZmqConnection
from phalanx.serving.gateway.engine_pool import OnEvent, PoolState, Question
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import wait_until

HELLO = [{"role": "user", "content": "What is the capital of France?"}]


class _Ticket:
    def __init__(self, connection: ZmqConnection, request_id: str) -> None:
        self._connection, self._id = connection, request_id

    def abort(self) -> None:
        self._connection.send(Abort(self._id))


class EnginePool:
    """One engine by its address, and nothing else."""

    def __init__(self, address: str) -> None:
        self._sinks: dict[str, OnEvent] = {}
        self._connection = ZmqConnection(address)
        self._answered = threading.Event()
        self._last: Event | None = None
        self._connection.start(self._on_event, lambda error: None)
        self.info = self.question(ModelInfoRequest())
        self.state = PoolState("ready")

    def ready(self) -> bool:
        return True

    def models(self) -> Mapping[str, ModelInfo]:
        assert isinstance(self.info, ModelInfo)
        return {"demo": self.info}

    def submit(self, submit: Submit, on_event: OnEvent, *, affinity: bytes = b"") -> _Ticket:
        self._sinks[submit.id] = on_event
        self._connection.send(submit)
        return _Ticket(self._connection, submit.id)

    async def ask(self, command: Question) -> Event:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Event] = loop.create_future()
        self._sinks[command.id] = lambda event: loop.call_soon_threadsafe(answer.set_result, event)  # type: ignore[union-attr]
        self._connection.send(command)
        event = await answer
        if isinstance(event, Failed):
            raise to_error(event)
        return event

    def question(self, command: ModelInfoRequest | StatusRequest) -> Event:
        """The answer to what has no id, on the test's thread."""
        self._answered.clear()
        self._connection.send(command)
        assert self._answered.wait(30)
        assert self._last is not None
        return self._last

    def close(self) -> None:
        self._connection.close()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Status | ModelInfo):
            self._last = event
            self._answered.set()
            return
        sink = self._sinks.get(event.id)
        if isinstance(event, Finished | Failed | Tokenized):
            self._sinks.pop(event.id, None)
        if sink is not None:
            sink(event)


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Server]:
    group = GroupProcess(EngineConfig(model=str(smollm2), dtype="float32", max_model_len=512, device="cpu"))
    pool = EnginePool(f"ipc://{group._folder}/engine")
    server = Server(pool=pool)
    yield server
    server.close()
    pool.close()
    group.close()


def chat(engine: Server, **fields: Any) -> Any:
    return engine.openai.chat.completions.create(
        **{"model": "demo", "messages": HELLO, "temperature": 0, "max_tokens": 16, **fields}
    )


def test_the_model_answers_the_same_streamed_and_whole(engine: Server) -> None:
    answer = chat(engine, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for item in choice.logprobs.content:
        assert item.top_logprobs[0].logprob == pytest.approx(item.logprob)  # greedy: the likeliest was chosen

    *chunks, last = chat(engine, stream=True, stream_options={"include_usage": True})
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.total_tokens == answer.usage.total_tokens


def test_an_echo_has_the_log_probabilities_that_the_answer_had(engine: Server) -> None:
    complete, prompt = engine.openai.completions.create, "The capital of France is"
    made = complete(model="demo", prompt=prompt, max_tokens=6, temperature=0, logprobs=1)
    text, logprobs = made.choices[0].text, made.choices[0].logprobs
    again = complete(model="demo", prompt=prompt + text, max_tokens=0, echo=True, temperature=0, logprobs=1).choices[0]
    assert again.text == prompt + text
    assert again.logprobs.tokens[-6:] == logprobs.tokens
    assert again.logprobs.token_logprobs[-6:] == pytest.approx(logprobs.token_logprobs, abs=1e-3)
    assert "".join(again.logprobs.tokens) == again.text
    assert again.logprobs.text_offset[-6:] == [
        len("The capital of France is") + place for place in logprobs.text_offset
    ]


def test_texts_become_tokens_and_tokens_texts(engine: Server) -> None:
    for text in ("Hello é", "a  b\n", "漢字"):
        tokens = engine.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
        assert engine.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "n": 127}, "n"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"999999": 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": [999_999]}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": "a " * 2000}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 2000}]}, "messages"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"n": 127}}, "sampling_params.n"),
        ("/inference/v1/generate", {"token_ids": [1] * 2000}, "token_ids"),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
    ],
)
def test_the_engines_refusals_name_the_field(engine: Server, path: str, body: Any, param: str) -> None:
    answer = engine.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, answer.text
    too_long = "a " * 2000 in str(body) or len(body.get("token_ids", ())) == 2000
    assert error["code"] == ("context_length_exceeded" if too_long else None)


def test_a_client_that_leaves_frees_its_blocks(engine: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "n": 4}
    engine.send_and_leave("/v1/completions", body)

    def nothing_runs() -> bool:
        status = engine.pool.question(StatusRequest())
        return isinstance(status, Status) and (status.running, status.waiting) == (0, 0)

    wait_until(nothing_runs)
    assert engine.open_requests == 0
