"""HTTP bodies of every route, through the app: an answer, or a refusal with a reason; no 500, and nothing kept open."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect
from phalanx.serving.gateway.app import create_app
from phalanx.serving.gateway.engine_pool import OnEvent
from phalanx.serving.gateway.routes.table import OPERATIONS, Operation
from phalanx.tests.fuzz.bounds import in_time
from phalanx.tests.fuzz.choices import Choices
from phalanx.tests.serving.gateway.agent_pool import AgentPool, tool_call
from phalanx.tests.serving.gateway.bad_inputs import BASES
from phalanx.tests.serving.gateway.scripted_pool import ScriptedTicket, check_vocabulary
from starlette.applications import Starlette

ANSWERS = (
    "Hello", "", "<think>hm</think>yes", tool_call("f", '{"a": 1}'), tool_call("f", "{"), "<think>",
    "é🙂" + AgentPool.CUT,
    '{"a": 1}',
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
RICH: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "logprobs": True}),
    ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "s"}]},
                {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        },
    ),
    (
        "/v1/completions",
        {"prompt": ["a", "b"], "stream": True, "logprobs": 2, "echo": True, "stop": ["x"], "best_of": 1},
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "r"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "stream": True,
            "store": True,
        },
    ),
    ("/v1/responses", {"background": True, "previous_response_id": "resp_1", "text": {"format": {"type": "text"}}}),
    (
        "/v1/messages",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]},
            ],
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "stream": True,
        },
    ),
    ("/inference/v1/generate", {"sampling_params": {"max_tokens": 1, "logprobs": 1}, "stream": True}),
)
QUERIES = (
    b"",
    b"stream=true",
    b"starting_after=1",
    b"limit=2&order=asc",
    b"include[]=x&include[]=y",
    b"after=%ff%00",
    b"limit=1e9",
)


def _names(kind: inspect.Type) -> Iterator[str]:
    """The names of a type's fields and the values of its literals."""
    seen: set[int] = set()
    pending = [kind]
    while pending:
        each = pending.pop()
        if isinstance(each, inspect.UnionType):
            pending += each.types
        elif isinstance(each, inspect.ListType):
            pending.append(each.item_type)
        elif isinstance(each, inspect.DictType):
            pending.append(each.value_type)
        elif isinstance(each, inspect.LiteralType):
            yield from map(str, each.values)
        elif isinstance(each, inspect.StructType) and id(each.cls) not in seen:
            seen.add(id(each.cls))
            for field in each.fields:
                yield field.encode_name
                pending.append(field.type)


WORDS = (
    *dict.fromkeys(
        itertools.chain(*(_names(inspect.type_info(each.request)) for each in OPERATIONS if each.request is not None))
    ),
    "f", "c", "text", "type", "user", "role", "demo",
)  # fmt: skip


class _Pool(AgentPool):
    """Answers on the event loop itself, so that an input is done when its answer is."""

    def submit(self, submit: Any, on_event: OnEvent, *, affinity: bytes = b"") -> ScriptedTicket:
        check_vocabulary(submit.token_ids)
        msgspec.msgpack.encode(submit)
        ticket = ScriptedTicket()
        asyncio.get_running_loop().call_soon(self._run, submit, on_event, ticket)
        return ticket


@cache
def _served() -> tuple[asyncio.AbstractEventLoop, _Pool, Starlette]:
    pool = _Pool()
    return asyncio.new_event_loop(), pool, create_app(pool)


def fuzz_one(data: bytes) -> None:
    """Send one request."""
    choices = Choices(data)
    operation = choices.pick(OPERATIONS)
    body: Any = b""
    if operation.request is not None:
        rich = [changes for path, changes in RICH if path == operation.path]
        fields = {**BASES[operation.request], **choices.pick([{}, *rich])}
        for _ in range(choices.number(4)):
            fields = choices.changed(fields, WORDS)
        body = json.dumps(fields).encode()
    loop, pool, app = _served()
    pool.answers = [choices.pick(ANSWERS)]
    query = choices.pick(QUERIES) if operation.request is None else b""
    kind = choices.pick((b"application/json", b"application/json; charset=utf-8", b"text/plain", b"\xff"))
    if choices.number(6) == 0:
        body = choices.mutated(body) + choices.rest()

    with in_time():
        status, answer = loop.run_until_complete(_exchange(app, operation, body, query, kind))
    assert status != 500, answer[:1000]
    assert 200 <= status < 600
    _check_answer(status, answer)
    assert app.state.gateway.admission.requests == 0
    assert app.state.gateway.bodies.held == 0


async def _exchange(app: Any, operation: Operation, body: bytes, query: bytes, kind: bytes) -> tuple[int, bytes]:
    path = operation.path.replace("{response_id}", "resp_1").replace("{model}", "demo")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": operation.method, "path": path,
        "raw_path": path.encode(), "query_string": query, "root_path": "", "scheme": "http",
    "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "headers": [(b"content-type", kind), (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    waiting = [
        {"type": "http.request", "body": body[: len(body) // 2], "more_body": True},
        {"type": "http.request", "body": body[len(body) // 2 :], "more_body": False},
    ]
    gone = asyncio.Event()
    sent: list[Any] = []

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 30)
    gone.set()
    await asyncio.sleep(0)
    for _ in range(20):  # what goes on after the answer, as of a response in the background
        if app.state.gateway.admission.requests:
            await asyncio.sleep(0.01)
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return int(sent[0]["status"]), content


def _check_answer(status: int, answer: bytes) -> None:
    if answer.startswith((b"data:", b"event:", b":")):
        assert answer.endswith(b"\n\n")
        for line in answer.split(b"\n"):
            if line.startswith(b"data:") and line != b"data: [DONE]":
                json.loads(line[5:])
        return
    value = json.loads(answer)
    if status >= 400:
        assert value["error"]["message"]
