"""The page of routes and fields from the code: `python -m phalanx.serving.gateway.describe > docs/http_api.md`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

import msgspec
from msgspec import Meta

from .config import GatewayConfig
from .openapi import STATUS_MEANINGS
from .routes.table import OPERATIONS, Operation
from .schemas.fields import CommonFields, OpenAIFields, StreamOptions

_HEAD = """# HTTP API

This page is made from the code by `python -m phalanx.serving.gateway.describe`; a test keeps it current.

The gateway speaks OpenAI's API with the widely used fields of vLLM's server. A field that it does not know is a 400
that names it: nothing is silently ignored. A null is as good as no value. Errors are
`{"error": {"message", "type", "param", "code"}}`; `param` is the path of the field, such as `messages[0].content`.
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
* A schema of `response_format` or `structured_outputs` is enforced, `strict` or not. What no grammar can be made of is
  a 400 that names its path in the schema. Properties come in the schema's order, and a `format` is enforced.
* Calls that `tool_choice` requires are made in Hermes' form, whatever the model's own is; their arguments are valid by
  the function's parameters. With "auto" that holds for functions that are `strict`, of models that write Hermes' form.
  With `response_format` an answer to a request with tools is one call, or else has that form.
* Calls of tools are read as they grow: the name comes first, then pieces of the arguments, exactly as the model wrote
  them (Qwen3-Coder's parameters become JSON by the tool's schema). What is no call is text. A call that breaks off has
  arguments that are no JSON, and the rest is text. White space before, between and after calls is dropped; text after
  calls is kept. A call of a tool that the request does not offer is a call.
* Thinking is `reasoning` and `reasoning_content`, without its tags, otherwise as the model wrote it. Its tokens count,
  and have log-probabilities. `stop` is looked for in the answer alone, unless `stop_in_reasoning` is true. A choice
  that ends within thinking has `ended_in_reasoning`.
"""


def page() -> str:
    """The page, Markdown."""
    parts = [_HEAD, _routes(), _statuses()]
    parts.append(_fields("Fields of the routes that answer with text", CommonFields, set()))
    parts.append(_fields("stream_options", StreamOptions, set()))
    for operation in OPERATIONS:
        if operation.request is not None:
            shared = set(CommonFields.__struct_fields__) if issubclass(operation.request, OpenAIFields) else set()
            parts.append(_fields(operation.path, operation.request, shared))
            parts.append(_refused(operation))
    parts += [_DIFFERENCES, _settings()]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


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
    rows = [f"| `{name}` | {why} |" for name, why in operation.refused.items()]
    return "\n".join(
        [f"Refused on `{operation.path}`:", "", "| field | why, and what to use |", "|---|---|", *rows, ""]
    )


def _settings() -> str:
    docs = re.findall(
        r'^    (\w+): [^\n]+\n    """(.*?)"""', inspect.getsource(GatewayConfig), re.DOTALL | re.MULTILINE
    )
    meanings = {name: " ".join(text.split()) for name, text in docs}
    rows = [
        f"| `{field.name}` | {field.default!r} | {meanings[field.name]} |"
        for field in dataclasses.fields(GatewayConfig)
    ]
    return "\n".join(["## Settings of the gateway", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    print(page(), end="")
