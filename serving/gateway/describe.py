"""The page of routes and fields from the code: `python -m phalanx.serving.gateway.describe > docs/http_api.md`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from typing import Any

import msgspec
from msgspec import Meta

from .auth import AuthConfig
from .config import GatewayConfig
from .http.neutral import NEUTRAL
from .openapi import STATUS_MEANINGS
from .routes.table import OPERATIONS, Operation
from .schemas.chat import PARTS
from .schemas.fields import CommonFields, OpenAIFields, StreamOptions
from .schemas.messages_api.request import ASSISTANT_BLOCKS, RESULT_BLOCKS, THINKING, USER_BLOCKS, CustomTool
from .schemas.responses_api.request import ITEMS, MESSAGE_PARTS, REASONING_PARTS, TOOLS

_HEAD = """# HTTP API

This page is made from the code by `python -m phalanx.serving.gateway.describe`; a test keeps it current.

The gateway speaks OpenAI's API with the widely used fields of vLLM's server. A field that it does not know is a 400
that names it: nothing is silently ignored. A null is as good as no value. Errors are
`{"error": {"message", "type", "param", "code"}}`; `param` is the path of the field, such as `messages[0].content`.
Under `/v1/messages` they are Anthropic's, `{"type": "error", "error": {"type", "message"}, "request_id"}`.
"""

_DIFFERENCES = """## What differs from vLLM's server

* The setting `default_temperature` is this server's own. While it is empty, a request without `temperature` gets what
  vLLM gives it: the value of the engine's settings or of generation_config, or else 1.
* The role `developer` reaches the chat template as `system`, which every template knows.
* `echo` with `logprobs`, and `prompt_logprobs`, cannot be streamed.
* `finish_reason` comes in a chunk of its own, after the last text, as in OpenAI's API; chunks without text are sent
  only where they hold log-probabilities, token ids or usage.
* A streamed chat with `return_token_ids` has the prompt's ids in a last chunk without choices.
* `return_timings` and `timeout` are this server's own.
* A path that ends with a slash is answered where a POST is meant, without a redirect.
* Without a key, on the loopback interface, requests that web pages of other sites have a browser send are a 403, and
  those whose Host is no local name a 421, as the settings `allow_origins` and `allowed_hosts` say.
* A schema of `response_format` or `structured_outputs` is enforced, `strict` or not. What no grammar can be made of is
  a 400 that names its path in the schema, and so is an integer beyond 2^53 that would not be kept exactly. Properties
  come in the schema's order, and a `format` is enforced.
* Calls that `tool_choice` requires are made in Hermes' form, whatever the model's own is; their arguments are valid by
  the function's parameters, and are an object in any case. With "auto" that holds for functions that are `strict`, of
  models that write Hermes' form. With `response_format` an answer to a request with tools is one call, or else has
  that form.
* Calls of tools are read as they grow: the name comes first, then pieces of the arguments, exactly as the model wrote
  them (Qwen3-Coder's parameters become JSON by the tool's schema). What is no call is text. A call that breaks off has
  arguments that are no JSON, and the rest is text. White space before, between and after calls is dropped; text after
  calls is kept. A call of a tool that the request does not offer is a call.
* Thinking is `reasoning` and `reasoning_content`, without its tags, otherwise as the model wrote it. Its tokens count,
  and have log-probabilities. `stop` is looked for in the answer alone, unless `stop_in_reasoning` is true. A choice
  that ends within thinking has `ended_in_reasoning`.
"""


_FACES = """## What differs from OpenAI's Responses and Anthropic's Messages

Both are written over the core of `/v1/chat/completions`: the same template, the same sampling, the same bounds.

* Thinking is the content of its reasoning item (`response.reasoning_text.delta`), or its summary where
  `reasoning.summary` asks for one (`response.reasoning_summary_text.delta`): the thinking itself, as there is no
  other model that would shorten it.
* `encrypted_content` (with `include: ["reasoning.encrypted_content"]`) and the `signature` of omitted thinking hold
  the thinking, encoded and not encrypted, so that clients can send it back. An `encrypted_content` of another server
  is a 400; a `signature` of another server has no effect; `redacted_thinking` is left out of the prompt.
* `/v1/responses/compact` has the model write a summary of the conversation, without thinking where the template can.
  It answers the user's messages and a `compaction` item, which holds the summary, encoded and not encrypted; the model
  gets it as a message of the user. A summary takes at most a quarter of the model's context; one that is longer
  says that it breaks off.
* A response is kept for its own API key, within `stored_responses`, `stored_response_bytes` and `stored_response_s`;
  after a restart there are none, unless the server has a `journal`. Without `store` a response is kept.
* `instructions` come first, `previous_response_id` brings the input and output of the response before, without its
  instructions.
* With `truncation: "auto"` the last item stays in any case, and what a tool returned leaves with its call. What has
  left is still among the response's input items, and comes with `previous_response_id` as far as it fits then.
* Only a response with `background=true` can be cancelled. It cannot be streamed. Any other ends with its connection.
* The stream of `/v1/responses` ends with `response.completed`, `response.incomplete` or `response.failed`, and has no
  `[DONE]`. An error in it is an `error` event, and `response.failed` after it.
* `thinking` sets the template's `enable_thinking`: `enabled` to true, `disabled` and no `thinking` at all to false;
  `adaptive` leaves it to the template. `budget_tokens` must be below `max_tokens`, and thinking is not cut at it.
* The model knows a function of a `namespace` as `namespace__name`; calls of it have its `name` and its `namespace`.
* A tool of `/v1/messages` with `defer_loading` is left out of the prompt until a `tool_result` has a `tool_reference`
  to it. From then on it is among the other tools, and the prompt is computed again from there.
* A prompt that is too long for `/v1/messages` is a 400 that begins `prompt is too long`, which agents look for.
* A `tool_result` with `is_error` begins with a line `Error:` for the model.
* A last message of the assistant in `/v1/messages` is continued. Messages of one role in a row are one turn.
* A call that was cut off, by `max_tokens` or by the model, has its arguments as text: `{"INVALID_JSON": ...}` in
  `input`; the text is empty where there were none yet.
"""


_JOURNAL = """## What a journal adds

With the setting `journal` a request that is accepted, and not streamed, is answered once, though the server's process
dies meanwhile. It is accepted when it is on the disk, before an engine has it: then it survives a SIGKILL, and a loss
of power. After the next start it is computed again, from the tokens that were noted of it every second, or else from
its beginning, in both cases with the seed that it had.

* A request with the header `Idempotency-Key` goes on when its connection closes. Sent again with the same key, by the
  same API key, it gets the answer that there is, with the header `Idempotency-Replayed: true`, or waits for the one
  that is computed. The same key with another path or body is a 409.
* A request without one ends with its connection, as it does without a journal; but after a crash it is computed, since
  nobody knows who still waits. `GET /v1/requests/{request_id}` has its answer, by its `X-Request-Id`.
* A 429 or 503 is no answer: the request may be sent again with the same key.
* Responses that are kept are there after a restart, and those with `background=true` go on.
* Files and batches are OpenAI's. A batch is accepted whole, or is `failed` with the lines that are wrong. What became
  of its requests is in the order of its file. After `completion_window` what has not ended is given up.
* A batch that is cancelled is `cancelling` while what is computed of it is aborted, and then `cancelled`; what had
  ended stays in its output. Output files are forgotten with their batch, and cannot be deleted alone.
* One API key has at most `max_files` files and `max_batches` batches; all of them take at most half of the journal
  when they are made. More are a 429, which says what to do.
* Callers see what is their own API key's alone. The file has requests and answers as they are, and of API keys a
  digest of their hash. It belongs to one process, which alone may read it: `chmod 600`, in a folder of its user's.
* Answers are forgotten `journal_keep_s` after their end, and sooner where room is needed; files and batches after
  `journal_keep_s`.
"""


def page() -> str:
    """The page, Markdown."""
    parts = [_HEAD, _routes(), _statuses()]
    parts.append(_fields("Fields of the routes that answer with text", CommonFields, set()))
    parts.append(_fields("stream_options", StreamOptions, set()))
    described: dict[type[msgspec.Struct], str] = {}
    for operation in OPERATIONS:
        if operation.request in described:
            same = described[operation.request]
            parts.append(f"## `{operation.path}`\n\nIt takes the fields of `{same}`, and refuses the same ones.\n")
        elif operation.request is not None:
            described[operation.request] = operation.path
            shared = set(CommonFields.__struct_fields__) if issubclass(operation.request, OpenAIFields) else set()
            parts.append(_fields(operation.path, operation.request, shared))
            parts.append(_refused(operation))
        if operation.query is not None:
            parts.append(_fields(f"{operation.path} (query)", operation.query, set()))
    parts += [_described_items(), _FACES, _DIFFERENCES, _JOURNAL]
    parts += [_settings("Settings of the gateway", GatewayConfig), _settings("Settings of who is answered", AuthConfig)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _described_items() -> str:
    """The items, blocks, tools and choices that are checked by their type."""
    groups: list[tuple[str, dict[str, type[msgspec.Struct]]]] = [
        ("/v1/chat/completions: parts of content", PARTS),
        ("/v1/responses: items of input", ITEMS),
        ("/v1/responses: parts of content", {**MESSAGE_PARTS, **REASONING_PARTS}),
        ("/v1/responses: tools", TOOLS),
        ("/v1/messages: blocks of content", {**USER_BLOCKS, **RESULT_BLOCKS, **ASSISTANT_BLOCKS}),
        ("/v1/messages: tools", {"custom": CustomTool}),
        ("/v1/messages: thinking", THINKING),
    ]
    lines = ["## What is told apart by its type", "", "| where | type | fields |", "|---|---|---|"]
    for where, kinds in groups:
        for name, kind in kinds.items():
            fields = ", ".join(f"`{field}`" for field in kind.__struct_fields__)
            lines.append(f"| {where} | `{name}` | {fields} |")
    return "\n".join(
        [*lines, "", "Any other type is a 400 that names it: images, files, tools that a server runs.", ""]
    )


def _routes() -> str:
    rows = [f"| `{operation.method} {operation.path}` | {_summary(operation)} |" for operation in OPERATIONS]
    return "\n".join(["## Routes", "", "| route | what it does |", "|---|---|", *rows, ""])


def _summary(operation: Operation) -> str:
    return (inspect.getdoc(operation.handler) or "").partition("\n")[0]


def _statuses() -> str:
    rows = [f"| {status} | {meaning} |" for status, meaning in STATUS_MEANINGS.items()]
    return "\n".join(["## Statuses of errors", "", "| status | meaning |", "|---|---|", *rows, ""])


def _fields(title: str, kind: type[msgspec.Struct], left_out: set[str]) -> str:
    hints = typing.get_type_hints(kind, include_extras=True)
    rows = []
    for field in msgspec.structs.fields(kind):
        if field.name in left_out:
            continue
        description, shape = _described(hints[field.name])
        required = " (required)" if field.required else ""
        rows.append(f"| `{field.name}`{required} | {shape} | {description} |")
    heading = f"## {title}" if not title.startswith("/") else f"## `{title}`"
    shared = ["It takes the fields above, and:", ""] if left_out else []
    return "\n".join([heading, "", *shared, "| field | type | meaning |", "|---|---|---|", *rows, ""])


def _described(hint: Any) -> tuple[str, str]:
    """(the description, the type in JSON's words and its range) of a field."""
    descriptions: list[str] = []

    def shape(hint: Any) -> str:
        if typing.get_origin(hint) is typing.Annotated:
            inner, *metas = typing.get_args(hint)
            bounds = ""
            for meta in metas:
                if isinstance(meta, Meta):
                    if meta.description:
                        descriptions.append(meta.description)
                    bounds += _bounds(meta)
            return shape(inner) + bounds
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            return " or ".join(shape(each) for each in typing.get_args(hint) if each is not types.NoneType)
        if typing.get_origin(hint) is list:
            return f"list of {shape(typing.get_args(hint)[0])}"
        if typing.get_origin(hint) is typing.Literal:
            return ", ".join(f'"{value}"' for value in typing.get_args(hint))
        return _NAMES.get(typing.get_origin(hint) or hint, getattr(hint, "__name__", str(hint)))

    made = shape(hint)
    return " ".join(descriptions), made


_NAMES = {str: "text", bool: "boolean", int: "integer", float: "number", dict: "object", types.NoneType: "null"}


def _bounds(meta: Meta) -> str:
    low = f"[{_number(meta.ge)}" if meta.ge is not None else f"({_number(meta.gt)}" if meta.gt is not None else "(-inf"
    high = f"{_number(meta.le)}]" if meta.le is not None else "inf)"
    if meta.ge is None and meta.gt is None and meta.le is None:
        return ""
    return f" in {low}, {high}"


def _number(value: float | None) -> str:
    powers = {2**63: "2^63", 2**63 - 1: "2^63 - 1", -(2**63): "-2^63", 2**31 - 1: "2^31 - 1", -(2**31): "-2^31"}
    return powers.get(value, str(value)) if isinstance(value, int) else str(value)


def _refused(operation: Operation) -> str:
    if not operation.refused:
        return ""
    rows = [f"| `{name}` | {why}{_taken(name)} |" for name, why in operation.refused.items()]
    return "\n".join(
        [f"Refused on `{operation.path}`:", "", "| field | why, and what to use |", "|---|---|", *rows, ""]
    )


def _taken(name: str) -> str:
    values = ", ".join(f"`{json.dumps(value)}`" for value in NEUTRAL.get(name, ()))
    return f" ({values}: taken, as it changes nothing)" if values else ""


def _settings(title: str, kind: type[GatewayConfig | AuthConfig]) -> str:
    docs = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', inspect.getsource(kind), re.DOTALL | re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in docs}
    rows = [f"| `{field.name}` | {field.default!r} | {meanings[field.name]} |" for field in dataclasses.fields(kind)]
    return "\n".join([f"## {title}", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(page(), end="")
