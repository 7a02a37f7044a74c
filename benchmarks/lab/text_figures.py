"""Where the project's text stands: figures to look at, beside those of the field. They are no goals.

    python benchmarks/lab/text_figures.py [FOLDER ...]      # without one: the package, without tests and benchmarks

Long bodies without a blank line, multiple assignments, comments, documented functions and how docstrings begin. The
field's figures are those of well-kept engines and kernel libraries.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phalanx.benchmarks.lab.common import ROOT

PACKAGE = ("engine", "kernels", "launch", "parallel", "serving")
LONG_BODY = 20
"""Lines from which on a body is expected to have paragraphs."""
CPP = (".h", ".cpp")
CPP_TEXT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9A-Za-z_])\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
"""A comment, a string or a character: what begins inside one is not another."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Figures:
    """Counts over some files. Lines are all lines of a file, blank ones too."""

    python_lines: int = 0
    python_comments: int = 0
    cpp_lines: int = 0
    cpp_comments: int = 0
    long_bodies: int = 0
    without_blank_line: int = 0
    multiple_assignments: int = 0
    public_functions: int = 0
    documented: int = 0
    docstrings: int = 0
    begin_with_of: list[str] = field(default_factory=list)
    """Where a docstring begins with "Of", as FILE:LINE."""


def count_python(text: str, name: str, figures: Figures) -> None:
    """Add a Python file. Comments are the lines that hold one."""
    lines = text.splitlines()
    figures.python_lines += len(lines)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    figures.python_comments += len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})

    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            figures.multiple_assignments += _is_multiple(node)
        if isinstance(node, Function):
            _count_body(node, lines, figures)
    for function in _public_functions(tree):
        figures.public_functions += 1
        figures.documented += ast.get_docstring(function) is not None
    for docstring in _docstrings(tree):
        figures.docstrings += 1
        if str(docstring.value).split(maxsplit=1)[:1] == ["Of"]:
            figures.begin_with_of.append(f"{name}:{docstring.lineno}")


def count_cpp(text: str, figures: Figures) -> None:
    """Add a C++ file. Comments are the lines that one touches."""
    figures.cpp_lines += len(text.splitlines())
    lines = set()
    for match in CPP_TEXT.finditer(text):
        if match[0].startswith(("//", "/*")):
            first = text.count("\n", 0, match.start())
            lines |= set(range(first, first + match[0].count("\n") + 1))
    figures.cpp_comments += len(lines)


def _is_multiple(node: ast.Assign) -> bool:
    """`a, b = x, y`: several names get several values. Taking a tuple apart is something else."""
    return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)


def _count_body(node: Function, lines: Sequence[str], figures: Figures) -> None:
    """Count a body, from its first statement after the docstring, if it is long."""
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        return
    body = lines[statements[0].lineno - 1 : node.end_lineno]
    if len(body) >= LONG_BODY:
        figures.long_bodies += 1
        figures.without_blank_line += all(line.strip() for line in body)


def _public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[Function]:
    """Functions of the module, and methods of its public classes, whose names begin with no underscore."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _public_functions(node)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Docstrings, and the strings below a name that say what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value


def count(paths: Iterable[Path]) -> Figures:
    """The figures of all Python and C++ files among `paths` and in their folders. Raises SyntaxError for bad Python."""
    figures = Figures()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix == ".py":
                name = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
                count_python(file.read_text(), str(name), figures)
            elif file.suffix in CPP:
                count_cpp(file.read_text(), figures)
    return figures


def report(figures: Figures) -> list[str]:
    """A line for each figure, with the field's where there is one."""
    rows = [
        (
            f"bodies of {LONG_BODY} lines and more without a blank line",
            _per(figures.without_blank_line, figures.long_bodies, 100, "%"),
            "10-20 %",
        ),
        (
            "multiple assignments (a, b = x, y)",
            _per(figures.multiple_assignments, figures.python_lines, 1000, "per 1,000 lines"),
            "1-3 per 1,000 lines",
        ),
        ("comments, Python", _per(figures.python_comments, figures.python_lines, 100, "per 100 lines"), ""),
        (
            "comments, C++",
            _per(figures.cpp_comments, figures.cpp_lines, 100, "per 100 lines"),
            "22-24 per 100 lines (Highway, simdjson)",
        ),
        ("public functions with a docstring", _per(figures.documented, figures.public_functions, 100, "%"), ""),
        ('docstrings that begin with "Of"', f"{len(figures.begin_with_of)} of {figures.docstrings}", ""),
    ]

    lines = [f"{what:<56} {found:<40} {'the field: ' + usual if usual else ''}".rstrip() for what, found, usual in rows]
    return [*lines, *(f"    {location}" for location in figures.begin_with_of)]


def _per(part: int, whole: int, scale: int, unit: str) -> str:
    """A share, and what it is made of."""
    return f"{scale * part / whole:.1f} {unit} ({part:,} of {whole:,})" if whole else "none"


if __name__ == "__main__":
    chosen = [Path(argument) for argument in sys.argv[1:]] or [ROOT / "__init__.py", *(ROOT / name for name in PACKAGE)]
    if absent := [str(path) for path in chosen if not path.exists() and path.name not in PACKAGE]:
        sys.exit(f"error: {', '.join(absent)} does not exist: name files or folders of Python or C++")
    print("\n".join(report(count(path for path in chosen if path.exists()))))
