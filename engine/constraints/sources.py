"""The grammar, as the library takes it, of each thing that a request may give."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest
from ..protocol.structured import StructuredOutput
from .json_schema import check_schema, decode_json, for_library

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"[ ]|\n(?:[ ]{0,40}|\t{0,20})"
"""Between the parts of JSON: a space, or a new line with its indentation. More would let a model go on with it for
ever."""
DEPTH = 64
"""Brackets of a regular expression or a grammar within one another, at most."""
_LITERALS = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n])+/')
"""Comments, strings and regular expressions of a Lark grammar, of which & and ~ are no operators."""
LINE_CHARACTERS = 2048
"""Characters of a line of a grammar at most, and so of a regular expression in it."""


def grammar_of(structured: StructuredOutput) -> str:
    """Return the library's grammar of a checked `structured`.

    Raises InvalidRequest naming what is wrong, for a schema with its path.
    """
    from llguidance import LLMatcher

    field = f"structured.{structured.kind}"
    if structured.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_overrides())
    if structured.json_schema is not None:
        schema = decode_json(structured.json_schema, field)
        check_schema(schema, field)
        return schema_grammar(schema)
    if structured.regex is not None:
        check_depth(structured.regex, field)
        return LLMatcher.grammar_from_regex(structured.regex)
    if structured.choice is not None:
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_text, structured.choice)))
    if structured.grammar is not None:
        return LLMatcher.grammar_from_lark(_lark(structured.grammar, field))
    assert structured.structural_tag is not None
    return LLMatcher.grammar_from_lark(_structural_tag(decode_json(structured.structural_tag, field), field))


def schema_grammar(schema: Any) -> str:
    """Return the library's grammar of a schema that was checked."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(json.dumps(_as_object(schema)), overrides=_overrides())


def inline_schema(schema: Any, field: str) -> str:
    """Return the text of a JSON Schema inside a Lark grammar. Raises InvalidRequest with the path of what is wrong."""
    check_schema(schema, field)
    return "%json " + json.dumps({**_as_object(schema), "x-guidance": _overrides()})


def check_depth(text: str, field: str) -> None:
    """Raise InvalidRequest for brackets that are within one another too deeply; those in literals count too."""
    depth = most = 0
    for letter in text:
        if letter in "([{":
            depth += 1
            most = max(most, depth)
        elif letter in ")]}":
            depth = max(0, depth - 1)
    if most > DEPTH:
        raise InvalidRequest(f"{field} has brackets {most} deep; at most {DEPTH} are allowed")


def _as_object(schema: Any) -> dict[str, Any]:
    """The schema as the library takes it at the top: `false` is an enumeration of nothing."""
    if isinstance(schema, bool):
        return {} if schema else {"enum": []}
    made: dict[str, Any] = for_library(schema)
    return made


def _overrides() -> JsonCompileOptions:
    return {"whitespace_pattern": WHITESPACE, "lenient": False, "coerce_one_of": False}


def _lark(text: str, field: str) -> str:
    """A grammar in Lark's syntax; of one in EBNF, which has ::=, the same in Lark's."""
    check_depth(text, field)
    longest = max(map(len, text.splitlines()), default=0)
    if longest > LINE_CHARACTERS:
        raise InvalidRequest(f"{field} has a line of {longest} characters; each may have at most {LINE_CHARACTERS}")
    operator = re.search(r"&|~(?!\s*\d)", _LITERALS.sub("", text))
    if operator is not None:
        raise InvalidRequest(f"{field} has the operator {operator[0]}, which is not supported: it may take for ever")
    if "::=" not in text:
        return _with_checked_schemas(text, field)
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except RecursionError:
        raise InvalidRequest(f"{field} is nested too deeply") from None
    except Exception as error:  # the converter has no error type of its own
        raise InvalidRequest(f"{field} is no EBNF: {error}") from error


def _with_checked_schemas(text: str, field: str) -> str:
    """A Lark grammar whose schemas (`%json {...}`, the library's own syntax) are checked as any others are."""
    pieces, at = [], 0
    for found in re.finditer(r"%json\s+(?=\{)", text):
        if found.start() < at:  # within a schema
            continue
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError as error:
            raise InvalidRequest(
                f"{field} has %json at character {found.start()} before what is no JSON: {error}"
            ) from None
        pieces += [text[at : found.start()], inline_schema(schema, f"{field}.%json")]
        at = end
    return "".join([*pieces, text[at:]])


def _structural_tag(tag: Any, field: str) -> str:
    """Any text, in which a trigger begins one of the structures."""
    if not isinstance(tag, dict) or not isinstance(tag.get("structures"), list) or not tag["structures"]:
        raise InvalidRequest(f'{field}.structures must be a list of {{"begin", "schema", "end"}} that is not empty')
    alone = tag.get("alone")
    if alone not in (None, "one", "many"):
        raise InvalidRequest(f'{field}.alone={alone!r} must be "one" or "many"')
    triggers = [""] if alone else tag.get("triggers")
    if not isinstance(triggers, list) or not all(isinstance(each, str) and (each or alone) for each in triggers):
        raise InvalidRequest(f"{field}.triggers must be a list of texts")
    unknown = sorted(set(tag) - {"structures", "triggers", "type", "alone"})
    if unknown:
        raise InvalidRequest(f"{field}.{unknown[0]} is not supported: give structures and triggers")

    rules = []
    for index, structure in enumerate(tag["structures"]):
        path = f"{field}.structures[{index}]"
        if not isinstance(structure, dict) or set(structure) - {"begin", "schema", "end"}:
            raise InvalidRequest(f'{path} must be {{"begin", "schema", "end"}}')
        begin, end = structure.get("begin"), structure.get("end")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise InvalidRequest(f"{path}.begin and .end must be texts")
        found = [trigger for trigger in triggers if begin.startswith(trigger)]
        if not found:
            raise InvalidRequest(f"{path}.begin={begin!r} begins with none of the triggers")
        trigger = max(found, key=len)
        body = [_text(begin[len(trigger) :]), inline_schema(structure.get("schema", {}), f"{path}.schema"), _text(end)]
        if not alone:
            rules.append(f"trigger_{index}[lazy]: TEXT {_text(trigger)}")
            body.insert(0, f"trigger_{index}")
        rules.append(f"structure_{index}: {' '.join(filter(None, body))}")
    names = " | ".join(f"structure_{index}" for index in range(len(tag["structures"])))
    if alone:
        return "\n".join([f"start: ({names})" + (f' ("\\n" ({names}))*' if alone == "many" else ""), *rules])
    return "\n".join([f"start: ({names})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules])


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
