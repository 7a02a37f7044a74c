"""Chat templates: whatever a template does, it renders, or is refused with a reason, and the next one renders."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from phalanx.engine.coordinator.text.chat_template import ChatTemplate
from phalanx.engine.coordinator.text.template_processes import TemplateProcesses
from phalanx.engine.errors import InvalidRequest
from phalanx.tests.engine.coordinator.test_chat_template import FAMILIES
from phalanx.tests.fuzz.bounds import TooSlowError, check_message, in_time
from phalanx.tests.fuzz.choices import Choices

WALL_S = 30.0
"""Seconds by the clock that a request may take: a template has 2 of CPU, beside whatever else runs."""
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]")
NAMES = (
    "messages", "message", "message.content", "message['role']", "tools", "bos_token", "loop.index", "loop",
    "x", "ns.x", "ns",
    "range", "dict", "namespace", "cycler", "joiner", "self", "none", "raise_exception", "strftime_now", "caller",
    "messages[0].content", "messages[-1]", "''", "'a'", "'é🙂'", "1", "10**9", "-1", "0.5", "[1, 2]",
    "{'a': 1}", "(1,)", "true",
)  # fmt: skip
ATTRIBUTES = (
    ".__class__", ".__init__", ".__globals__", ".format", ".join", ".replace", ".split", ".center", ".items",
    ".update",
    ".append", ".upper", ".encode", ".strip", "[0]", "[::-1]", "['__class__']", "|attr('__class__')", ".mro",
    "._x", ".next",
)  # fmt: skip
CALLS = (
    "()", "(x)", "('a', 'b' * 1000)", "(10**9)", "('{0.__class__}')", "(*range(9))", "(**{'a': 1})",
    "(ns.x)", "(9 ** 9)",
)  # fmt: skip
FILTERS = (
    "|tojson", "|trim", "|upper", "|join", "|list", "|length", "|replace('a', 'b' * 999)", "|indent(9)",
    "|center(10 ** 9)",
    "|format", "|map('upper')", "|map(attribute='__class__')", "|selectattr('role')", "|groupby('role')",
    "|sort", "|batch(2)",
    "|sum(start='')", "|int", "|float", "|string", "|safe", "|e", "|wordwrap(1)", "|unique|list", "|random",
    "|pprint", "|xmlattr",
    "|dictsort", "|items|list", "|tojson(indent=10 ** 8)", "|slice(3)|list", "|urlize", "|filesizeformat",
    "|default('d')",
)  # fmt: skip
OPERATORS = (" + ", " * ", " ** ", " % ", " ~ ", " - ", " // ", " in ", " == ", " and ", " if x else ", " is ", " < ")
TESTS = ("string", "defined", "mapping", "none", "odd", "divisibleby(0)", "sameas(1)", "filter", "callable")


def fuzz_one(data: bytes) -> None:
    """Render a made-up template, or a damaged one of a family."""
    choices = Choices(data)
    if choices.number(4) == 0:
        template = choices.pick([template for template, _, _ in FAMILIES.values()])
        template = choices.mutated(template.encode()).decode(errors="replace")
    else:
        template = _body(choices, 3)
    messages: Any = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|im_end|>"}]
    for _ in range(choices.number(3)):
        messages = choices.changed(messages, ("role", "content", "user", "type", "text", "tool_calls", *SPECIAL))
    options = {"tools": [{"a": 1}] if choices.flag() else None, "continue_final_message": choices.number(8) == 1}

    began = time.monotonic()
    try:
        with in_time():
            rendered = _template(template).render(messages if isinstance(messages, list) else [messages], **options)
            rendered.expand(rendered.text)
    except InvalidRequest as error:
        check_message(error)
    else:
        assert "<class 'type'>" not in rendered.text
    if time.monotonic() - began > WALL_S:
        raise TooSlowError(f"a template took {time.monotonic() - began:.0f} s: {template[:500]!r}")
    # Whatever became of that one, the next is rendered.
    assert _template("{{ messages[0].content }}").render([{"role": "user", "content": "on"}]).text == "on"


@cache
def _processes() -> TemplateProcesses:
    return TemplateProcesses()


def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, SPECIAL, _processes())


def _expression(choices: Choices, depth: int) -> str:
    text = choices.pick(NAMES)
    for _ in range(choices.number(4)):
        kind = choices.number(6)
        if kind == 0:
            text += choices.pick(ATTRIBUTES)
        elif kind == 1:
            text += choices.pick(CALLS)
        elif kind == 2:
            text += choices.pick(FILTERS)
        elif kind == 3:
            text += f" is {choices.pick(TESTS)}"
        elif depth:
            text = f"({text}{choices.pick(OPERATORS)}{_expression(choices, depth - 1)})"
    return text


def _body(choices: Choices, depth: int) -> str:
    parts = []
    for _ in range(1 + choices.number(4)):
        kind = choices.number(9 if depth else 4)
        value = _expression(choices, 2)
        inner = _body(choices, depth - 1) if kind > 3 else ""
        parts.append(
            (
                f"{{{{ {value} }}}}",
                f"{{% set x = {value} %}}",
                f"{{% set ns.x = {value} %}}",
                choices.text(("{%", "%}", "{{", "}}", "<|im_start|>", "\n", "{% generation %}", "{% break %}"), 3),
                f"{{% for message in {value} %}}{inner}{{% endfor %}}",
                f"{{% if {value} %}}{inner}{{% else %}}b{{% endif %}}",
                f"{{% macro m(x) %}}{inner}{{% endmacro %}}{{{{ m({value}) }}}}",
                f"{{% set x %}}{inner}{{% endset %}}",
                f"{{% set ns = namespace(x={value}) %}}{{% filter upper %}}{inner}{{% endfilter %}}",
            )[kind]
        )
    return "".join(parts)
