"""Every input that a server must refuse: of each field of each route, and of HTTP itself."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect
from phalanx.serving.gateway.routes.table import OPERATIONS, Operation
from phalanx.serving.gateway.schemas.chat import ChatRequest
from phalanx.serving.gateway.schemas.completions import CompletionRequest
from phalanx.serving.gateway.schemas.journal_api.batches import BatchRequest
from phalanx.serving.gateway.schemas.messages_api.request import CountTokensRequest, MessagesRequest
from phalanx.serving.gateway.schemas.responses_api.request import CompactRequest, ResponsesRequest
from phalanx.serving.gateway.schemas.tokens import DetokenizeRequest, GenerateRequest, TokenizeRequest

BASES: dict[Any, dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    CompletionRequest: {"prompt": "Hi", "max_tokens": 1},
    ResponsesRequest: {"input": "Hi", "max_output_tokens": 1},
    CompactRequest: {"input": "Hi"},
    MessagesRequest: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    CountTokensRequest: {"messages": [{"role": "user", "content": "Hi"}]},
    GenerateRequest: {"token_ids": [3], "sampling_params": {"max_tokens": 1}},
    TokenizeRequest: {"prompt": "Hi"},
    DetokenizeRequest: {"tokens": [3]},
    BatchRequest: {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
}
"""A request of each kind that is right."""


@dataclass(frozen=True)
class Case:
    """A body for a route."""

    path: str
    field: str
    body: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path} {self.field}={json.dumps(self.body.get(self.field))[:60]}"


def operations() -> list[Operation]:
    """The routes that have a body, but for those that need a journal: without one they read none."""
    return [operation for operation in OPERATIONS if operation.request not in (None, BatchRequest)]


def wrong_cases() -> Iterator[Case]:
    """For each field of each route, values of another type and out of range."""
    for operation in operations():
        kind = operation.request
        for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            seen: set[str] = set()
            for value in wrong_values(field.type):
                body = {**BASES[kind], field.name: value}
                text = json.dumps(value)
                if text not in seen and _is_wrong(body, kind):
                    seen.add(text)
                    yield Case(operation.path, field.name, body)


def extreme_cases() -> Iterator[Case]:
    """For each field of each route, the first and last values that its type allows."""
    for operation in operations():
        kind = operation.request
        for field in inspect.type_info(kind).fields:  # type: ignore[attr-defined]
            for value in extreme_values(field.type):
                body = {**BASES[kind], field.name: value}
                if not _is_wrong(body, kind):
                    yield Case(operation.path, field.name, body)


def _is_wrong(body: dict[str, Any], kind: Any) -> bool:
    try:
        msgspec.convert(body, kind, strict=True, str_keys=True)
    except msgspec.ValidationError:
        return True
    return False


def wrong_values(kind: inspect.Type) -> list[Any]:
    """Values that are not of a type; some may be of another member of a union that holds it."""
    others: list[Any] = [True, -7, 2.5, "no such value", [], {}, [None], {"": 1}, [[[]]], 2**64 - 1]
    if isinstance(kind, inspect.UnionType):
        return others + [value for member in kind.types for value in wrong_values(member)]
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        low = [kind.gt] if kind.gt is not None else [kind.ge - 1] if kind.ge is not None else []
        high = [kind.lt] if kind.lt is not None else [kind.le + 1] if kind.le is not None else []
        return others + low + high
    if isinstance(kind, inspect.StrType):
        long = ["x" * (kind.max_length + 1)] if kind.max_length is not None else []
        return [*others, "", *long]
    if isinstance(kind, inspect.ListType):
        return others + [[value] for value in wrong_values(kind.item_type)]
    if isinstance(kind, inspect.DictType):
        return others + [{"1": value} for value in wrong_values(kind.value_type)] + [{"x": 1}, {"": None}]
    if isinstance(kind, inspect.StructType):
        right = _right_struct(kind)
        fields = [{**right, field.name: value} for field in kind.fields for value in wrong_values(field.type)]
        return [*others, {**right, "no_such_field": 1}, *fields]
    return others


def _right_struct(kind: inspect.StructType) -> dict[str, Any]:
    samples: dict[str, Any] = {"role": "user", "content": "Hi", "type": "text", "name": "f", "function": {"name": "f"}}
    samples["max_tokens"] = 1
    samples["keep"] = "all"
    samples["mode"] = "explicit"
    names = [field.name for field in kind.fields if field.required or field.name == "max_tokens"]
    return {name: samples[name] for name in names}


def extreme_values(kind: inspect.Type) -> list[Any]:
    """The ends of a type's range."""
    if isinstance(kind, inspect.UnionType):
        return [value for member in kind.types for value in extreme_values(member)]
    if isinstance(kind, inspect.IntType):
        return [kind.ge if kind.ge is not None else -(2**63), kind.le if kind.le is not None else 2**63 - 1]
    if isinstance(kind, inspect.FloatType):
        low = kind.ge if kind.ge is not None else 1e-308
        return [low, kind.le if kind.le is not None else 1.7e308, 5e-324]
    if isinstance(kind, inspect.StrType):
        return ["", "\0", "\U0010ffff", "x" * (kind.max_length or 100)]
    if isinstance(kind, inspect.BoolType):
        return [True, False]
    if isinstance(kind, inspect.ListType):
        return [[], *([value] for value in extreme_values(kind.item_type))]
    if isinstance(kind, inspect.DictType):
        return [{}, *({"1": value} for value in extreme_values(kind.value_type))]
    if isinstance(kind, inspect.StructType):
        right = _right_struct(kind)
        return [{**right, field.name: value} for field in kind.fields for value in extreme_values(field.type)]
    if isinstance(kind, inspect.LiteralType):
        return list(kind.values)
    return [None]


_HOST = b"Host: x\r\n"
_TO = b"POST /v1/completions HTTP/1.1\r\n" + _HOST
_BODY = b'{"prompt": "Hi", "max_tokens": 1}'
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_MESSAGE = b"POST /v1/messages HTTP/1.1\r\n" + _HOST
_GET = b"GET /health/live HTTP/1.1\r\n" + _HOST
_HTTP2 = b"Connection: keep-alive, Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
_UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"

RAW: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "no http": (b"\x16\x03\x01\x02\x00\x01\x00 nonsense\r\n\r\n", (400,)),
    "no version": (b"GET /health/live\r\n\r\n", (200, 400)),
    "http 2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    "unknown method": (b"BREW /v1/models HTTP/1.1\r\n" + _HOST + b"\r\n", (400, 405)),
    "wrong method": (b"DELETE /v1/completions HTTP/1.1\r\n" + _HOST + b"\r\n", (405,)),
    "connect": (b"CONNECT example.org:443 HTTP/1.1\r\n" + _HOST + b"\r\n", (400, 404, 405)),
    "unknown route": (b"GET /v1/nothing HTTP/1.1\r\n" + _HOST + b"\r\n", (404,)),
    "route of another tree": (b"GET /../../etc/passwd HTTP/1.1\r\n" + _HOST + b"\r\n", (404,)),
    "route with control bytes": (b"GET /\x00\x01 HTTP/1.1\r\n" + _HOST + b"\r\n", (400, 404)),
    "route of bytes that are no text": (b"GET /\xff\xfe HTTP/1.1\r\n" + _HOST + b"\r\n", (400, 404)),
    "route encoded as no text": (b"GET /%ff%00 HTTP/1.1\r\n" + _HOST + b"\r\n", (404,)),
    "unknown model": (b"GET /v1/models/gpt-9 HTTP/1.1\r\n" + _HOST + b"\r\n", (404,)),
    "http 1.0": (b"GET /health/live HTTP/1.0\r\n\r\n", (200,)),
    "absent host": (b"GET /health/live HTTP/1.1\r\n\r\n", (400,)),
    "header of 1 MB": (_GET + b"X: " + b"a" * 2**20 + b"\r\n\r\n", (431,)),
    "header of 1 MB for messages": (_MESSAGE + b"X: " + b"a" * 2**20 + b"\r\n\r\n", (431,)),
    "header for messages that never ends": (_MESSAGE, (408,)),
    "body for messages that never ends": (_MESSAGE + b"Content-Length: 1000\r\n\r\n{", (408,)),
    "many headers": (_GET + b"X: a\r\n" * 20_000 + b"\r\n", (431,)),
    "route of 1 MB": (b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\n\r\n", (431,)),
    "header without name": (_GET + b": a\r\n\r\n", (400,)),
    "negative length": (_TO + b"Content-Length: -1\r\n\r\n", (400,)),
    "length that is no number": (_TO + b"Content-Length: many\r\n\r\n", (400,)),
    "length beyond all bounds": (_TO + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", (400, 413)),
    "two lengths": (_TO + b"Content-Length: 1\r\n" + _LENGTH + b"\r\n" + _BODY, (400,)),
    "length and chunks": (_TO + _LENGTH + _CHUNKED + b"\r\n" + _BODY, (400,)),
    "chunk without a size": (_TO + _CHUNKED + b"\r\nzz\r\n", (400,)),
    "chunk of negative size": (_TO + _CHUNKED + b"\r\n-1\r\n", (400,)),
    "chunk shorter than its content": (_TO + _CHUNKED + b"\r\n2\r\n" + _BODY + b"\r\n0\r\n\r\n", (400,)),
    "chunk beyond all bounds": (_TO + _CHUNKED + b"\r\n" + b"f" * 20 + b"\r\n", (400,)),
    "unknown transfer coding": (_TO + b"Transfer-Encoding: gzip\r\n\r\n" + _BODY, (400, 501)),
    "transfer codings before the chunks": (_TO + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    "host that is none": (b"GET /health/live HTTP/1.1\r\nHost: a/b@c\r\n\r\n", (400,)),
    "two hosts": (_GET + _HOST + b"\r\n", (400,)),
    "compressed body": (_TO + b"Content-Encoding: gzip\r\n" + _LENGTH + b"\r\n" + _BODY, (415,)),
    "another content type": (_TO + b"Content-Type: text/html\r\n" + _LENGTH + b"\r\n" + _BODY, (415,)),
    "body of bytes that are no text": (_TO + b"Content-Length: 3\r\n\r\n\xff\xfe\xfd", (400,)),
    "no body": (_TO + b"Content-Length: 0\r\n\r\n", (400,)),
    "no length": (_TO + b"\r\n", (400,)),
    "body of 100 MB by its length": (_TO + b"Content-Length: 104857600\r\n\r\n" + b" " * 2**20, (413,)),
    "body of 100 MB in chunks": (_TO + _CHUNKED + b"\r\n" + (b"100000\r\n" + b" " * 2**20 + b"\r\n") * 100, (413,)),
    "body that never ends": (_TO + b"Content-Length: 1000\r\n\r\n{", (408,)),
    "head that never ends": (_TO, (408,)),
    "silence": (b"", (408,)),
    "websocket": (b"GET /v1/chat/completions HTTP/1.1\r\n" + _HOST + _UPGRADE + b"\r\n", (405,)),
    "websocket, then frames": (b"GET /v1/models HTTP/1.1\r\n" + _HOST + _UPGRADE + b"\r\n\x81\x85abcd", (200, 400)),
    "websocket with a body": (_TO + _UPGRADE + _LENGTH + b"\r\n" + _BODY, (200,)),
    "upgrade to http 2 with a body": (_TO + _HTTP2 + _LENGTH + b"\r\n" + _BODY, (200,)),
    "upgrade to http 2 with chunks": (_TO + _HTTP2 + _CHUNKED + b"\r\n21\r\n" + _BODY + b"\r\n0\r\n\r\n", (200,)),
    "upgrade to http 2 with a bad length": (_TO + _HTTP2 + b"Content-Length: 2\r\n\r\n" + _BODY, (400,)),
    "trailers of 1 MB": (_TO + _CHUNKED + b"\r\n21\r\n" + _BODY + b"\r\n0\r\n" + b"X: a\r\n" * 200_000, (431,)),
    "trailer that never ends": (_TO + _CHUNKED + b"\r\n0\r\nX: " + b"a" * 2**20, (431,)),
    "chunk extension of 1 MB": (_TO + _CHUNKED + b"\r\n21;" + b"a" * 2**20 + b"\r\n" + _BODY, (431,)),
    "upgrade to http 2": (_GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", (200,)),
    "deep nesting": (_TO + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000, (400,)),
    "request after a bad one": (_TO + b"Content-Length: x\r\n\r\n" + _GET + b"\r\n", (400,)),
}
"""Bytes of a connection, and the statuses with which they may be answered. Errors are JSON."""


def answer_to(port: int, data: bytes) -> tuple[int, bytes]:
    """The status and body of what a server answers first; what it will not take any more is left out."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connected:
        with contextlib.suppress(OSError):
            connected.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in answer and (piece := connected.recv(65536)):
                answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head, "the connection was closed without an answer"
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        while lengths and len(body) < lengths[0] and (piece := connected.recv(65536)):
            body += piece
    return int(head.split()[1]), body[: lengths[0]] if lengths else body
