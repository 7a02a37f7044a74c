"""What an answer must match: OpenAI's response_format and vLLM's structured_outputs, as the engine takes them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import msgspec
from msgspec import Meta

from ....engine.errors import InvalidRequest
from ....engine.protocol.structured import StructuredOutput
from ..http.errors import ApiError, invalid

Schema = dict[str, Any] | bool


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON Schema under a name."""

    schema: Annotated[Schema, Meta(description="A JSON Schema (draft 2020-12), always enforced.")] | None = None
    name: str | None = None
    description: str | None = None
    strict: Annotated[bool, Meta(description="Accepted; a schema is enforced in any case.")] | None = None


class Structure(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of the answer that begins with `begin`: JSON that is valid by its schema, and then `end`."""

    begin: str
    end: str
    schema: Schema = True


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[Structure] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Exactly one form that the answer must match."""

    json: Annotated[Schema | str, Meta(description="A JSON Schema, or its text.")] | None = None
    json_object: Annotated[bool, Meta(description="Any JSON object.")] | None = None
    regex: Annotated[str, Meta(description="A regular expression that the whole answer matches.")] | None = None
    choice: Annotated[list[str], Meta(min_length=1, description="The texts of which the answer is one.")] | None = None
    grammar: Annotated[str, Meta(description="A grammar in Lark's syntax, or in EBNF with ::=.")] | None = None
    structural_tag: Annotated[str, Meta(description='JSON: {"structures": [...], "triggers": [...]}.')] | None = None


class StructuredFields(Protocol):
    """A request that says what its answers must match."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None


def structured_of(request: StructuredFields) -> StructuredOutput | None:
    """What the engine is asked to enforce. Raises ApiError naming the field that is missing, wrong or one too many."""
    wanted = request.structured_outputs
    form = request.response_format
    if form is not None:
        _check_form(form)
    if form is None or form.type == "text":
        return None if wanted is None else _from_structured_outputs(wanted)
    if wanted is not None:
        raise invalid("structured_outputs does not go with response_format: give one of them", "structured_outputs")
    if form.type == "json_object":
        return StructuredOutput(json_object=True)
    if form.type == "structural_tag":
        if form.structures is None or form.triggers is None:
            field = "response_format." + ("triggers" if form.structures is not None else "structures")
            raise invalid(f"{field} is required", field, "missing_required_parameter")
        tag = {"structures": msgspec.to_builtins(form.structures), "triggers": form.triggers}
        return StructuredOutput(structural_tag=json.dumps(tag, ensure_ascii=False))
    if form.json_schema is None or form.json_schema.schema is None:
        field = "response_format.json_schema" + (".schema" if form.json_schema is not None else "")
        raise invalid(f"{field} is required", field, "missing_required_parameter")
    return StructuredOutput(json_schema=json.dumps(form.json_schema.schema, ensure_ascii=False))


def _check_form(form: ResponseFormat) -> None:
    """Raise ApiError for a field that belongs to another type of form: it would have no effect."""
    owners = {"json_schema": "json_schema", "structures": "structural_tag", "triggers": "structural_tag"}
    for name, owner in owners.items():
        if getattr(form, name) is not None and form.type != owner:
            field = f"response_format.{name}"
            raise invalid(f"{field} is only for type={owner!r}; got type={form.type!r}", field)


def _from_structured_outputs(wanted: StructuredOutputs) -> StructuredOutput:
    schema = wanted.json
    made = StructuredOutput(
        json_schema=schema if isinstance(schema, str | None) else json.dumps(schema, ensure_ascii=False),
        json_object=bool(wanted.json_object),
        regex=wanted.regex,
        choice=None if wanted.choice is None else tuple(wanted.choice),
        grammar=wanted.grammar,
        structural_tag=wanted.structural_tag,
    )
    given = [name for name in wanted.__struct_fields__ if getattr(wanted, name) not in (None, False)]
    if schema is not False and len(given) != 1:
        names = ", ".join(wanted.__struct_fields__)
        raise invalid(
            f"structured_outputs must have exactly one of {names}; got {', '.join(given) or 'none'}",
            "structured_outputs",
        )
    return made


_PATH = re.compile(r'^structured(?:\.([a-z_]+))?((?:\.[\w$-]+|\[\d+\]|\["(?:[^"\\]|\\.)*"\])*)')
_STRUCTURE = re.compile(r"^\.structures\[(\d+)\]\.schema")


@asynccontextmanager
async def structured_errors(
    request: StructuredFields, structured: StructuredOutput | None, tools: list[dict[str, Any]] | None = None
) -> AsyncIterator[None]:
    """Raise the engine's refusal of what an answer must match as an ApiError that names the request's own field.

    `structured` is what the engine got, in which the parameters of `tools` may be.
    """
    try:
        yield
    except InvalidRequest as error:
        found = _PATH.match(str(error))
        if found is None:
            raise
        raise _explained(str(error), found, _Given(request, structured, tools or [])) from None


@dataclass(frozen=True)
class _Given:
    request: StructuredFields
    structured: StructuredOutput | None
    tools: list[dict[str, Any]]

    def field(self, kind: str | None) -> str | None:
        """The request's own field for the engine's `kind`; None if it gave no form of its answer."""
        if self.request.structured_outputs is not None:
            return "structured_outputs" + {None: "", "json_schema": ".json"}.get(kind, f".{kind}")
        form = self.request.response_format
        if form is None or form.type == "text":
            return None
        return "response_format" + (".json_schema.schema" if kind == "json_schema" else "")

    def made_of_tools(self) -> bool:
        """Whether the engine's structural tag is this server's, not the request's."""
        wanted = self.request.structured_outputs
        form = self.request.response_format
        own = (wanted is not None and wanted.structural_tag) or (form is not None and form.type == "structural_tag")
        return bool(self.tools) and not own

    def owner(self, index: int) -> str:
        """The field that the schema of a structure of such a tag comes from."""
        tag = json.loads((self.structured and self.structured.structural_tag) or '{"structures": []}')
        begin = str(tag["structures"][index]["begin"]) if index < len(tag["structures"]) else ""
        for number, tool in enumerate(self.tools):
            if begin and f'"name": {json.dumps(tool["function"]["name"], ensure_ascii=False)},' in begin:
                return f"tools[{number}].function.parameters"
        return self.field("json_schema") or "tools"


def _explained(message: str, found: re.Match[str], given: _Given) -> ApiError:
    kind, rest = found[1], found[2]
    if kind == "structural_tag" and given.made_of_tools():
        structure = _STRUCTURE.match(rest)
        path = "tools" if structure is None else given.owner(int(structure[1]))
        rest = "" if structure is None else rest[structure.end() :]
    else:
        path = given.field(kind) or "tools"
        rest = rest if path != "tools" else ""
    return invalid(path + rest + message[found.end() :], path + rest)
