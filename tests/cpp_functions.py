"""Where a C++ file's functions begin and end, found by counting braces: enough to see that none grows too long."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass

# What may contain braces that open nothing, and preprocessor lines (with those that a backslash continues).
_NOT_CODE = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])+' | ^[ \t]*\#(?:\\\n|[^\n])*""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_ATTRIBUTE = re.compile(r"\b(?:alignas|__attribute__)\s*\((?:[^()]|\([^()]*\))*\)")
_SCOPE = re.compile(
    r"(?:inline\s+|typedef\s+|public:|private:|protected:|\s)*(?:namespace|class|struct|union|extern)\b"
)


@dataclass(frozen=True)
class Function:
    """`lines` counts from the first line of its head, a template's parameters included, to its closing brace."""

    head: str
    line: int
    lines: int


def functions(text: str) -> Iterator[Function]:
    """The functions of a C++ file, in the order in which they end. Raises ValueError if braces do not match.

    Recognised as a function is what stands in braces at the level of a file, a namespace or a class, behind a head with
    parentheses: functions, methods, constructors (one with braces in its initialiser list counts from the last of
    them), macros that a body follows, and lambdas that a constant is made of. A head that begins with namespace, class,
    struct, union or extern opens a level, if it has no parentheses besides an attribute's. Other braces, as of enums
    and initialisers, are skipped. What stands inside a function belongs to it: lambdas and local classes too. Both
    branches of an #if must close the braces that they open; raw strings and digit separators are not understood.
    """
    code = _NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    starts = [0, *(match.end() for match in re.finditer("\n", code))]
    outer = ["scope"]  # what each open brace has opened
    opened: tuple[str, int] | None = None  # the function that the scan is in: its head, and where that begins
    last = 0  # where the head of what comes next begins
    for match in re.finditer("[{};]", code):
        at, symbol = match.start(), match[0]
        if symbol == "{":
            kind = "inside"
            if outer[-1] == "scope":
                kind = _kind(code[last:at])
                if kind == "function":
                    begin = last + len(code[last:at]) - len(code[last:at].lstrip())
                    opened = (" ".join(code[begin:at].split()), begin)
            outer.append(kind)
        elif symbol == "}":
            kind = outer.pop()
            if not outer:
                raise ValueError(f"line {bisect.bisect(starts, at)} closes a brace that nothing has opened")
            if kind == "function" and opened:
                first = bisect.bisect(starts, opened[1])
                yield Function(opened[0], first, bisect.bisect(starts, at) - first + 1)
        last = at + 1
    if len(outer) > 1:
        raise ValueError(f"{len(outer) - 1} braces are not closed")


def _kind(head: str) -> str:
    """What an opening brace behind this text opens: a "scope", a "function", or what is "inside" neither."""
    head = _ATTRIBUTE.sub(" ", _without_template(head))
    if _SCOPE.match(head) and "(" not in head:
        return "scope"
    return "function" if "(" in head else "inside"


def _without_template(head: str) -> str:
    """The text without the parameters of its templates, in which `class` and parentheses may stand."""
    while match := re.search(r"\btemplate\s*<", head):
        end, depth = match.end(), 1
        while depth and end < len(head):
            depth += {"<": 1, ">": -1}.get(head[end], 0)
            end += 1
        head = head[: match.start()] + head[end:]
    return head
