"""A fault at any stage of one request's way through the gateway fails that request alone.

Nothing in the gateway knows of these faults: each test puts one in the place of what the stage does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from phalanx.benchmarks.lab.chaos.answers import ask
from phalanx.benchmarks.lab.chaos.questions import Question
from phalanx.engine.protocol.logprobs import TokenLogprobs
from phalanx.engine.protocol.messages import Delta, Submit
from phalanx.serving.gateway.engine_pool import OnEvent
from phalanx.serving.gateway.generation.answer_reader import AnswerReader
from phalanx.serving.gateway.generation.call_scanner import CallScanner
from phalanx.serving.gateway.generation.generation import Generation
from phalanx.serving.gateway.generation.response_store import ResponseStore
from phalanx.serving.gateway.http.exchange import Exchange
from phalanx.serving.gateway.http.sse import TextEvent
from phalanx.serving.gateway.routes import logprobs
from phalanx.serving.gateway.routes.chat_writer import ChatStyle, ChatWriter
from phalanx.serving.gateway.routes.messages_api.writer import MessageWriter
from phalanx.serving.gateway.routes.responses_api.writer import ResponseWriter
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.conftest import Server
from phalanx.tests.serving.gateway.scripted_pool import ScriptedTicket, prompt_ids, wait_until

HIT, NAME = "§", "poison"
"""In prompt and answer of the request that is hit, a single character, since pieces are short; and its id."""
PLAIN = "<think>well</think>An answer of some length, " + tool_call("read", '{"path": "a"}')
BAD = f"<think>well {HIT}</think>An answer with {HIT} in it, " + tool_call("read", f'{{"path": "{HIT}"}}')
TOOL: Any = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


class _Pool(AgentPool):
    """Says PLAIN, and BAD to who asks for it, in pieces that come slowly enough to be under way at the same time."""

    def _run(self, submit: Submit, on_event: OnEvent, ticket: ScriptedTicket) -> None:
        asked = bytes(token % 256 for token in prompt_ids(submit)).decode(errors="replace")
        one = AgentPool(BAD if HIT in asked else PLAIN)
        one.token_s = 0.002

        def with_logprobs(event: Any) -> None:
            if isinstance(event, Delta) and submit.sampling.logprobs is not None:
                entries = [TokenLogprobs(1, -0.5, 1, [], [], event.text.encode(), [])]
                event = Delta(event.id, 0, event.text, event.token_ids, entries, event.position, event.reasoning)
            on_event(event)

        one._run(submit, with_logprobs, ticket)


@pytest.fixture(scope="module")
def pooled() -> Iterator[tuple[Server, list[Any]]]:
    """A server, and what it answers undisturbed."""
    server = Server(pool=_Pool())
    asked = [ask(server.url, question) for question in _questions("hello")]
    assert [each.error for each in asked] == [""] * len(asked)
    yield server, [each.answer for each in asked]
    server.close()


def _questions(word: str) -> list[Question]:
    """A request of each face, whole and as a stream."""
    said = [{"role": "user", "content": word}]
    function = {"type": "function", "name": "read", "parameters": {}}
    thinks = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 3000}
    asked = []
    for stream in (False, True):
        # A stream's events that have no log-probabilities are made in another way.
        chat = {"messages": said, "tools": [TOOL], **({} if stream else {"logprobs": True})}
        faces = [
            ("/v1/chat/completions", chat),
            ("/v1/completions", {"prompt": word, **({} if stream else {"logprobs": 1})}),
            ("/v1/responses", {"input": word, "tools": [function]}),
            ("/v1/messages", {"messages": said, **thinks}),
        ]
        asked += [Question(path, path, {"model": "demo", **body, "stream": stream}) for path, body in faces]
    return asked


Hit = Callable[..., bool]
STAGES: dict[str, tuple[type, str, Hit, list[int]]] = {
    # The stage, what is hit, and the requests of _questions() that meet it.
    "calls": (CallScanner, "feed", lambda self, text, last=False: HIT in text, [0, 2, 4, 6]),
    "thinking": (AnswerReader, "feed", lambda self, delta: HIT in delta.reasoning, [0, 2, 3, 4, 6, 7]),
    "event": (TextEvent, "filled", lambda self, text: HIT in text, [4, 5]),
    "chat's stream": (ChatWriter, "_delta", lambda self, delta: HIT in delta.text, [4]),
    "chat's answer": (ChatStyle, "_choice", lambda self, index, answer, reader: HIT in answer.text, [0]),
    "messages": (MessageWriter, "take", lambda self, parts, entries: HIT in str(parts), [3, 7]),
    "responses": (ResponseWriter, "take", lambda self, parts, entries: HIT in str(parts), [2, 6]),
    "store": (ResponseStore, "put", lambda self, owner, name, record: HIT in record.input.decode(), [2, 6]),
    "socket": (Exchange, "write", lambda self, *data, **last: self.request_id == NAME, [4, 5, 6, 7]),
    "receiver": (
        Generation,
        "_push",
        lambda self, number, event: self._name == NAME and isinstance(event, Delta),
        list(range(8)),
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_at_a_stage_fails_its_own_request_alone(
    pooled: tuple[Server, list[Any]], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    kind, name, hit, numbers = STAGES[stage]
    monkeypatch.setattr(kind, name, _raises(hit, getattr(kind, name)))
    _check(pooled, numbers)


def test_a_fault_of_log_probabilities_fails_its_own_request_alone(
    pooled: tuple[Server, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hit = lambda entry, as_ids: HIT.encode() in entry.token_bytes  # noqa: E731
    monkeypatch.setattr(logprobs, "_content", _raises(hit, logprobs._content))
    _check(pooled, [0])


def _raises(hit: Hit, made: Callable[..., Any]) -> Callable[..., Any]:
    def stage(*args: Any, **kwargs: Any) -> Any:
        if hit(*args, **kwargs):
            raise RuntimeError("a defect")
        return made(*args, **kwargs)

    return stage


def _check(pooled: tuple[Server, list[Any]], numbers: list[int]) -> None:
    """The requests that are hit fail, all others are answered as ever, and nothing of any is left."""
    server, expected = pooled
    with ThreadPoolExecutor(2 * len(expected)) as threads:
        others = [threads.submit(ask, server.url, question) for question in _questions("hello")]
        poisoned = _questions(HIT)
        hits = [threads.submit(ask, server.url, poisoned[number], name=NAME) for number in numbers]
    assert [each.result().answer for each in others] == expected
    for each in hits:
        assert each.result().error, each.result().answer
    wait_until(lambda: server.open_requests == 0)
    assert [ask(server.url, question).answer for question in _questions("hello")] == expected  # it serves on
