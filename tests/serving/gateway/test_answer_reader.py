"""Calls of tools within an answer's text: the same however the text is cut, and what is no call is the text it was."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx.engine.protocol.messages import Delta
from phalanx.serving.gateway.config import GatewayConfig
from phalanx.serving.gateway.generation.answer_reader import AnswerReader, Dialect, ToolSyntax, dialect_of
from phalanx.serving.gateway.generation.parameter_types import json_value, parameter_types
from phalanx.serving.gateway.generation.parts import CallArguments, CallBegin, CallEnd, Part, Reasoning, Text
from phalanx.tests.serving.fake_engine import model_info

BEGIN, END = "<tool_call>", "</tool_call>"
PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    "flag": {"type": "boolean"},
    "list": {"type": "array"},
    "object": {"$ref": "#/$defs/thing"},
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": PROPERTIES, "$defs": {"thing": {"type": "object"}}},
        },
    }
    for name in ("edit_file", "get.weather-2", "é")
]
HARD_TEXTS = [
    "", "plain", "{", "}}", '"quoted" \\ and \\"', "line\nbreak\r\n", "é漢🙂", END, BEGIN, f'{BEGIN}{{"name": "x"}}',
    "</parameter>", "<parameter=a>", "\\u00e9", "a" * 30, "\n", "<function=f>", "[1, 2",
]  # fmt: skip


@dataclass
class Read:
    """What a client knows when an answer has come."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


def read(syntax: ToolSyntax | None, *pieces: str, **options: Any) -> Read:
    reader = AnswerReader(syntax, TOOLS, **options)
    parts: list[Part] = [part for piece in pieces for part in reader.feed(Delta("", 0, piece, []))]
    return gather([*parts, *reader.finish()])


def gather(parts: list[Part]) -> Read:
    made = Read()
    for part in parts:
        if isinstance(part, Text):
            made.text += part.text
        elif isinstance(part, Reasoning):
            made.reasoning += part.text
        elif isinstance(part, CallBegin):
            assert part.call == len(made.calls) == len(made.ended)  # one ends before the next begins
            made.calls.append((part.name, ""))
        elif isinstance(part, CallArguments):
            name, arguments = made.calls[part.call]
            made.calls[part.call] = (name, arguments + part.text)
        else:
            made.ended.append(part.call)
    return made


# ---- texts made by chance, cut everywhere


def arguments_of(chance: random.Random) -> dict[str, Any]:
    values: dict[str, Any] = {
        "text": chance.choice(HARD_TEXTS),
        "count": chance.randrange(-9, 99),
        "ratio": chance.choice([None, 0.5, 3]),
        "flag": chance.choice([True, False]),
        "list": [chance.choice(HARD_TEXTS), {"deep": [[]]}],
        "object": {chance.choice(HARD_TEXTS): {"a": None}},
    }
    return {name: values[name] for name in chance.sample(sorted(values), chance.randrange(3))}


def hermes_call(chance: random.Random, name: str, arguments: dict[str, Any]) -> str:
    """A call as Hermes, Qwen2.5 or Qwen3 write it."""
    plain = {"ensure_ascii": chance.random() < 0.3}
    members = [f'"name": {json.dumps(name, **plain)}', f'"arguments": {json.dumps(arguments, **plain)}']
    if chance.random() < 0.3:
        members.reverse()
    if chance.random() < 0.2:
        members.insert(chance.randrange(3), '"id": [7, "}"]')
    inner = "{" + chance.choice([", ", ",\n ", ","]).join(members) + "}"
    blank = chance.choice(["", "\n"])
    return f"{BEGIN}{blank}{inner}{blank}{END}"


def coder_call(chance: random.Random, name: str, arguments: dict[str, Any]) -> str:
    """A call as Qwen3-Coder writes it."""
    made = f"<function={name}>\n"
    for key, value in arguments.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = str(value) if value is None or isinstance(value, bool) else text
        made += f"<parameter={key}>\n{text}\n</parameter>\n"
    made += "</function>"
    return made if chance.random() < 0.2 else f"{BEGIN}\n{made}\n{END}"


@pytest.mark.parametrize(
    ("syntax", "count"),
    [
        ("hermes", 20),
        ("qwen3_coder", 10),
        pytest.param("hermes", 200, marks=pytest.mark.slow),
        pytest.param("qwen3_coder", 100, marks=pytest.mark.slow),
    ],
)
def test_calls_are_the_same_wherever_their_text_is_cut(syntax: ToolSyntax, count: int) -> None:
    chance = random.Random(17)
    write = hermes_call if syntax == "hermes" else coder_call
    for _ in range(count):
        calls = [
            (chance.choice(TOOLS)["function"]["name"], arguments_of(chance)) for _ in range(chance.choice([1, 1, 2]))
        ]
        before, after = chance.choice(["", "Let me see. <b>"]), chance.choice(["", "", "\n\nDone."])
        texts = [write(chance, name, arguments) for name, arguments in calls]
        whole = before + chance.choice(["", "\n\n"]) + chance.choice(["", "\n"]).join(texts) + after

        expected = read(syntax, whole)
        assert expected.text == before + after
        assert [(name, json.loads(arguments)) for name, arguments in expected.calls] == calls
        assert expected.ended == list(range(len(calls)))
        assert read(syntax, *whole) == expected
        for place in range(len(whole)):
            assert read(syntax, whole[:place], whole[place:]) == expected, whole


PIECES = st.lists(
    st.sampled_from(
        [BEGIN, END, "<tool", "_call>", '{"name": "f"', '"arguments": ', "{", "}", '"', ",", ":", "[", "]", " ", "\n",
         "x", "1", "\\", '{"a": 1}', "<function=", "f", ">", "<parameter=", "</parameter>", "</function>", "null", "é"]
    ),
    max_size=14,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(pieces=PIECES, syntax=st.sampled_from(["hermes", "qwen3_coder"]))
def test_any_text_is_the_same_however_it_is_cut_and_text_where_no_call_is(
    pieces: list[str], syntax: ToolSyntax
) -> None:
    whole = "".join(pieces)
    expected = read(syntax, whole)
    assert read(syntax, *pieces) == read(syntax, *whole) == expected
    assert len(expected.ended) == len(expected.calls)
    if not expected.calls:
        assert expected.text == whole


# ---- one by one


@pytest.mark.parametrize(
    ("whole", "text", "calls"),
    [
        # Members in any order and form.
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        (r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\\"\"}"}</tool_call>', "", [("f", r'{"a": "\""}')]),
        ('<tool_call>{"name": "f", "parameters": { "a" :1 }}</tool_call>', "", [("f", '{ "a" :1 }')]),
        # Tags that were forgotten.
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}\nSo.', "\nSo.", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}</tool_call>', "", [("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
        # What is no call.
        ("use <tool_call> for it", "use <tool_call> for it", []),
        ('<tool_call>{"name": ""}</tool_call> ', '<tool_call>{"name": ""}</tool_call> ', []),
        ('<tool_call>{"name": "f\\ud800"}</tool_call>', '<tool_call>{"name": "f\\ud800"}</tool_call>', []),
        ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        ('<tool_call>{"name": "' + "x" * 9999, '<tool_call>{"name": "' + "x" * 9999, []),
        ('<tool_call>[{"name": "f"}]</tool_call>', '<tool_call>[{"name": "f"}]</tool_call>', []),
        ('<tool_call><tool_call>{"name": "f"}</tool_call>', "<tool_call>", [("f", "{}")]),
        # What goes wrong once the call has begun: its arguments are no JSON, and the rest is text.
        ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
        ('<tool_call>{"name": "f", "arguments": {"a": 1]} x', "]} x", [("f", '{"a": 1')]),
        ('<tool_call>{"name": "f", oops', "oops", [("f", "")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": "', "", [("f", '{"a": ')]),
        (r'<tool_call>{"name": "f", "arguments": "{\ud800"}', "", [("f", r'"{\ud800"')]),
    ],
)
def test_what_hermes_text_means(whole: str, text: str, calls: list[tuple[str, str]]) -> None:
    made = read("hermes", whole)
    assert (made.text, made.calls) == (text, calls)
    assert read("hermes", *whole) == made


@pytest.mark.parametrize(
    ("whole", "text", "calls"),
    [
        ("<tool_call>\n<function=f>\n</function>\n</tool_call>", "", [("f", "{}")]),
        ("<function=f><parameter=a>1</parameter></function>", "", [("f", '{"a": "1"}')]),
        ("<function=é>\n<parameter=count>\n5\n</parameter>\n</function>", "", [("é", '{"count": 5}')]),
        ("<function=é>\n<parameter=count>\nfive\n</parameter>\n</function>", "", [("é", '{"count": "five"}')]),
        ("<function=é>\n<parameter=text>\n\n x\n\n</parameter>\n</function>", "", [("é", '{"text": "\\n x\\n"}')]),
        ("<function=f><parameter=a></parameter> b</parameter></function>", "", [("f", '{"a": "</parameter> b"}')]),
        ("use <function=> or\n<function=a\n>", "use <function=> or\n<function=a\n>", []),
        ("<tool_call> {}", "<tool_call> {}", []),
        # What breaks off is no JSON, so that nobody takes it for the whole.
        ("<function=f><parameter=a>x", "", [("f", '{"a": "x')]),
        ("<function=f><parameter=a>x</parameter>", "", [("f", '{"a": "x"')]),
        ("<function=f> so <parameter=a>", "so <parameter=a>", [("f", "")]),
    ],
)
def test_what_qwen3_coders_text_means(whole: str, text: str, calls: list[tuple[str, str]]) -> None:
    made = read("qwen3_coder", whole)
    assert (made.text, made.calls) == (text, calls)
    assert read("qwen3_coder", *whole) == made


def test_a_name_comes_first_and_arguments_as_they_grow() -> None:
    reader = AnswerReader("hermes", TOOLS)

    def feed(text: str) -> list[str]:
        made = {CallBegin: "name", CallArguments: "text", Text: "text"}
        parts = reader.feed(Delta("", 0, text, []))
        return [str(getattr(part, made[type(part)])) for part in parts if not isinstance(part, CallEnd)]

    assert feed("Hm <tool") == ["Hm"]
    assert feed('_call>{"name": "f') == []
    assert feed('", "argum') == ["f"]
    assert feed('ents": {"pa') == ['{"pa']
    assert feed('th": "/</tool_call>') == ['th": "/</tool_call>']
    assert feed('"}}') == ['"}']
    coder = AnswerReader("qwen3_coder", TOOLS)
    feed_coder = [coder.feed(Delta("", 0, text, [])) for text in ("<function=f>", "<parameter=a>\nx", "y\n</para")]
    assert [[type(part) for part in parts] for parts in feed_coder] == [[CallBegin], [CallArguments], [CallArguments]]


def test_calls_have_names_of_their_own() -> None:
    parts = AnswerReader("hermes", TOOLS).whole("", '<tool_call>{"name": "f"}</tool_call>' * 2)
    ids = [part.id for part in parts if isinstance(part, CallBegin)]
    assert len(set(ids)) == 2
    assert all(each.startswith("call_") for each in ids)


def test_calls_beyond_the_most_are_left_out_and_text_is_kept() -> None:
    whole = 'a<tool_call>{"name": "f"}</tool_call>b<tool_call>{"name": "g"}</tool_call>c'
    assert read("hermes", whole, most_calls=1) == Read("abc", "", [("f", "{}")], [0])


def test_without_a_syntax_all_is_text() -> None:
    whole = '<tool_call>{"name": "f"}</tool_call> \n'
    assert read(None, whole) == Read(whole)


def test_thinking_is_left_out_where_it_is_not_wanted_and_holds_no_calls() -> None:
    thinking = '<tool_call>{"name": "f"}</tool_call>'
    assert gather(AnswerReader("hermes", TOOLS).whole(thinking, "Yes")) == Read("Yes", thinking)
    assert gather(AnswerReader("hermes", TOOLS, shows_reasoning=False).whole(thinking, "Yes")) == Read("Yes")


def test_a_text_made_to_hurt_takes_time_in_proportion_to_its_length() -> None:
    """Where it does not, this takes minutes."""
    for text in ('<tool_call>{"x":[', '<tool_call>{"x": "', "<tool_call", '<tool_call>{"arguments": {"x": "', " \n"):
        whole = text * (40_000 // len(text)) + "}"
        made = read("hermes", *(whole[place : place + 5] for place in range(0, len(whole), 5)))
        assert (made.text, made.calls) == (whole, [])
    for text in ("</parameter>", "<function=f><parameter=a>x</parameter>\n"):
        read("qwen3_coder", "<function=f><parameter=a>" + text * (40_000 // len(text)))


# ---- types and dialects


def test_types_are_those_of_the_schema() -> None:
    schema = {
        "properties": {
            "a": {"type": ["integer", "null"]}, "b": {"enum": [1, "x"]}, "c": {"$ref": "#/$defs/c"}, "d": {"$ref": "x"},
            "e": {"type": "string", "nullable": True}, "f": True, "g": {"$ref": "#/properties/g"}, "h": {"const": 1.5},
        },
        "$defs": {"c": {"oneOf": [{"type": "array"}, {"allOf": [{"type": "object"}]}]}},
    }  # fmt: skip
    types = parameter_types([{"function": {"name": "f", "parameters": schema}}, {"function": {"name": "g"}}, {}])
    assert {name: set(kinds) for name, kinds in types["f"].items()} == {
        "a": {"integer", "null"}, "b": {"integer", "number", "string"}, "c": {"array", "object"}, "d": set(),
        "e": {"string", "null"}, "f": set(), "g": set(), "h": {"number"},
    }  # fmt: skip
    assert list(types) == ["f"]


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", "integer", "5"), (" 5.0 ", "integer", "5"), ("5.5", "integer", '"5.5"'), ("NaN", "number", '"NaN"'),
        ("True", "boolean", "true"), ("yes", "boolean", '"yes"'), ("None", "integer null", "null"),
        ("null", "string null", "null"), ("7", "string integer", "7"), ("x", "string integer", '"x"'),
        ('{"a": 1}', "object", '{"a": 1}'), ("{'a': 1}", "object", "\"{'a': 1}\""), ("[" * 9999, "array", None),
        ("9" * 9999, "integer", None), ('"x"', "string null", '"\\"x\\""'),
    ],
)  # fmt: skip
def test_a_value_is_of_a_type_that_its_schema_allows_or_a_string(text: str, types: str, value: str | None) -> None:
    assert json_value(text, frozenset(types.split())) == (json.dumps(text) if value is None else value)


QWEN3 = "{{ '<tool_call>' }}{{ '</think>' }}"


@pytest.mark.parametrize(
    ("template", "settings", "dialect"),
    [
        (None, {}, Dialect(None, False)),
        (QWEN3, {}, Dialect("hermes", True)),
        ("<tool_call><function=x><parameter=y>", {}, Dialect("qwen3_coder", False)),
        ("<tool_call><arg_key>", {}, Dialect(None, False)),
        ("<function=x>{}", {}, Dialect(None, False)),
        (QWEN3, {"tool_syntax": "none", "reasoning": "none"}, Dialect(None, False)),
        (None, {"tool_syntax": "qwen3_coder", "reasoning": "think"}, Dialect("qwen3_coder", True)),
    ],
)
def test_a_dialect_is_the_templates_or_the_settings(
    template: str | None, settings: dict[str, Any], dialect: Dialect
) -> None:
    assert dialect_of(model_info(chat_template=template), GatewayConfig(**settings)) == dialect
