"""benchmarks/lab/text_figures.py counts what it says it counts."""

from __future__ import annotations

from pathlib import Path

from phalanx.benchmarks.lab.text_figures import Figures, count, count_cpp, count_python, report

SHORT = '''"""Of two functions."""


def documented():
    """Docstring."""
    a, b = 1, 2  # because
    c, d = a_pair()
    return "# no comment"


class Public:
    def bare(self): ...

    def _private(self): ...
'''


def _long(blank: bool) -> str:
    lines = [f"    x{number} = {number}" for number in range(20)]
    if blank:
        lines[10] = ""
    return "\n".join(["def long():", '    """A docstring', "", '    with a blank line."""', *lines, ""])


def test_python_is_counted() -> None:
    figures = Figures()
    count_python(SHORT, "short.py", figures)
    assert figures == Figures(
        python_lines=14,
        python_comments=1,
        multiple_assignments=1,
        public_functions=2,
        documented=1,
        docstrings=2,
        begin_with_of=["short.py:1"],
    )


def test_a_blank_line_of_the_docstring_is_no_paragraph_of_the_body() -> None:
    figures = Figures()
    for blank in (True, False):
        count_python(_long(blank), "long.py", figures)
    assert (figures.long_bodies, figures.without_blank_line) == (2, 1)


def test_comments_of_cpp_are_lines_and_not_in_strings() -> None:
    figures = Figures()
    count_cpp(
        "int a = 1'000;  // one\n/* two\n   three */ int b;\nconst char* c = \"// none\";\nchar d = '\"';  // '\n",
        figures,
    )
    assert (figures.cpp_lines, figures.cpp_comments) == (5, 4)


def test_the_report_puts_figures_beside_those_of_the_field(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(_long(blank=False))
    (tmp_path / "short.py").write_text(SHORT)
    text = "\n".join(report(count([tmp_path])))
    assert "100.0 % (1 of 1)" in text
    assert "the field: 10-20 %" in text
    assert "1 of 3" in text
    assert "short.py:1" in text
    assert "none" in next(line for line in text.splitlines() if line.startswith("comments, C++"))
