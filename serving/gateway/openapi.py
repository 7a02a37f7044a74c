"""The OpenAPI 3.1 document, made from the table of routes and the schemas that check requests."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from .config import VERSION
from .http.neutral import NEUTRAL
from .routes.table import OPERATIONS, Operation
from .schemas.responses import HealthInfo

STATUS_MEANINGS = {
    400: "A field is not acceptable; param names it.",
    401: "A key is needed.",
    403: "A web page of another site had a browser send it (allow_origins), or there is no admin key.",
    404: "There is no such model or route.",
    405: "The route has other methods.",
    408: "The body came too slowly.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    421: "The name in Host is none of this server's (allowed_hosts).",
    422: "The model has not done what is asked of it: it wrote no summary.",
    429: "The server is full; Retry-After tells when to try again.",
    500: "The server failed.",
    503: "The model is being loaded, or the server is about to stop or has stopped.",
    504: "The request was not finished in time.",
    529: "What is a 503 elsewhere, under /v1/messages.",
}


def openapi_document() -> dict[str, Any]:
    """The document as plain data."""
    kinds: dict[type[msgspec.Struct], None] = {}
    for operation in OPERATIONS:
        for kind in (operation.error, operation.request, operation.answer, operation.chunk):
            if kind is not None:
                kinds[kind] = None
    _, components = msgspec.json.schema_components(list(kinds), ref_template="#/components/schemas/{name}")
    for schema in components.values():
        _take_nulls(schema)
    for operation in OPERATIONS:
        if operation.request is not None:
            _take_neutral(components, operation.request.__name__, operation.refused)

    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "phalanx", "version": VERSION},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _take_nulls(schema: dict[str, Any]) -> None:
    """Declare that a null is as good as no value, under any name (http/neutral.py); of what answers hold, nothing."""
    if schema.get("additionalProperties") is not False:
        return
    schema["additionalProperties"] = {"type": "null"}
    for name, field in schema["properties"].items():
        kinds = field.get("anyOf", [field])
        if name not in schema.get("required", ()) and {"type": "null"} not in kinds and field:
            schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}]}


def _take_neutral(components: dict[str, Any], kind: str, refused: Mapping[str, str]) -> None:
    """Declare the values of refused fields that are taken, since they change nothing."""
    for path, why in refused.items():
        outer, _, name = path.rpartition(".")
        holder = components[kind]
        if outer:
            (reference,) = re.findall(r"schemas/(\w+)", str(holder["properties"][outer]))
            holder = components[reference]
        if path in NEUTRAL:
            values = {"enum": [*NEUTRAL[path], None]}
            holder["properties"][name] = {**values, "description": f"Nothing else is taken: {why}"}


def _operation(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.chunk is not None:
        # As OpenAPI tools take a stream apart: each event is an object whose data is text.
        end = "; the last one is [DONE]" if operation.done else ""
        data = {"type": "string", "description": f"A {operation.chunk.__name__} as JSON{end}."}
        schema = {"type": "object", "required": ["data"], "properties": {"data": data}}
        content["text/event-stream"] = {"schema": schema}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status in sorted({401, 403, 421, *operation.statuses}):
        # Of the routes about health, those that are not well answer as those that are.
        kind = HealthInfo if operation.answer is HealthInfo and status == 503 else operation.error
        responses[str(status)] = {
            "description": STATUS_MEANINGS[status],
            "content": {"application/json": {"schema": _reference(kind)}},
        }
    made: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", operation.method.lower() + operation.path).strip("_"),
        "summary": (inspect.getdoc(operation.handler) or "").partition("\n")[0],
        "responses": responses,
    }
    if names := re.findall(r"{(\w+)}", operation.path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.query is not None:
        made.setdefault("parameters", []).extend(_query_parameters(operation.query))
    if operation.request is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.request)}},
        }
    return made


def _query_parameters(kind: type[msgspec.Struct]) -> list[dict[str, Any]]:
    schema = msgspec.json.schema(kind)["$defs"][kind.__name__]
    return [
        {"name": name, "in": "query", "required": False, "schema": _without_null(field)}
        for name, field in schema["properties"].items()
    ]


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    """A query has no null: a parameter is there or not."""
    (kind,) = [kind for kind in field["anyOf"] if kind != {"type": "null"}]
    return {name: value for name, value in {**kind}.items() if name != "default"}


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
